"""Starting Ray, attaching to one, and leaving nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors import cluster as clusters
from ember_ray.config.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("address", ["nonsense", "ray://127.0.0.1:10001", "127.0.0.1:123456", "host:", ":6379"])
def test_an_address_of_another_form_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="not of the form host:port"):
        clusters.start(1, address=address)


def test_an_address_where_nobody_listens_is_refused_quickly() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(UserError, match=f"no Ray cluster answers at ray.address '127.0.0.1:{port}'"):
        clusters.start(1, address=f"127.0.0.1:{port}")
    assert time.monotonic() - begun < 10


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(UserError, match="'SPREAT' is not one of PACK"):
        clusters.start(1, strategy="SPREAT")


@pytest.mark.parametrize(
    ("stages", "strategy", "nodes", "fits"),
    [
        (2, "PACK", [2.0], True),
        (3, "PACK", [2.0], False),
        (3, "PACK", [2.0, 1.0], True),
        (3, "STRICT_PACK", [2.0, 1.0], False),
        (2, "STRICT_PACK", [2.0, 1.0], True),
        (2, "STRICT_SPREAD", [2.0], False),
        (2, "STRICT_SPREAD", [2.0, 1.0], True),
        (2, "STRICT_SPREAD", [2.0, 0.5], False),
        (4, "SPREAD", [2.0, 2.0], True),
        (1, "PACK", [], False),
    ],
)
def test_which_bundles_fit(stages: int, strategy: str, nodes: list[float], fits: bool) -> None:
    assert clusters._fits(stages, {"CPU": 1.0}, strategy, [{"CPU": cpus} for cpus in nodes]) is fits


@pytest.mark.parametrize(
    ("stages", "share", "gpus", "fits"),
    [(1, 0.75, [1.0], True), (2, 0.75, [1.0], False), (2, 0.75, [2.0], True), (3, 0.75, [2.0], False),
     (4, 0.5, [2.0], True), (2, 2.0, [4.0], True), (3, 1.0, [1.0, 2.0], True)],
)  # fmt: skip
def test_a_share_of_a_gpu_is_of_one_gpu(stages: int, share: float, gpus: list[float], fits: bool) -> None:
    nodes = [{"CPU": 8.0, "GPU": count} for count in gpus]
    assert clusters._fits(stages, {"CPU": 1.0, "GPU": share}, "PACK", nodes) is fits


def marked(mark: str) -> list[psutil.Process]:
    """Processes that inherited the mark from the driver, the dead that nobody waited for left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("EMBER_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until_gone(mark: str, limit_s: float) -> list[psutil.Process]:
    """What is left of the marked after at most the limit."""
    end = time.monotonic() + limit_s
    while (left := marked(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    return left


DRIVER = """
import signal
import sys
from actors import cluster
from actors.messages import CoordinatorSettings
from actors.rollouts import Rollouts
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.sampling_params import SamplingParams
from actors.messages import PromptRow
from ember_ray.data.example import Example

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started us with it ignored
with cluster.start(1, run="test") as made:
    assert made.owned and made.nodes == 1 and made.dashboard_url.startswith("http://127.0.0.1:")
    assert made.token_path.is_file()
    rollouts = Rollouts(made, CoordinatorSettings(EngineOptions(sys.argv[1]), threads=1))
    rollouts.ready()
    print("up", flush=True)
    rows = [PromptRow(Example(str(n), [], {}), tuple(range(1, 40 + n))) for n in range(100)]
    while True:
        rollouts.rollout(rows, 8, SamplingParams(max_tokens=400, ignore_eos=True), 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_no_process_is_left_however_the_driver_ends(tiny_model: str, tmp_path: Path, how: str) -> None:
    mark = uuid.uuid4().hex
    script = tmp_path / "driver.py"
    script.write_text(DRIVER)
    environment = os.environ | {"EMBER_TEST_MARK": mark, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(
        [sys.executable, str(script), tiny_model],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "up\n", driver.stderr.read() if driver.stderr else ""
        assert len(marked(mark)) > 5
        time.sleep(1)
        if how == "SIGINT":
            os.killpg(driver.pid, signal.SIGINT)  # as a terminal does: to the whole group
            time.sleep(0.2)
            os.killpg(driver.pid, signal.SIGINT)  # and again, from the impatient
        else:
            driver.send_signal(signal.SIGKILL)
        errors = driver.communicate(timeout=150)[1]
        assert driver.returncode != 0
        assert ("KeyboardInterrupt" in errors) is (how == "SIGINT")
        assert wait_until_gone(mark, limit_s=15.0 if how == "SIGKILL" else 0.0) == []
    finally:
        for process in marked(mark):
            process.kill()


@pytest.mark.slow
def test_too_few_gpus_is_an_error_and_leaves_no_ray() -> None:
    import ray

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with pytest.raises(UserError, match="2 stages of 1 CPU, 1 GPU each .* do not fit on the 1 node"):
        clusters.start(2, gpus_per_stage=1.0, dashboard=False, num_cpus=2)
    assert not ray.is_initialized()
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.mark.slow
class TestTwoNodes:
    @pytest.fixture(scope="class")
    def address(self) -> Iterator[str]:
        from ray.cluster_utils import Cluster

        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        yield nodes.address
        nodes.shutdown()

    def test_a_stage_on_each_node_and_the_cluster_stays(
        self, address: str, tiny_model: str, make_rows, make_settings, make_update, tokens_of
    ) -> None:
        import ray
        from ray.util import placement_group_table

        from actors.rollout import build_requests
        from actors.rollouts import Rollouts
        from ember_ray.engine.llm import LLM
        from ember_ray.engine.options import EngineOptions
        from ember_ray.engine.sampling_params import SamplingParams

        params = SamplingParams(max_tokens=20)
        with clusters.start(2, address=address, strategy="STRICT_SPREAD", run="test") as cluster:
            assert not cluster.owned and cluster.nodes == 2
            rollouts = Rollouts(cluster, make_settings((2, 2)))
            rollouts.ready()
            places = {node for node, _ in rollouts.stage_processes()}
            assert places == {node["NodeID"] for node in ray.nodes()}
            rollouts.publish(make_update(3))
            found = tokens_of(rollouts.rollout(make_rows(6), 3, params, 0))
            processes = [process for _, process in rollouts.stage_processes()]
        assert not ray.is_initialized()
        psutil.wait_procs([psutil.Process(pid) for pid in processes if psutil.pid_exists(pid)], timeout=10)
        assert not any(psutil.pid_exists(pid) for pid in processes)

        llm = LLM(EngineOptions(tiny_model))
        llm.engine.stage_adapter(make_update(3))
        llm.engine.commit_adapter(3)
        requests = build_requests(make_rows(6), 3, params, 11, 0)
        alone = {(c.request_id, c.index): c.token_ids for batch in llm.engine.rollout(requests) for c in batch}
        assert {key: tokens for key, (_, tokens, _) in found.items()} == alone

        with clusters.start(2, address=address, run="next") as cluster:
            assert cluster.nodes == 2
            states = [entry["state"] for entry in placement_group_table().values()]
            assert sorted(states) == ["CREATED", "REMOVED"]
            assert ray.available_resources().get("CPU", 0.0) == 0.0

    def test_a_busy_cluster_is_an_error(self, address: str) -> None:
        import ray

        with pytest.raises(UserError, match="3 stages of 1 CPU each .* do not fit on the 2 node"):
            clusters.start(3, address=address, cpus_per_stage=1.0)
        assert not ray.is_initialized()
