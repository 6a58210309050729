"""Every recipe in a short form: what it learns shows on held-out prompts, and what it leaves is whole."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Command, Ended, run

SHORT = (
    "rounds=2",
    "rollout.prompts_per_round=64",
    "data.eval_prompts=128",
    "data.eval_samples=2",
    "data.train_examples=1024",
    "ray.dashboard=false",
    "tracker=none",
)
MORE = {"sft": ("rounds=3", "sft.rows_per_round=64"), "grpo": ("rollout.prompts_per_round=48",)}


def only_run(folder: Path) -> Path:
    (found,) = (path for path in (folder / "runs").iterdir() if (path / "config.yaml").is_file())
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["extract", "sql"])
@pytest.mark.parametrize("algorithm", ["sft", "best_of_n", "dpo", "grpo"])
def test_a_short_run_improves_its_starting_checkpoint(algorithm: str, task: str, tmp_path: Path) -> None:
    if (algorithm, task) == ("dpo", "extract"):
        pytest.skip("test_dpo_extract.py has it")
    ended = run(f"recipes.{algorithm}_{task}", *SHORT, *MORE.get(algorithm, ()), cwd=tmp_path)
    assert ended.status == 0, ended.stderr
    assert ended.left == [], "processes were left behind"
    folder = only_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["algorithm"], summary["task"]) == (algorithm, task)
    assert summary["gain"]["exact_match_sampled_interval"][0] > 0, summary["gain"]
    metrics = rows(folder / "metrics.jsonl")
    assert [row["policy_version"] for row in metrics] == list(range(1, len(metrics) + 1))
    measured = [*summary["mismatch"].values(), *(metrics if algorithm != "sft" else ())]
    assert len(summary["mismatch"]) == 2
    for row in measured:
        assert row["mismatch/tokens"] > 0 and row["mismatch/max"] < 1e-4, "engine and learner must agree (float32)"
        assert row["mismatch/outside"] == 0.0
    assert (folder / "adapter" / "adapter_config.json").is_file() and (folder / "report.html").is_file()


@pytest.mark.slow
def test_a_run_goes_on_from_an_adapter_and_resume_after_a_lost_learner_changes_nothing(tmp_path: Path) -> None:
    """The learner's process is killed in the middle of a round; the curve is that of a run without the kill."""
    from transformers import AutoModelForCausalLM

    from ember_ray.assets import tiny_model_path
    from ember_ray.train.options import LINEAR_LAYERS
    from tests.support.peft_adapters import make_adapter

    adapter = tmp_path / "adapter"
    network = AutoModelForCausalLM.from_pretrained(tiny_model_path())
    make_adapter(network, adapter, r=16, lora_alpha=0.2, target_modules=list(LINEAR_LAYERS))
    short = [*SHORT, "rounds=3", "rollout.prompts_per_round=8", "data.eval_prompts=8", "data.train_examples=64"]
    short += [f"model.adapter={adapter}", "lora.lora_alpha=0.2", "grpo.learning_rate=0.01"]

    def grpo(name: str, disturb: bool) -> tuple[Ended, Path]:
        folder = tmp_path / name
        folder.mkdir()
        command = Command("recipes.grpo_extract", *short, cwd=folder)
        if disturb:
            deadline = time.monotonic() + 120
            while not list(folder.glob("runs/*/learner/*.pt")):  # the first round is over
                assert time.monotonic() < deadline and command.process.poll() is None
                time.sleep(0.02)
            killed = 0
            while not killed:
                for process in Path("/proc").glob("[0-9]*"):
                    try:
                        ours = command.mark.encode() in (process / "environ").read_bytes()
                        if ours and b"LearnerActor" in (process / "cmdline").read_bytes():
                            os.kill(int(process.name), signal.SIGKILL)
                            killed += 1
                    except OSError:
                        continue
                assert time.monotonic() < deadline
        return command.end(), only_run(folder)

    (calm, calm_run), (rough, rough_run) = grpo("calm", False), grpo("rough", True)
    assert calm.status == rough.status == 0, calm.stderr + rough.stderr
    assert "the learner was lost" in rough.stdout and "the learner was lost" not in calm.stdout
    assert rough.left == []
    timed = ("seconds", "tokens_per_second", "step_time")
    curves = [
        [{name: value for name, value in row.items() if not name.startswith(timed)} for row in rows(path)]
        for path in (calm_run / "metrics.jsonl", rough_run / "metrics.jsonl")
    ]
    assert curves[0] == curves[1]
    # version 1 is the adapter that the run started from
    assert [row["rollout_policy_version"] for row in curves[0]] == [1, 2, 3]


@pytest.mark.slow
def test_a_rollout_may_run_ahead_of_learning_and_useless_groups_are_refilled(tmp_path: Path) -> None:
    short = (*SHORT, "rounds=3", "rollout.prompts_per_round=16", "data.eval_prompts=16", "reward.design=binary")
    ahead = ("grpo.async_steps=1", "grpo.refill=true", "rollout.num_candidates=4")
    ended = run("recipes.grpo_extract", *short, *ahead, cwd=tmp_path)
    assert ended.status == 0, ended.stderr
    metrics = rows(only_run(tmp_path) / "metrics.jsonl")
    assert [row["rollout_policy_version"] for row in metrics] == [0, 0, 1]
    assert [row["policy_version"] for row in metrics] == [1, 2, 3]
    # the second round's candidates are of an older policy than the one that learns from them
    assert metrics[0]["mismatch/max"] < 1e-4 < metrics[1]["mismatch/max"]
    # with exact or not as reward and four candidates, groups of one reward are common; others were drawn for them
    assert all(row["prompts"] == 16 for row in metrics)
    assert metrics[0]["generated_tokens"] > 16 * 4 * metrics[0]["completions/mean_length"]
