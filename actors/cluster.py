"""A local Ray of our own, or a cluster that is there already; and nothing of ours left behind at the end."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.calls import first_line, kill_all
from actors.pipeline import Placement
from ember_ray.config.errors import UserError

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")

# A thread that waits must not spin: the processes of a small machine share its cores.
ACTOR_ENV = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


@dataclass
class Cluster:
    """A Ray that the run may use; close it with `shutdown` or a ``with`` block.

    Attributes:
        address: of Ray's control service, ``host:port``.
        dashboard_url: where the dashboard is; None when it is off.
        token_path: the file with the access token that the dashboard asks for; None when there is none to give.
        nodes: how many nodes are alive.
        namespace: the run's own, so that actor names of several runs do not meet.
        owned: Ray was started by this run and ends with it.
        placement: the placement group with a bundle for each stage.
    """

    address: str
    dashboard_url: str | None
    token_path: Path | None
    nodes: int
    namespace: str
    owned: bool
    placement: Placement
    _processes: list[Any] = field(default_factory=list, repr=False)
    _open: bool = True

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Ends our actors and the placement group, and Ray itself if we started it. Twice does no harm.

        Ctrl-C is held off meanwhile (at most about half a minute), so that it leaves nothing half-ended.
        """
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.shutdown)
        with _no_interrupt():
            _end_ray(self.placement.group, self._processes)


