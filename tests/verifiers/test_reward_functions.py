"""Reward functions as TRL calls them: ours in TRL, TRL's here; weights, faults, names."""

from __future__ import annotations

import asyncio
import functools
import math
import sqlite3
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifiers.judge import Batch, Judge, Judgement, TrainerState
from verifiers.reward_functions import (
    BUILT_IN,
    RewardFunction,
    completion_text,
    find_reward_function,
    json_extraction,
    sql_execution,
)

HERE = Path(__file__)


def own(name: str, weight: float = 1.0, **settings: object) -> RewardFunction:
    """A function of this file."""
    return RewardFunction(f"{HERE}:{name}", weight, settings)


def judge(
    functions: Sequence[RewardFunction], texts: Sequence[str], step: int = 0, chat: bool = True, **columns: list
) -> list[Judgement]:
    """Judges texts, each with its entry of every column and its length in tokens."""
    prompt = [{"role": "user", "content": "say"}] if chat else "say"
    rows = [{name: values[at] for name, values in columns.items()} for at in range(len(texts))]
    judging = Judge(functions)
    try:
        return judging.judge(
            Batch([prompt] * len(texts), texts, [[5] * len(text) for text in texts], rows), TrainerState(step)
        )
    finally:
        judging.close()


# Reward functions in TRL's manner.


def length(completions, **kwargs):
    return [float(len(completion[0]["content"])) for completion in completions]


def echo(prompts, completions, wish, **kwargs):
    """What the row wishes, a whole list at once."""
    return list(wish)


def sometimes(completions, wish, **kwargs):
    """Raises if any row of the batch wishes so, as a function does that takes batches."""
    if "raise" in wish:
        raise ArithmeticError("no such luck\nwith details")
    if "exit" in wish:
        raise SystemExit(3)
    return [2 for _ in completions]


async def tokens(completion_ids, wish=None, **kwargs):
    await asyncio.sleep(0)
    if wish is not None and "raise" in wish:
        raise ArithmeticError("no such luck")
    return [len(ids) for ids in completion_ids]


