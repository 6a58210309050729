"""Where a recipe puts the stages and the learner."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors import cluster as clusters
from ember_ray.config.schema import DpoExtractConfig
from ember_ray.tracking.console import Console
from recipes.learners import DPO, start_learner
from recipes.session import STAGE_GPU, Session
from tests.support.command_line import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Two nodes, each with one GPU by name: Ray gives out what it is told of, and nobody computes on it here."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "num_gpus": 1, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    nodes.add_node(num_cpus=2, num_gpus=1)
    nodes.wait_for_nodes()
    yield nodes.address
    nodes.shutdown()


def test_a_stage_and_the_learner_share_a_gpu(address: str, tmp_path: Path) -> None:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    @ray.remote
    class Stage:
        def place(self) -> tuple[str, list[int]]:
            return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids()

    config = DpoExtractConfig.model_validate({"model": {"device": "cuda", "dtype": "float16"}})
    with clusters.start(2, address=address, gpus_per_stage=STAGE_GPU, run="test") as cluster:
        stages = [
            Stage.options(
                num_gpus=STAGE_GPU,
                num_cpus=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(cluster.placement.group, index),
            ).remote()
            for index in range(2)
        ]
        places = ray.get([stage.place.remote() for stage in stages], timeout=60)
        assert {node for node, _ in places} == {node["NodeID"] for node in ray.nodes()}
        assert [gpus for _, gpus in places] == [[0], [0]]

        learner = start_learner(config, DPO, tmp_path)

        def seen(actor: object) -> tuple[str, list[int], str]:
            return ray.get_runtime_context().get_node_id(), ray.get_gpu_ids(), actor._settings.dtype  # type: ignore[attr-defined]

        here = ray.get_runtime_context().get_node_id()
        assert ray.get(learner.__ray_call__.remote(seen), timeout=60) == (here, [0], "float32")
        for actor in (*stages, learner):
            ray.kill(actor)


def test_the_dashboard_is_there_and_the_user_is_told_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DpoExtractConfig.model_validate({"output_dir": str(tmp_path)})
    with Console() as console, Session(config, console):
        said = capsys.readouterr().out
        address = re.search(r"Ray dashboard: (http://\S+)", said)
        token = re.search(r"token in (\S+)", said)
        assert address and token and Path(token[1]).is_file()
        page = urllib.request.urlopen(address[1], timeout=30)
        assert page.status == 200 and b"Ray Dashboard" in page.read()


def test_a_machine_without_a_usable_gpu_is_told_before_ray_starts(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    few = ("tracker=none", "data.train_examples=64", "data.eval_prompts=2")
    ended = run("recipes.dpo_extract", "model.device=cuda", *few, cwd=tmp_path)
    assert ended.status == 2
    assert re.search(r"error: model.device=cuda: .*, or use the device 'cpu'\n$", ended.stderr), ended.stderr
    assert "starting Ray" not in ended.stdout + ended.stderr
