"""Which rounds a run has, and what it does when the learner is lost: the driver's part, without Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import recipes.run
from actors.calls import ActorLost, UpdateLost
from ember_ray.config.schema import GrpoExtractConfig, LearnConfig, SftExtractConfig
from ember_ray.tracking.console import Console
from ember_ray.train.adapter_learner import STATE_FILE
from recipes.learners import GRPO, SFT, Algorithm
from recipes.run import MOST_REVIVALS, Run


def make_run(folder: Path, algorithm: Algorithm, kind: type[LearnConfig], **more: Any) -> Run:
    values = {"output_dir": str(folder), "tracker": "none", **more}
    values["data"] = {"train_examples": 64, "eval_prompts": 2}
    return Run(kind.model_validate(values), algorithm, Console())


def test_sft_takes_the_rows_a_round_that_it_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, SFT, SftExtractConfig, rounds=3, sft={"rows_per_round": 20})
    assert [len(rows) for _, rows in run.rounds()] == [20, 20, 20]


class Meter:
    """A session that only counts; every prompt costs as many tokens as `cost` says of its place in the run."""

    def __init__(self, cost: Callable[[int], int]) -> None:
        self.cost = cost
        self.trained_prompts = self.trained_tokens = self.pending_prompts = 0

    def begin(self, prompts: int) -> None:
        self.pending_prompts += prompts

    def end(self, prompts: int) -> None:
        for _ in range(prompts):
            self.trained_tokens += self.cost(self.trained_prompts)
            self.trained_prompts += 1
        self.pending_prompts -= prompts


def budgeted(folder: Path, ahead: int, cost: Callable[[int], int], budget: int, stop: int = 10**6) -> tuple[Run, Any]:
    """The sizes of a run's rounds; with ``stop`` it is cut off after so many."""
    rollout = {"prompts_per_round": 16, "token_budget": budget}
    run = make_run(folder, GRPO, GrpoExtractConfig, rounds=50, rollout=rollout)
    run.session = meter = Meter(cost)  # type: ignore[assignment]
    return run, rounds_of(run, meter, ahead, stop)


def rounds_of(run: Run, meter: Meter, ahead: int, stop: int = 10**6) -> list[int]:
    sizes: list[int] = []
    waiting: deque[int] = deque()
    for number, rows in run.rounds():
        meter.begin(len(rows))
        waiting.append(len(rows))
        sizes.append(len(rows))
        if len(waiting) > ahead:
            meter.end(waiting.popleft())
        if number == stop:
            break
    while waiting:
        meter.end(waiting.popleft())
    return sizes


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_budget_counts_rollouts_that_run_ahead(ahead: int, tmp_path: Path) -> None:
    run, sizes = budgeted(tmp_path, ahead, lambda place: 100, budget=100 * 72)
    assert sizes == [16, 16, 16, 16, 8]


def test_one_round_is_cut_to_the_budget_and_none_comes_after_it(tmp_path: Path) -> None:
    def cheaper(place: int) -> int:
        return 100 if place < 32 else 70  # so the cut round leaves some of the budget

    run, sizes = budgeted(tmp_path / "whole", 0, cheaper, budget=4000)
    assert sizes == [16, 16, 8]
    assert run.session.trained_tokens < 4000

    resumed, first = budgeted(tmp_path / "resumed", 0, cheaper, budget=4000, stop=3)
    resumed.rounds_done = 3
    assert first == sizes and rounds_of(resumed, resumed.session, 0) == []  # type: ignore[arg-type]


class Learner:
    """Counts rounds and keeps the count in a file, as the learner's state. It is lost at the calls named."""

    def __init__(self, losses: list[str]) -> None:
        self.losses, self.rounds = losses, 0

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: (self, name, arguments))

    def answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if self.losses and self.losses[0] == name:
            self.losses.pop(0)
            raise (UpdateLost if name == "adapter_update" else ActorLost)(f"{name} was cut off")
        if name == "learn":
            self.rounds += 1
        elif name == "save_state":
            (arguments[0] / STATE_FILE).write_text(str(self.rounds))
            if self.losses and self.losses[0] == "save_state, written":
                self.losses.pop(0)
                raise ActorLost("save_state was cut off")
        elif name == "load_state":
            self.rounds = int((arguments[0] / STATE_FILE).read_text())
        return self.rounds


