"""Which rounds a run has, and what it does when the learner is lost: the driver's part, without Ray."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import recipes.run
from actors.calls import ActorLost, UpdateLost
from actors.messages import RolloutResult, RolloutStats, added
from ember_ray.config.schema import GrpoExtractConfig, LearnConfig, SftExtractConfig
from ember_ray.data.scored_group import ScoredGroup
from ember_ray.model.lora import AdapterUpdate
from ember_ray.tracking.console import Console
from ember_ray.train.adapter_learner import STATE_FILE
from recipes.learners import GRPO, SFT, Algorithm
from recipes.run import MOST_REVIVALS, Run
from recipes.session import Session


def make_run(folder: Path, algorithm: Algorithm, kind: type[LearnConfig], **more: Any) -> Run:
    values = {"output_dir": str(folder), "tracker": "none", **more}
    values["data"] = {"train_examples": 64, "eval_prompts": 2}
    run = Run(kind.model_validate(values), algorithm, Console())
    run.learner_path.mkdir(exist_ok=True)
    run.session = Actors([])  # type: ignore[assignment]
    return run


def test_sft_takes_the_rows_a_round_that_it_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path, SFT, SftExtractConfig, rounds=3, sft={"rows_per_round": 20})
    assert [len(rows) for _, rows in run.rounds()] == [20, 20, 20]


class Simulated:
    """A session whose rollouts are over at once. Every prompt costs as many tokens as `cost` says of its place in the
    run; of each rollout the first `refilled` prompts are replaced. The version `taken` was another adapter's before."""

    def __init__(self, cost: Callable[[int], int], refilled: int = 0, taken: int = 0) -> None:
        self.cost, self.refilled, self.taken = cost, refilled, taken
        self.totals = RolloutStats()
        self.policy_version = self.trained_prompts = self.trained_tokens = self.pending_prompts = self.rolled = 0

    begun, ended, coordinator = Session.begun, Session.ended, None

    def call(self, phase: str, ref: Any) -> Any:
        return ref[0].answer(*ref[1:])

    def publish(self, update: Any, in_flight: bool = False) -> None:
        version = update.version if isinstance(update, AdapterUpdate) else update[2][0]
        if self.taken:  # as the journal numbers
            version = self.taken + 1 if version == self.taken else max(version, self.policy_version + 1)
        assert version > self.policy_version
        self.policy_version = version

    def rollout(self, prompts: int, place: int) -> RolloutResult:
        rolled = prompts + min(prompts, self.refilled)
        tokens = sum(self.cost(place + number) for number in range(rolled))
        stats = RolloutStats(candidates=8 * rolled, generated_tokens=tokens, policy_version=self.policy_version)
        self.totals = added(self.totals, stats)
        return RolloutResult([ScoredGroup(str(number), "", (), []) for number in range(prompts)], stats)


Rounds = list[tuple[int, int, int]]


