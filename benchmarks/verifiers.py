"""How many answers a second does the warm pool of verifiers judge, and what does it leave behind?

    python -m benchmarks.verifiers [--kinds json sql] [--verifications 10000] [--batch 800] [--actors 2]

Answers of mixed quality to the questions of the hard generators (SQL: levels 3 and 4, three databases each), 8 to each
question, go through the pool in batches, as a rollout hands them over once it has generated everything; no question
comes twice. Prints one JSON line a kind. A first batch warms the pool; processes, open files and private memory of
the pool (actors and all below them) and of this process are counted after it and after the last one.
`per_cpu_second` divides by the CPU time of these processes instead: on a machine that does nothing else the pool
reaches about that times the number of cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from actors import cluster
from actors.messages import RewardFunction, VerifierSettings
from actors.verifier import Verdict, VerifierPool, VerifyItem

KINDS = {"json": "json_extraction", "sql": "sql_execution"}
CANDIDATES = 8
FAULTS = 0.15
"""The probability of each fault that an answer may have; of several kinds, so that about a third have none."""

ANSWER_LIMIT_S = 5.0


def answers(kind: str, count: int, folder: Path, seed: int = 0) -> list[VerifyItem]:
    """Answers to judge, ``CANDIDATES`` to a question; the databases of SQL questions are written to the folder."""
    from ember_ray.data.demonstrations import DemonstrationMix, demonstrate
    from ember_ray.data.extraction import generate_examples
    from ember_ray.data.sql_demonstrations import SqlDemonstrationMix, SqlDemonstrator
    from ember_ray.data.sql_examples import generate_sql_examples

    rng = random.Random(seed)
    questions = -(-count // CANDIDATES)
    write: Any
    if kind == "json":
        examples = generate_examples("train", "hard", questions, seed)
        write, mix = demonstrate, DemonstrationMix(**_rates(DemonstrationMix))
    else:
        examples = generate_sql_examples("train", questions, seed, folder, levels=(3, 4))
        write, mix = SqlDemonstrator(), SqlDemonstrationMix(**_rates(SqlDemonstrationMix))
    items = []
    for example in examples:
        columns = example.reward_columns()
        for index in range(CANDIDATES):
            text = write(example, rng, mix)
            items.append(VerifyItem((example.id, index), example.messages, text, list(text.encode()), columns))
    return items[:count]


def _rates(mix: type) -> dict[str, float]:
    return {part.name: FAULTS for part in dataclasses.fields(mix)}


def judge(pool: VerifierPool, items: Sequence[VerifyItem]) -> list[Verdict]:
    """Hands all over at once and waits for the last verdict, as the coordinator does."""
    import ray

    pool.submit(items)
    verdicts: list[Verdict] = []
    while len(verdicts) < len(items):
        ready, _ = ray.wait(pool.waitables, num_returns=1, timeout=0.5)
        verdicts += pool.take(ready)
        verdicts += pool.late()
    return verdicts


def pool_processes() -> list[Any]:
    """The verifier actors and whatever they have started."""
    import psutil

    pool = []
    for child in psutil.Process().children(recursive=True):
        if "VerifierActor" in " ".join(child.cmdline()):
            pool += [child, *child.children(recursive=True)]
    return pool


def cpu_seconds() -> float:
    """CPU time that the pool and this process have used."""
    import psutil

    times = [process.cpu_times() for process in (psutil.Process(), *pool_processes())]
    return sum(time.user + time.system for time in times)


def footprint() -> dict[str, int]:
    """Processes, open files and private bytes of the pool, and files and bytes of this process."""
    import psutil

    # Private memory, since what a process has touched of Ray's object store counts as resident in each one.
    here, pool = psutil.Process(), pool_processes()
    return {
        "processes": len(pool),
        "open_files": sum(process.num_fds() for process in pool),
        "private_bytes": sum(process.memory_full_info().uss for process in pool),
        "driver_open_files": here.num_fds(),
        "driver_private_bytes": here.memory_full_info().uss,
    }


def measure(kind: str, verifications: int, batch: int, actors: int) -> dict[str, Any]:
    """One kind through a fresh pool; Ray must be up."""
    import psutil
    import ray

    batches = -(-verifications // batch)
    with tempfile.TemporaryDirectory() as folder:
        items = answers(kind, (batches + 1) * batch, Path(folder))
        files = sorted(os.listdir(folder))
        pool = VerifierPool(VerifierSettings((RewardFunction(KINDS[kind]),), actors), ANSWER_LIMIT_S)
        try:
            while not pool.ready:  # or one actor does all of the first batch, and the other is still cold
                pool.take(ray.wait(pool.waitables, timeout=0.5)[0])
                pool.late()
            judge(pool, items[:batch])
            before = footprint()
            seconds, rewards, exact = [], [], 0.0
            cpu = cpu_seconds()
            for number in range(1, batches + 1):
                begun = time.perf_counter()
                verdicts = judge(pool, items[number * batch : (number + 1) * batch])
                seconds.append(time.perf_counter() - begun)
                rewards += [verdict.reward for verdict in verdicts if verdict.reward is not None]
                exact += sum(verdict.components.get("exact_match", 0.0) for verdict in verdicts)
            cpu = cpu_seconds() - cpu
            after = footprint()
            processes = pool_processes()
        finally:
            pool.close()
        _, left = psutil.wait_procs(processes, timeout=10)
        judged = batches * batch
        return {
            "kind": kind,
            "actors": actors,
            "batch": batch,
            "verifications": judged,
            "per_second": round(judged / sum(seconds)),
            "per_second_median": round(batch / statistics.median(seconds)),
            "per_second_slowest_batch": round(batch / max(seconds)),
            "per_cpu_second": round(judged / cpu),
            "failures": judged - len(rewards),
            "replaced_actors": pool.replaced,
            "reward_mean": round(statistics.fmean(rewards), 4),
            "exact_match": round(exact / judged, 4),
            "left_processes": len(left),
            "new_files": sorted(set(os.listdir(folder)) - set(files)),
            "before": before,
            "after": after,
        }


def run(kinds: Sequence[str], verifications: int, batch: int, actors: int) -> Iterator[dict[str, Any]]:
    """A line of results for each kind, on a Ray of its own."""
    with cluster.start(1, run="benchmark", dashboard=False):
        for kind in kinds:
            yield measure(kind, verifications, batch, actors)


def main() -> None:
    from ember_ray.tracking.summary import git_state

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--verifications", type=int, default=10_000, help="of each kind, rounded up to whole batches")
    parser.add_argument("--batch", type=int, default=800)
    parser.add_argument("--actors", type=int, default=2)
    options = parser.parse_args()
    about = {
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "git_commit": git_state()[0],
    }
    for line in run(options.kinds, options.verifications, options.batch, options.actors):
        print(json.dumps(line | about), flush=True)


if __name__ == "__main__":
    sys.exit(main())