def start(
    stages: int,
    *,
    address: str | None = None,
    run: str = "run",
    strategy: str = "PACK",
    gpus_per_stage: float = 0.0,
    cpus_per_stage: float | None = None,
    num_cpus: int | None = None,
    dashboard: bool = True,
    limit_s: float = 60.0,
) -> Cluster:
    """Starts a local Ray, or attaches to a cluster, and reserves a place for every stage. Call it in the main thread:
    on Linux the processes of a local Ray end with the thread that started them.

    Args:
        stages: how many bundles the placement group has.
        address: ``host:port`` of a cluster or ``auto`` for the one of this machine; None starts a local Ray.
        run: a name for the namespace and the metrics; a random part is added to the namespace.
        strategy: Ray's placement strategy of the stages.
        cpus_per_stage: None takes one CPU, or less when the machine has fewer CPUs than stages.
        num_cpus: that a local Ray offers; None takes all.
        limit_s: for the connection, and for the placement.

    Raises:
        UserError: Ray cannot be started or reached, or has no room for the stages.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import psutil
    import ray

    if strategy not in STRATEGIES:
        raise UserError(f"placement strategy '{strategy}' is not one of {', '.join(STRATEGIES)}")
    if ray.is_initialized():
        raise UserError("this process is connected to a Ray already; end it first (ray.shutdown())")
    namespace = f"ember-{run}-{uuid.uuid4().hex[:8]}"
    options: dict[str, Any] = {
        "namespace": namespace,
        "runtime_env": {"env_vars": ACTOR_ENV},
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    before = {child.pid for child in psutil.Process().children()}
    if address is None:
        memory = min(2 * 10**9, max(100 * 10**6, psutil.virtual_memory().total // 10))
        options |= {"address": "local", "include_dashboard": dashboard, "num_cpus": num_cpus}
        options |= {"object_store_memory": memory, "dashboard_host": "127.0.0.1"}
    else:
        _check_reachable(address)
        options["address"] = address
    group = None
    processes: list[Any] = []
    try:
        context = _connect(options, address)
        if address is None:
            processes = [child for child in psutil.Process().children() if child.pid not in before]
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if cpus_per_stage is None:
            cpus_per_stage = min(1.0, int(100 * ray.cluster_resources().get("CPU", 1.0) / stages) / 100)
        group = _reserve(stages, cpus_per_stage, gpus_per_stage, strategy, nodes, limit_s)
    except BaseException:
        with _no_interrupt():
            _end_ray(group, processes or [c for c in psutil.Process().children() if c.pid not in before])
        raise
    url = context.dashboard_url
    cluster = Cluster(
        address=context.address_info["gcs_address"],
        dashboard_url=f"http://{url}" if url and dashboard else None,
        token_path=_token_path(),
        nodes=len(nodes),
        namespace=namespace,
        owned=address is None,
        placement=Placement(group, cpus_per_stage, gpus_per_stage, namespace),
        _processes=processes,
    )
    atexit.register(cluster.shutdown)
    return cluster


def _check_reachable(address: str) -> None:
    """A quick look whether anybody listens, because Ray itself tries for a long time."""
    if address == "auto":
        return
    match = re.fullmatch(r"(?P<host>[^/:]+|\[[0-9a-fA-F:]+\]):(?P<port>\d{1,5})", address)
    if not match or int(match["port"]) > 65535:
        raise UserError(f"ray.address '{address}' is not of the form host:port (or 'auto'), for example 10.0.0.5:6379")
    try:
        socket.create_connection((match["host"].strip("[]"), int(match["port"])), timeout=5).close()
    except OSError as fault:
        raise UserError(
            f"no Ray cluster answers at ray.address '{address}' ({fault.strerror or fault}); "
            "start one there with 'ray start --head', or leave ray.address empty for a local Ray"
        ) from fault


def _connect(options: dict[str, Any], address: str | None) -> Any:
    import ray

    try:
        return ray.init(**options)
    except Exception as fault:
        what = "a local Ray cannot be started" if address is None else f"the Ray cluster at '{address}' cannot be used"
        raise UserError(f"{what}: {first_line(fault)}") from fault


def _reserve(stages: int, cpus: float, gpus: float, strategy: str, nodes: list[dict[str, Any]], limit_s: float) -> Any:
    """A placement group with a bundle a stage, ready to use."""
    import ray
    from ray.exceptions import GetTimeoutError
    from ray.util import placement_group, remove_placement_group

    bundle = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    have = [{name: node["Resources"].get(name, 0.0) for name in bundle} for node in nodes]
    wanted = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    offered = "; ".join(", ".join(f"{amount:g} {name}" for name, amount in node.items()) for node in have)
    needs = f"{stages} stages of {wanted} each with placement strategy {strategy}"
    if not _fits(stages, bundle, strategy, have):
        raise UserError(f"{needs} do not fit on the {len(nodes)} node(s) of this Ray ({offered})")
    group = placement_group([bundle] * stages, strategy=strategy)
    try:
        ray.get(group.ready(), timeout=limit_s)
    except GetTimeoutError as late:
        remove_placement_group(group)
        raise UserError(
            f"{needs} got no place within {limit_s:g} s: the cluster ({offered}) is busy with other work"
        ) from late
    return group


def _fits(stages: int, bundle: dict[str, float], strategy: str, have: list[dict[str, float]]) -> bool:
    """Whether the bundles could be placed on nodes that do nothing else; no part of a GPU is of another GPU."""

    def places(name: str, offered: float, amount: float) -> int:
        if name == "GPU" and 0 < amount < 1:
            return int(offered) * int(1 / amount + 1e-6)
        return int(offered / amount + 1e-6) if amount else stages

    room = [min(places(name, node[name], amount) for name, amount in bundle.items()) for node in have]
    if strategy == "STRICT_PACK":
        return max(room, default=0) >= stages
    if strategy == "STRICT_SPREAD":
        return sum(count > 0 for count in room) >= stages
    return sum(room) >= stages


def _token_path() -> Path | None:
    """Where Ray keeps the token that its dashboard asks for (Ray's documented places)."""
    if os.environ.get("RAY_AUTH_MODE", "token") == "disabled" or os.environ.get("RAY_AUTH_TOKEN"):
        return None
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path if path.is_file() else None


def _end_ray(group: Any, processes: list[Any], limit_s: float = 10.0) -> None:
    """Ends the actors of our namespace, the placement group and the connection; then, if any, Ray's processes."""
    import psutil
    import ray
    from ray.util import list_named_actors, remove_placement_group

    family = [*processes]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            family += process.children(recursive=True)
    if ray.is_initialized():
        if not processes:
            handles = []
            for name in list_named_actors():
                with contextlib.suppress(ValueError):
                    handles.append(ray.get_actor(name))
            kill_all(handles, limit_s)
            end = time.monotonic() + limit_s
            while list_named_actors() and time.monotonic() < end:
                time.sleep(0.05)
            if group is not None:
                remove_placement_group(group)
        ray.shutdown()
    _, alive = psutil.wait_procs(family, timeout=limit_s)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=limit_s)


@contextlib.contextmanager
def _no_interrupt() -> Iterator[None]:
    """Holds off Ctrl-C; only the main thread can, and only it is asked."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, held)
