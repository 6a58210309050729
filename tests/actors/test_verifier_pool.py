"""A bad candidate costs the verifier pool only itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors import cluster as clusters
from actors.messages import RewardFunction, VerifierSettings
from actors.verifier import Verdict, VerifierPool, VerifyItem

ODD = "odd_verifier:verify"


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # for the odd verifier
        with clusters.start(1, run="test", dashboard=False):
            yield


@pytest.fixture
def make_pool(ray_session: None) -> Iterator[Callable[..., VerifierPool]]:
    pools: list[VerifierPool] = []

    def make(*names: str, actors: int = 2, limit_s: float = 20.0, **settings: object) -> VerifierPool:
        functions = tuple(RewardFunction(name, 1.0, settings) for name in names or (ODD,))
        pools.append(VerifierPool(VerifierSettings(functions, actors), limit_s))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def items(golds: Sequence[object]) -> list[VerifyItem]:
    return [
        VerifyItem(("row", index), "", "x" * index, [7] * index, {"gold": gold}) for index, gold in enumerate(golds)
    ]


def collect(pool: VerifierPool, count: int, limit_s: float = 60.0) -> dict[int, Verdict]:
    """Verdicts by index; every item has exactly one."""
    import ray

    found: dict[int, Verdict] = {}
    end = time.monotonic() + limit_s
    while len(found) < count:
        assert time.monotonic() < end, f"{len(found)} of {count} verdicts in {limit_s} s"
        ready, _ = ray.wait(pool.waitables, timeout=0.1)
        for verdict in [*pool.take(ready), *pool.late()]:
            assert verdict.key[1] not in found
            found[verdict.key[1]] = verdict
    return found


@pytest.mark.slow
class TestPool:
    def test_every_item_gets_its_verdict(self, make_pool) -> None:
        pool = make_pool(reward=0.25)
        pool.submit(items(["good"] * 100))
        found = collect(pool, 100)
        assert all(
            found[index] == Verdict(("row", index), 0.25, {"length": float(index)}, None) for index in range(100)
        )
        assert pool.replaced == 0

    def test_settings_and_schema_reach_the_json_verifier(self, make_pool) -> None:
        from verifiers.json_extraction import RewardDesign

        pool = make_pool("json_extraction", design=RewardDesign("binary"))
        schema = {"type": "object", "required": ["total"], "properties": {"total": {"type": "number"}}}
        columns = {"gold": {"total": 3}, "schema": schema}
        chat = [{"role": "user", "content": "How much?"}]
        texts = ['{"total": 3}', '{"total": 4}', "none"]
        pool.submit([VerifyItem(("row", place), chat, text, [1], columns) for place, text in enumerate(texts)])
        found = collect(pool, 3)
        assert [found[place].reward for place in range(3)] == [1.0, 0.0, 0.0]
        assert found[1].components["schema"] == 1.0 and found[2].reason

    def test_several_functions_are_added_up_and_see_tokens_and_round(self, make_pool) -> None:
        pool = make_pool(ODD, "odd_verifier:length")
        pool.submit(items(["good", "good", "fail"]), global_step=17)
        found = collect(pool, 3)
        assert found[1].reward == pytest.approx(1.1)
        assert found[1].components == {"verify/length": 1.0, "verify": 1.0, "length": 0.1, "length/step": 17.0}
        assert found[0].reward == 1.0 and "length" not in found[0].components
        assert found[2].reward is None and "no such field" in found[2].reason

    def test_a_function_that_waits_gets_ever_more_at_once(self, make_pool) -> None:
        pool = make_pool("odd_verifier:waiting", actors=1)
        pool.submit(items(["good"] * 64))
        batches = {verdict.components["batch"] for verdict in collect(pool, 64).values()}
        assert 1.0 in batches and max(batches) >= 8.0

    def test_failures_cost_one_candidate_each(self, make_pool) -> None:
        pool = make_pool()
        pool.submit(items(["good", "fail", "good", "nan", "inf", "good"]))
        found = collect(pool, 6)
        assert [found[place].reward for place in range(6)] == [1.0, None, 1.0, None, None, 1.0]
        assert "KeyError" in str(found[1].reason)
        assert "reward is nan" in str(found[3].reason) and "reward is inf" in str(found[4].reason)
        assert pool.replaced == 0

    def test_a_verifier_that_hangs_is_cut_off(self, make_pool) -> None:
        pool = make_pool(actors=1, limit_s=2.0)
        pool.submit(items(["good", "hang", "good", "good"]))
        found = collect(pool, 4)
        assert [found[place].reward for place in range(4)] == [1.0, None, 1.0, 1.0]
        assert "longer than 2 s" in str(found[1].reason)

    def test_a_hang_among_many_is_found_and_costs_nobody_else(self, make_pool) -> None:
        pool = make_pool(limit_s=2.0)
        pool.submit(items(["good"] * 300 + ["hang"] + ["good"] * 300))
        found = collect(pool, 601)
        assert [place for place in range(601) if found[place].reward is None] == [300]
        assert "longer than 2 s" in str(found[300].reason)
        assert pool.replaced == 2  # the actor of the chunk, and that of the one alone

    def test_a_candidate_that_kills_its_verifier_twice_is_given_up(self, make_pool) -> None:
        pool = make_pool(actors=1)
        pool.submit(items(["good"] * 4 + ["die"] + ["good"] * 4))
        found = collect(pool, 9)
        assert [found[place].reward for place in range(9)] == [1.0] * 4 + [None] + [1.0] * 4
        assert "died twice" in str(found[4].reason)
        assert pool.replaced == 2

    def test_a_process_that_dies_once_costs_nothing(self, make_pool, tmp_path) -> None:
        pool = make_pool(actors=1)
        for wishes in (["good", f"die once {tmp_path / 'among others'}", "good"], [f"die once {tmp_path / 'alone'}"]):
            pool.submit(items(wishes))
            assert [verdict.reward for verdict in collect(pool, len(wishes)).values()] == [1.0] * len(wishes)
        assert pool.replaced == 2

    def test_a_verifier_killed_from_outside_is_replaced(self, make_pool) -> None:
        import ray

        pool = make_pool(actors=1)
        while not pool.ready:
            pool.take(ray.wait(pool.waitables, timeout=1)[0])
        pool.submit(items(["slow"] * 20))
        (worker,) = [child for child in _children() if "VerifierActor" in _command(child)]
        os.kill(worker.pid, signal.SIGKILL)
        found = collect(pool, 20)
        assert all(verdict.reward == 1.0 for verdict in found.values())
        assert pool.replaced == 1

    def test_a_verdict_that_came_while_nobody_looked_is_not_late(self, make_pool) -> None:
        import ray

        pool = make_pool(actors=1, limit_s=1.0)
        while not pool.ready:
            pool.take(ray.wait(pool.waitables, timeout=1)[0])
        pool.submit(items(["good"] * 3))
        time.sleep(1.5)
        assert pool.late() == []
        assert [verdict.reward for verdict in collect(pool, 3).values()] == [1.0] * 3

    def test_what_is_cleared_is_not_judged(self, make_pool) -> None:
        pool = make_pool(actors=1)
        pool.submit(items(["slow"] * 20))
        collect(pool, 1)
        pool.clear()
        pool.submit([VerifyItem(("next", 0), "", "", [], {"gold": "good"})])
        assert [verdict.key for verdict in collect(pool, 1).values()] == [("next", 0)]

    def test_an_unknown_function_is_an_error_at_once(self, make_pool) -> None:
        pool = make_pool("nonsense", actors=1)
        with pytest.raises(ValueError, match="no reward function 'nonsense'"):
            collect(pool, 1)


def _command(process: Any) -> str:
    """Its command line; empty for one that has ended meanwhile."""
    import psutil

    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # ended; a zombie is one too
        return ""


def _children() -> list:
    import psutil

    return psutil.Process().children(recursive=True)
