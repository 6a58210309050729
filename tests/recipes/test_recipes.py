"""Every recipe in a short form: what it learns shows on held-out prompts, and what it leaves is whole."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import Command, run

SHORT = (
    "rounds=2",
    "rollout.prompts_per_round=48",
    "data.eval_prompts=64",
    "data.eval_samples=2",
    "data.train_examples=1024",
    "ray.dashboard=false",
    "tracker=none",
)
MORE = {"sft": ("rounds=3", "sft.rows_per_round=64"), "grpo": ("rollout.prompts_per_round=32",)}


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
@pytest.mark.timeout(600)  # three runs
def test_a_run_ahead_of_learning_is_the_same_after_a_lost_learner_and_a_resume(tmp_path: Path) -> None:
    """The learner's process is killed in the middle of a round, and Ctrl-C ends the run in a later one. In the calm run
    nothing of that is, and the learner has base weights of its own; all is the same."""
    from transformers import AutoModelForCausalLM

    from ember_ray.assets import tiny_model_path
    from ember_ray.train.options import LINEAR_LAYERS
    from tests.support.peft_adapters import make_adapter

    adapter = tmp_path / "adapter"
    network = AutoModelForCausalLM.from_pretrained(tiny_model_path())
    make_adapter(network, adapter, r=16, lora_alpha=0.2, target_modules=list(LINEAR_LAYERS))
    # with exact or not as reward and four candidates, groups of one reward are common; others are drawn for them
    short = [*SHORT, "rounds=4", "rollout.prompts_per_round=12", "data.eval_prompts=8", "data.train_examples=64"]
    short += ["grpo.async_steps=1", "grpo.refill=true", "rollout.num_candidates=4", "reward.design=binary"]
    short += [f"model.adapter={adapter}", "lora.lora_alpha=0.2", "grpo.learning_rate=0.01"]

    def begin(name: str, *more: str) -> Command:
        (tmp_path / name).mkdir(exist_ok=True)
        return Command("recipes.grpo_extract", *short, *more, cwd=tmp_path / name)

    def wait_for(command: Command, pattern: str) -> None:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "rough").glob(pattern)):
            assert time.monotonic() < deadline and command.process.poll() is None
            time.sleep(0.02)

    calm = begin("calm", "learner.base=own").end()
    command = begin("rough")
    wait_for(command, "runs/*/learner/*.pt")  # the first round is over
    kill_learner(command)
    wait_for(command, "runs/*/learner/policy_v3")  # and the second
    os.kill(command.process.pid, signal.SIGINT)
    rough = command.end()
    resumed = begin("rough", f"resume={only_run(tmp_path / 'rough')}").end()
    assert (calm.status, rough.status, resumed.status) == (0, 130, 0), calm.stderr + rough.stderr + resumed.stderr
    assert "the learner was lost" in rough.stdout and "going on after round" in resumed.stdout
    assert rough.left == resumed.left == []
    timed = ("seconds", "tokens_per_second", "step_time")
    curves = [
        [
            {name: value for name, value in row.items() if not name.startswith(timed)}
            for row in rows(only_run(tmp_path / name) / "metrics.jsonl")
        ]
        for name in ("calm", "rough")
    ]
    assert curves[0] == curves[1]
    # version 1 is the adapter that the run started from; from the second round on candidates are of an older policy
    assert [row["rollout_policy_version"] for row in curves[0]] == [1, 1, 2, 3]
    assert [row["policy_version"] for row in curves[0]] == [2, 3, 4, 5]
    assert curves[0][0]["mismatch/max"] < 1e-4 < curves[0][1]["mismatch/max"]
    for row in curves[0]:
        assert row["prompts"] == 12 < row["prompts_with_refill"]
        assert row["generated_tokens"] > 12 * 4 * row["completions/mean_length"]


def kill_learner(command: Command) -> None:
    deadline = time.monotonic() + 60
    killed = 0
    while not killed:
        assert time.monotonic() < deadline and command.process.poll() is None
        for process in Path("/proc").glob("[0-9]*"):
            try:
                ours = command.mark.encode() in (process / "environ").read_bytes()
                if ours and b"LearnerActor" in (process / "cmdline").read_bytes():
                    os.kill(int(process.name), signal.SIGKILL)
                    killed += 1
            except OSError:
                continue