class Actors:
    """A session that asks the learner and nobody else."""

    policy_version = 0

    def __init__(self, losses: list[str]) -> None:
        self.losses = losses

    def __enter__(self) -> Actors:
        return self

    def __exit__(self, *fault: object) -> None:
        pass

    def ready(self) -> None:
        pass

    def count(self, row: Any) -> None:
        pass

    def call(self, phase: str, ref: Any) -> Any:
        return ref[0].answer(*ref[1:])

    def publish(self, ref: Any) -> None:
        if self.losses[:1] == ["coordinator"]:
            raise ActorLost("the coordinator was cut off")
        ref[0].answer(*ref[1:])
        self.policy_version = ref[2][0]


@pytest.fixture
def run_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    def make(*losses: str) -> Run:
        left = list(losses)
        monkeypatch.setattr(recipes.run, "start_learner", lambda *_: Learner(left))
        run = make_run(tmp_path, SFT, SftExtractConfig, rounds=3, sft={"rows_per_round": 8})
        run.learner_path.mkdir()
        run.session = Actors(left)  # type: ignore[assignment]
        monkeypatch.setattr(recipes.run, "Session", lambda *_: run.session)
        run._make_learner()
        run._start_learner()
        return run

    return make


@pytest.mark.parametrize("lost", ["learn", "save_adapter", "save_state", "save_state, written"])
@pytest.mark.parametrize("again", ["", "start", "load_state", "learn"])
def test_a_round_is_learnt_once_wherever_the_learner_is_lost(
    lost: str, again: str, run_with: Callable[..., Run]
) -> None:
    run = run_with()
    assert run.session.losses == []  # type: ignore[attr-defined]
    for number in (1, 2):
        if number == 2:
            run.session.losses += [lost, *([again] if again else [])]  # type: ignore[attr-defined]
        run.learn([number])
        run.record(number, {"loss": 0.0})
    assert run.learner.rounds == 2
    assert (run.learner_path / STATE_FILE).read_text() == "2"


def test_a_learner_that_is_lost_again_and_again_ends_the_run(run_with: Callable[..., Run]) -> None:
    run = run_with(*["learn"] * (MOST_REVIVALS + 1))
    with pytest.raises(ActorLost):
        run.learn([1])


@pytest.mark.parametrize("lost", ["start", "adapter_update"])
def test_a_run_outlives_the_loss_of_a_learner_that_has_learnt_nothing(
    lost: str, run_with: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_with()
    run.first_version = 1
    monkeypatch.setattr(run, "_evaluate", lambda when: ([], []))
    run.session.losses.append(lost)  # type: ignore[attr-defined]
    run.run(lambda run: None)
    assert run.session.losses == [] and run.session.policy_version == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("lost", ["load_state", "adapter_update"])
def test_a_run_is_resumed_also_if_the_learner_is_lost_meanwhile(lost: str, run_with: Callable[..., Run]) -> None:
    run = run_with()
    (run.learner_path / STATE_FILE).write_text("2")
    for number in (1, 2):
        run.folder.append_metrics({"round": number, "policy_version": number})
    run.session.losses.append(lost)  # type: ignore[attr-defined]
    run._go_on()
    assert run.session.losses == []  # type: ignore[attr-defined]
    assert (run.rounds_done, run.learner.rounds, run.session.policy_version) == (2, 2, 2)


def test_the_loss_of_another_actor_is_not_taken_for_the_learners(run_with: Callable[..., Run]) -> None:
    run = run_with()
    run.session.losses.append("coordinator")  # type: ignore[attr-defined]
    learner = run.learner
    with pytest.raises(ActorLost, match="the coordinator"):
        run.publish(1)
    assert run.learner is learner


def test_a_run_that_ended_while_its_first_state_was_written_begins_anew(run_with: Callable[..., Run]) -> None:
    run = run_with()
    run.folder.append_metrics({"round": 1, "policy_version": 1})
    (run.learner_path / f".{STATE_FILE}.123").write_text("half")
    run._go_on()
    assert run.rounds_done == 0
    assert (run.folder.path / "metrics.jsonl").read_text() == ""