def simulate(run: Run, session: Simulated, stop: int = 10**6) -> Rounds:
    """Number, prompts and policy version of the rounds that a run begins; it ends after `stop` whole ones."""
    rounds: Rounds = []
    waiting: deque[tuple[int, RolloutResult]] = deque()
    run.session = session  # type: ignore[assignment]
    run.learner = Learner([])
    if run.config.resume:
        run._go_on()

    def learn(number: int, result: RolloutResult) -> None:
        session.ended(len(result.groups), result.stats.candidates // 8, result.stats.generated_tokens)
        run.learn([number])
        run.publish(number)
        run.record(number, {}, result)

    for number, rows in run.rounds():
        rounds.append((number, len(rows), session.policy_version))
        session.begun(len(rows))
        waiting.append((number, session.rollout(len(rows), 100 * number)))
        if len(waiting) > run._ahead:
            learn(*waiting.popleft())
        if run.rounds_done == stop:
            return rounds
    while waiting and run.rounds_done < stop:
        learn(*waiting.popleft())
    return rounds


def budgeted(folder: Path, ahead: int, budget: int | None, rounds: int = 50, **more: Any) -> Run:
    rollout = {"prompts_per_round": 16, "token_budget": budget}
    return make_run(
        folder, GRPO, GrpoExtractConfig, rounds=rounds, rollout=rollout, grpo={"async_steps": ahead}, **more
    )


def sizes(rounds: Rounds) -> list[int]:
    return [size for _, size, _ in rounds]


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_the_budget_counts_rollouts_that_run_ahead(ahead: int, tmp_path: Path) -> None:
    run = budgeted(tmp_path, ahead, 100 * 72)
    assert sizes(simulate(run, Simulated(lambda place: 100))) == [16, 16, 16, 16, 8]


def cheaper(place: int) -> int:
    return 100 if place < 300 else 70  # so the cut round leaves some of the budget


def test_one_round_is_cut_to_the_budget_and_none_comes_after_it(tmp_path: Path) -> None:
    session = Simulated(cheaper)
    assert sizes(simulate(budgeted(tmp_path, 0, 4000), session)) == [16, 16, 8]
    assert session.trained_tokens < 4000


@pytest.mark.parametrize("refilled", [0, 5])
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_resumed_run_begins_the_rounds_that_were_to_come_as_they_were_to_be(
    ahead: int, refilled: int, tmp_path: Path
) -> None:
    """Wherever it was cut off: with as many prompts, and under the versions that the engine had then."""
    for budget, most in ((9000, 50), (None, 4)):
        whole = simulate(budgeted(tmp_path / "whole", ahead, budget, most), Simulated(cheaper, refilled))
        assert [version for _, _, version in whole] == [max(0, number - 1 - ahead) for number, _, _ in whole]
        for stop in range(1, len(whole) + 1):
            run = budgeted(tmp_path / "cut", ahead, budget, most)
            first = Simulated(cheaper, refilled)
            simulate(run, first, stop)
            again = budgeted(tmp_path / "cut", ahead, budget, most, resume=str(run.folder.path))
            session = Simulated(cheaper, refilled)
            assert simulate(again, session) == whole[stop:]
            assert (again.rounds_done, session.policy_version, again.learner.rounds) == (len(whole),) * 3
            kept = {int(path.name.removeprefix("policy_v")) for path in again.learner_path.glob("policy_v*")}
            assert kept == (set(range(len(whole) - ahead, len(whole) + 1)) if ahead else set())


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_resumed_run_finds_its_policies_where_a_number_was_left_out(ahead: int, tmp_path: Path) -> None:
    whole = simulate(budgeted(tmp_path / "whole", ahead, None, 5), Simulated(cheaper, taken=2))
    assert [version for _, _, version in whole] == [0] * (1 + ahead) + [1, 3, 4][: 4 - ahead]
    for stop in range(1, len(whole) + 1):
        run = budgeted(tmp_path / "cut", ahead, None, 5)
        simulate(run, Simulated(cheaper, taken=2), stop)
        again = budgeted(tmp_path / "cut", ahead, None, 5, resume=str(run.folder.path))
        assert simulate(again, Simulated(cheaper, taken=2)) == whole[stop:]


def write_adapter(folder: Path) -> None:
    """A PEFT folder of one matrix."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    names = [f"base_model.model.model.layers.0.self_attn.q_proj.lora_{half}.weight" for half in "AB"]
    save_file({names[0]: torch.ones(1, 2), names[1]: torch.ones(2, 1)}, folder / "adapter_model.safetensors")


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
        elif name == "save_adapter" and arguments[0].name.startswith("policy_v"):
            write_adapter(arguments[0])
        elif name == "load_state":
            self.rounds = int((arguments[0] / STATE_FILE).read_text())
        return self.rounds


class Actors:
    """A session that asks the learner and nobody else."""

    policy_version, coordinator, stages_are_here = 0, None, False
    totals = RolloutStats()

    def __init__(self, losses: list[str]) -> None:
        self.losses = losses

    def __enter__(self) -> Actors:
        return self

    def __exit__(self, *fault: object) -> None:
        pass

    def ready(self) -> None:
        pass

    def call(self, phase: str, ref: Any) -> Any:
        return ref[0].answer(*ref[1:])

    def publish(self, ref: Any, in_flight: bool = False) -> None:
        if self.losses[:1] == ["coordinator"]:
            raise ActorLost("the coordinator was cut off")
        ref[0].answer(*ref[1:])
        self.policy_version = ref[2][0]


@pytest.fixture
def run_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    def make(*losses: str, sharing: bool = False) -> Run:
        left = list(losses)
        monkeypatch.setattr(recipes.run, "start_learner", lambda *_: Learner(left))
        run = make_run(tmp_path, SFT, SftExtractConfig, rounds=3, sft={"rows_per_round": 8})
        run.session = (Sharing if sharing else Actors)(left)  # type: ignore[assignment]
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
    assert [number for number, _ in run.rounds()] == [3]
    assert run.session.losses == []  # type: ignore[attr-defined]
    assert (run.rounds_done, run.learner.rounds, run.session.policy_version) == (2, 2, 2)


def test_the_loss_of_another_actor_is_not_taken_for_the_learners(run_with: Callable[..., Run]) -> None:
    run = run_with()
    run.session.losses.append("coordinator")  # type: ignore[attr-defined]
    learner = run.learner
    with pytest.raises(ActorLost, match="the coordinator"):
        run.publish(1)
    assert run.learner is learner


def test_a_run_that_has_learnt_nothing_says_so_at_its_end(
    run_with: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with()

    def end_after(steps: int) -> Any:
        run.learn([])
        run.record(run.rounds_done + 1, {"steps": steps})
        run.finish("finished")
        return json.loads((run.folder.path / "summary.json").read_text())

    summary = end_after(0)
    assert summary["status"] == "finished" and summary["steps"] == 0
    assert "no round gave demonstrations to learn from" in summary["warning"]
    assert "NOTHING WAS LEARNT" in " ".join(capsys.readouterr().out.split())
    assert "NOTHING WAS LEARNT" in (run.folder.path / "report.html").read_text()
    run._go_on()  # a resumed run knows what was learnt before it
    assert run.steps == 0
    summary = end_after(3)
    assert summary["steps"] == 3 and summary["warning"] is None
    run._go_on()
    assert run.steps == 3


class Sharing(Actors):
    """As `Actors`, with stages whose base weights the learner uses. They are made anew where ``stage`` is next to be
    lost, before the learner is asked, or ``stage, under it``, when it fails for that; else it only fails."""

    stages_are_here, lost = True, 0

    def recoveries(self) -> int:
        if self.losses[:1] == ["stage"]:
            self.losses.pop(0)
            self.lost += 1
        return self.lost

    def base_weights(self) -> list[Any]:
        return [{"weight": self.lost}]

    def call(self, phase: str, ref: Any) -> Any:
        if ref[1] == "learn" and self.losses[:1] in (["stage, under it"], ["nothing"]):
            self.lost += self.losses.pop(0) != "nothing"
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if ref[1] in ("start", "open_base") and ref[2]:
            ref[0].base = ref[2][0]
        return super().call(phase, ref)


@pytest.mark.parametrize("lost", ["stage", "stage, under it"])
def test_the_learner_goes_on_with_the_weights_of_fresh_stages(
    lost: str, run_with: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(sharing=True)
    run.learn([1])
    run.record(1, {"loss": 0.0})
    learner, run.session.losses = run.learner, [lost]  # type: ignore[attr-defined]
    run.learn([2])
    run.record(2, {"loss": 0.0})
    assert run.learner.base == [{"weight": 1}] and run.learner.rounds == 2 and run.session.losses == []  # type: ignore[attr-defined]
    assert (run.learner is learner) == (lost == "stage")
    said = capsys.readouterr().out
    assert ("goes on with the base weights" in said) == (lost == "stage")
    assert ("illegal memory access" in said) == (lost != "stage")


@pytest.mark.parametrize("sharing", [False, True])
def test_a_learner_that_is_left_to_choose_tells_of_a_copy_of_its_own(
    sharing: bool, run_with: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run_with(sharing=sharing)
    said = "the learner takes base weights of its own: a stage is on another node"
    assert (said in " ".join(capsys.readouterr().out.split())) == (not sharing)


def test_a_learner_takes_a_copy_where_fresh_stages_cannot_show_their_weights(
    run_with: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(sharing=True)
    run.session.losses = ["stage, under it"]  # type: ignore[attr-defined]
    run.session.base_weights = lambda: ["no handle for it"]  # type: ignore[method-assign]
    run.learn([1])
    assert run.learner.rounds == 1
    assert "takes base weights of its own: no handle for it" in " ".join(capsys.readouterr().out.split())


def test_what_fails_while_its_stages_are_well_is_a_failure(run_with: Callable[..., Run]) -> None:
    run = run_with(sharing=True)
    run.session.losses = ["nothing"]  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run.learn([1])


def test_a_run_that_ended_while_its_first_state_was_written_begins_anew(run_with: Callable[..., Run]) -> None:
    run = run_with()
    run.folder.append_metrics({"round": 1, "policy_version": 1})
    (run.learner_path / f".{STATE_FILE}.123").write_text("half")
    run._go_on()
    assert run.rounds_done == 0
    assert (run.folder.path / "metrics.jsonl").read_text() == ""