class Bound:
    """A callable instance, async, with a lock that belongs to the first event loop it is used in."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.loops: set[int] = set()

    async def __call__(self, completions, **kwargs):
        self.loops.add(id(asyncio.get_running_loop()))
        async with self.lock:
            await asyncio.sleep(0)
        return [1.0 / len(self.loops)] * len(completions)


bound = Bound()
partly = functools.partial(length, offset=1)
number = 3


def logging_function(completions, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("letters", [len(completion[0]["content"]) for completion in completions])
    log_extra("opinion", ["nice"] * len(completions))
    log_metric("step", trainer_state.global_step)
    log_metric("mixed", 1.0)
    log_metric("mixed", 2.0)
    return [0.5] * len(completions)


def short_list(completions, **kwargs):
    return [1.0] * (len(completions) - 1) if len(completions) > 1 else [1.0]


def one_number(completions, **kwargs):
    return 1.0


def asks_by_itself(completions, **kwargs):
    """Some synchronous functions run a loop of their own."""
    return [asyncio.run(asyncio.sleep(0, 4.0)) for _ in completions]


def without_kwargs(prompts, completions):
    return [0.0] * len(completions)


def records(**kwargs):
    records.seen = kwargs
    return [None] * len(kwargs["completions"])


# What they get.


def test_a_function_gets_what_trl_gives_it() -> None:
    import sys

    judge([own("records", flavour="sour")], ["a", "bc"], step=3, gold=[1, 2], prompt=["x", "y"], completion=["x", "y"])
    [module] = [module for name, module in sys.modules.items() if name.startswith(f"{HERE.stem}_")]
    seen = dict(module.records.seen)
    assert callable(seen.pop("log_extra")) and callable(seen.pop("log_metric"))
    assert seen.pop("trainer_state").global_step == 3
    assert seen == {
        "prompts": [[{"role": "user", "content": "say"}]] * 2,
        "completions": [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "bc"}]],
        "completion_ids": [[5], [5, 5]],
        "gold": [1, 2],
        "flavour": "sour",
    }
    judge([own("records")], ["a"], chat=False)
    assert module.records.seen["prompts"] == ["say"] and module.records.seen["completions"] == ["a"]


def test_functions_of_trl_work_as_they_are() -> None:
    text = "<think>\nwell\n</think>\nyes"
    found = judge([RewardFunction("trl.rewards:think_format_reward")], [text, "no"])
    assert [one.reward for one in found] == [1.0, 0.0]
    assert judge([own("partly")], ["abc"])[0].reward == 3.0


@pytest.mark.parametrize("name", ["bound", "tokens", "asks_by_itself"])
def test_async_functions_and_such_with_a_loop_of_their_own(name: str) -> None:
    judging = Judge([own(name), own("length")])
    batch = Batch([[]] * 2, ["a", "bcd"], [[1], [1, 2]], [{}, {}])
    for _ in range(2):
        found = [one.components[name] for one in judging.judge(batch)]
        assert found == {"bound": [1.0, 1.0], "tokens": [1.0, 2.0], "asks_by_itself": [4.0, 4.0]}[name]
    judging.close()


# What becomes of their results.


@given(
    st.lists(st.tuples(st.one_of(st.none(), st.floats(-9, 9)), st.one_of(st.none(), st.integers(-9, 9))), min_size=1),
    st.floats(-3, 3),
)
def test_the_reward_is_the_weighted_sum_of_what_applies(wishes: list[tuple], weight: float) -> None:
    functions = [own("echo", weight), own("tokens", 2.0)]
    found = judge(functions, ["abc"] * len(wishes), wish=[wish for wish, _ in wishes])
    for one, (wish, _) in zip(found, wishes, strict=True):
        assert one.reward == pytest.approx(6.0 + (0.0 if wish is None else weight * wish))
        assert one.components == {"tokens": 3.0} | ({} if wish is None else {"echo": wish})
    alone = judge(functions[:1], ["abc"] * len(wishes), wish=[wish for wish, _ in wishes])
    for one, (wish, _) in zip(alone, wishes, strict=True):
        assert (one.reward is None) == (wish is None) == (one.reason == "no reward function applies")


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        (math.nan, "the reward is nan"),
        (math.inf, "the reward is inf"),
        ("0.5", "the reward is '0.5', not a number"),
        ([1.0], "the reward is '[1.0]', not a number"),
        (10**400, "not a number"),
    ],
)
def test_a_result_that_is_no_number_costs_its_candidate_alone(wish: object, reason: str) -> None:
    found = judge([own("echo"), own("tokens")], ["a", "b", "c"], wish=[1, wish, True])
    assert [one.reward for one in found] == [2.0, None, 2.0]
    assert found[1].reason.startswith("echo: ") and reason in found[1].reason
    assert found[1].components == {"tokens": 1.0}


def test_numbers_of_numpy_are_numbers() -> None:
    import numpy

    wishes = [numpy.float32(0.5), numpy.int64(2), numpy.array(0.25), numpy.array([1.0, 2.0])]
    assert [one.reward for one in judge([own("echo")], "abcd", wish=wishes)] == [0.5, 2.0, 0.25, None]


@pytest.mark.parametrize(("name", "ends"), [("sometimes", "raise"), ("sometimes", "exit"), ("tokens", "raise")])
def test_a_function_that_raises_loses_only_the_candidates_it_raises_for(name: str, ends: str) -> None:
    found = judge([own(name), own("length")], ["aa"] * 4, wish=["", ends, "", ends])
    assert [one.reward for one in found] == [4.0, None, 4.0, None]
    wanted = "SystemExit: 3" if ends == "exit" else "ArithmeticError: no such luck"
    assert found[1].reason == f"{name}: the reward function failed: {wanted}"
    assert found[1].components == {"length": 2.0}


def test_a_wrong_number_of_results_is_a_fault() -> None:
    assert [one.reward for one in judge([own("short_list")], ["a", "b", "c"])] == [1.0] * 3  # right when alone
    for found in judge([own("one_number")], ["a", "b"]):
        assert found.reward is None and "returned a float, not a list" in found.reason
    [found] = judge([own("echo")], ["a"], wish=[1.0])
    assert found.reward == 1.0
    judging = Judge([RewardFunction("verifiers.reward_functions:json_extraction")])
    [found] = judging.judge(Batch(["say"], ["{}"], [[1]], [{"gold": {}, "schema": None}]))
    assert found.reward == 1.0
    judging.close()


def test_a_row_without_a_column_that_is_needed_is_told() -> None:
    judging = Judge([own("echo"), own("length")])
    assert judging.required_columns == {"echo": ("wish",), "length": ()}
    found = judging.judge(Batch([[]] * 3, ["a", "b", "c"], [[]] * 3, [{"wish": 1}, {}, {"wish": 2}]))
    assert [one.reward for one in found] == [2.0, None, 3.0]
    assert "the row has no column 'wish', which reward function 'echo' needs" in found[1].reason
    judging.close()


def test_what_functions_log_are_components() -> None:
    found = judge([own("logging_function")], ["a", "bcd"], step=4)
    assert found[1] == Judgement(0.5, {"letters": 3.0, "step": 4.0, "mixed": 1.5})


def test_a_sum_beyond_a_float_is_no_reward() -> None:
    [found] = judge([own("echo", 1e300)], ["a"], wish=[1e300])
    assert found.reward is None and "inf" in found.reason


# Our own functions, here and in TRL.


@pytest.fixture
def database(tmp_path: Path) -> str:
    with sqlite3.connect(tmp_path / "shop.db") as connection:
        connection.execute("CREATE TABLE item (name TEXT, price INT)")
        connection.executemany("INSERT INTO item VALUES (?, ?)", [("lamp", 3), ("chair", 5)])
    connection.close()
    return str(tmp_path / "shop.db")


def test_our_functions_keep_their_components_names_beside_a_users() -> None:
    functions = [RewardFunction("json_extraction", settings={"design": "binary"}), own("length", 0.0)]
    found = judge(functions, ['{"a": 1}', "none"], gold=[{"a": 1}] * 2)
    assert [one.reward for one in found] == [1.0, 0.0]
    assert found[0].components["exact_match"] == 1.0 == found[0].components["json_extraction"]
    assert found[0].components["length"] == 8.0 and found[1].reason.startswith("json_extraction: ")
    alone = judge(functions[:1], ['{"a": 1}'], gold=[{"a": 1}])
    assert set(alone[0].components) == {
        "parse", "schema", "fields", "precision", "recall", "f1", "exact_match", "clean",
    }  # fmt: skip


def test_sql_is_judged_by_its_result_and_a_faulty_gold_is_nobodys_reward(database: str) -> None:
    texts = ["SELECT name FROM item WHERE price > 4", "SELECT price FROM item", "SELECT 1"]
    golds = ["SELECT name FROM item WHERE price = 5"] * 2 + ["SELECT nothing FROM nowhere"]
    functions = [RewardFunction("sql_execution", settings={"design": "binary"})]
    found = judge(functions, texts, gold=golds, databases=[[database]] * 3)
    assert [one.reward for one in found] == [1.0, 0.0, None]
    assert found[1].components["execute"] == 1.0 and "gold query" in found[2].reason
    logged: dict[str, float] = {}
    arguments = {"completions": texts, "gold": golds, "databases": [[database]] * 3, "log_metric": logged.__setitem__}
    assert sql_execution(prompts=["q"] * 3, design="binary", trainer_state=None, **arguments) == [1.0, 0.0, None]
    assert logged["sql_execution/exact_match"] == 0.5


def test_in_trl_our_functions_give_numbers_and_log_their_components() -> None:
    logged: dict[str, float] = {}
    rewards = json_extraction(
        prompts=["p"] * 2,
        completions=[[{"role": "assistant", "content": '{"a": 1}'}], [{"role": "assistant", "content": "none"}]],
        completion_ids=[[1], [2]],
        gold=[{"a": 1}, {"a": 1}],
        trainer_state=None,
        log_extra=print,
        log_metric=logged.__setitem__,
    )
    assert rewards == [1.0, 0.0]
    assert logged["json_extraction/exact_match"] == 0.5


def test_a_completion_as_text() -> None:
    assert completion_text("plain") == "plain"
    parts = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, {"content": None}]
    assert completion_text([*parts, {"content": "b"}]) == "ab"


# Names.


def test_names() -> None:
    assert find_reward_function("json_extraction") is BUILT_IN["json_extraction"]
    assert find_reward_function("verifiers.reward_functions:json_extraction") is json_extraction
    file = f"{HERE}:length"
    assert find_reward_function(file) is find_reward_function(file)
    assert find_reward_function(f"{HERE}:bound") is not bound  # an import of its own
    assert RewardFunction("own/rewards.py:length").name == f"{Path.cwd()}/own/rewards.py:length"


def test_a_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "its_neighbour.py").write_text("factor = 3.0")
    (tmp_path / "rewards.py").write_text(
        textwrap.dedent(
            """
            from dataclasses import dataclass
            from its_neighbour import factor

            @dataclass
            class Settings:
                factor: "float" = factor

            def triple(completions, **kwargs):
                return [Settings().factor for _ in completions]
            """
        )
    )
    assert judge([RewardFunction(f"{tmp_path}/rewards.py:triple")], ["a"])[0].reward == 3.0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nonsense", "no reward function 'nonsense'"),
        ("no_such_module:f", "cannot be loaded: ModuleNotFoundError"),
        ("math:no_such_function", "cannot be loaded: AttributeError"),
        ("/no/such/file.py:f", "there is no file /no/such/file.py"),
        (f"{HERE}:number", "is of type int"),
        (f"{HERE}:Bound", "is a class"),
        (f"{HERE}:without_kwargs", r"must take \*\*kwargs"),
        ("math:sqrt", r"must take \*\*kwargs"),
        (":f", "no reward function ':f'"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as fault:
        Judge([RewardFunction(name)])
    assert f"'{name}'" in str(fault.value)


def test_a_file_that_fails_is_told_and_can_be_mended(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("def length(completions, **kwargs:\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be loaded: SyntaxError"):
            find_reward_function(f"{file}:length")
    file.write_text("def length(completions, **kwargs):\n    return [1.0]\n")
    assert find_reward_function(f"{file}:length")([]) == [1.0]


def test_functions_that_cannot_be_meant() -> None:
    for weight in (math.nan, math.inf, "1", True):
        with pytest.raises(ValueError, match="weight of reward function 'json_extraction'"):
            RewardFunction("json_extraction", weight)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'prompts'"):
        RewardFunction("json_extraction", settings={"prompts": []})
    with pytest.raises(ValueError, match="named twice"):
        Judge([own("length"), own("length", 2.0)])
    with pytest.raises(ValueError, match="at least one"):
        Judge([])
