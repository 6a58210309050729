"""The recipe as a user runs it: it learns, it leaves what it promises, and it ends well whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ember_ray.assets import tiny_model_path
from tests.support.command_line import Command, Ended, run

RECIPE = "recipes.dpo_extract"
SHORT = (
    "rounds=2",
    "rollout.prompts_per_round=48",
    "data.eval_prompts=96",
    "data.eval_samples=2",
    "data.train_examples=192",
    "ray.dashboard=false",
)

ENDLESS = (
    "rounds=500",
    "rollout.prompts_per_round=8",
    "data.eval_prompts=8",
    "data.eval_samples=1",
    "data.train_examples=16",
    "ray.dashboard=false",
)


def only_run(folder: Path) -> Path:
    (found,) = (folder / "runs").iterdir()
    return found


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    folder = tmp_path_factory.mktemp("learnt")
    ended = run(RECIPE, *SHORT, cwd=folder)
    assert ended.status == 0, ended.stderr
    return ended, only_run(folder)


@pytest.mark.slow
def test_the_reward_rises_and_not_without_publication(learnt: tuple[Ended, Path], tmp_path: Path) -> None:
    ended, folder = learnt
    assert ended.left == [], "processes were left behind"
    control = run(RECIPE, *SHORT, "rollout.publish=false", cwd=tmp_path)
    assert control.status == 0, control.stderr
    with_it, without = (json.loads((f / "summary.json").read_text()) for f in (folder, only_run(tmp_path)))
    # the same seeds: what the two start from is the same to the digit
    assert with_it["before"] == without["before"]
    assert with_it["gain"]["exact_match_sampled"] > 0.10
    assert with_it["gain"]["exact_match_sampled_interval"][0] > 0
    assert without["gain"]["exact_match_sampled"] < 0.5 * with_it["gain"]["exact_match_sampled"]
    assert (with_it["policy_version"], without["policy_version"]) == (2, 0)


@pytest.mark.slow
def test_what_a_run_leaves(learnt: tuple[Ended, Path]) -> None:
    ended, folder = learnt
    summary = json.loads((folder / "summary.json").read_text())
    for part in (summary["before"], summary["after"]):
        for measure in ("reward_mean", "exact_match_sampled", "exact_match_greedy", "f1"):
            low, high = part[f"{measure}_interval"]
            assert 0 <= low <= part[measure] <= high <= 1
    assert summary["rounds"] == 2 and summary["seed"] == 0
    assert set(summary["seconds"]) >= {"starting Ray", "rollout", "learning", "publishing"}
    metrics = rows(folder / "metrics.jsonl")
    assert [row["round"] for row in metrics] == [1, 2]
    # each round's candidates are of the version that the round before published
    assert [row["rollout_policy_version"] for row in metrics] == [0, 1]
    assert [row["policy_version"] for row in metrics] == [1, 2]
    prompts = 0
    for number in (1, 2):
        groups = rows(folder / "rollouts" / f"round_{number:04d}.jsonl")
        assert len(groups) == 48
        for group in groups:
            prompts += len(group["prompt_token_ids"]) * len(group["candidates"])
            for candidate in group["candidates"]:
                assert candidate["policy_version"] == number - 1 and candidate["cache_exact"]
                assert len(candidate["token_ids"]) == len(candidate["logprobs"]) == len(candidate["sampling_logprobs"])
                assert set(candidate["rewards"]) >= {"parse", "schema", "fields", "f1", "exact_match"}
    hit_or_computed = sum(row["prefill_tokens"] + row["prefix_hit_tokens"] for row in metrics)
    assert hit_or_computed == prompts, "each prompt token of each candidate was either computed or found"
    assert all(row["prefill_tokens"] <= row["prefix_hit_tokens"] / 7 for row in metrics)
    assert summary["prefill_tokens"] > sum(row["prefill_tokens"] for row in metrics)  # the evaluations come on top

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_path()), folder / "adapter")
    assert list((folder / "wandb").glob("offline-run-*/*.wandb"))
    report = (folder / "report.html").read_text()
    assert "<svg" in report and "http://" not in report.replace("http://www.w3.org", "") and "https://" not in report
    for said in ("before", "after", "exact match sampled", str(folder.name), "report.html"):
        assert said in ended.stdout


@pytest.mark.slow
def test_sigterm_while_ray_starts_leaves_nothing(tmp_path: Path) -> None:
    command = Command(RECIPE, *SHORT, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not any("gcs_server" in line for line in command.family()):
        assert time.monotonic() < deadline and command.process.poll() is None
        time.sleep(0.05)
    os.kill(command.process.pid, signal.SIGTERM)
    ended = command.end(60)
    assert (ended.status, ended.left) == (130, []) and "Traceback" not in ended.stderr


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    """The run of ``learnt``, with Ctrl-C as soon as its first round is over."""
    folder = tmp_path_factory.mktemp("interrupted")
    command = Command(RECIPE, *SHORT, cwd=folder)
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/*/learner/*.pt")):
        assert time.monotonic() < deadline and command.process.poll() is None
        time.sleep(0.05)
    os.kill(command.process.pid, signal.SIGINT)
    return command.end(60), only_run(folder)


@pytest.mark.slow
def test_ctrl_c_ends_a_run_cleanly_and_keeps_what_was_learnt(interrupted: tuple[Ended, Path]) -> None:
    ended, folder = interrupted
    assert ended.status == 130, ended.stderr
    assert ended.left == [], "processes were left behind"
    assert "Traceback" not in ended.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["rounds"] == 1
    assert summary["before"] is not None and summary["after"] is None
    assert (folder / "adapter" / "adapter_model.safetensors").is_file() and (folder / "report.html").is_file()


@pytest.mark.slow
def test_an_interrupted_run_is_resumed_and_ends_as_if_nothing_had_been(
    learnt: tuple[Ended, Path], interrupted: tuple[Ended, Path]
) -> None:
    folder = interrupted[1]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"round": 2, "reward": 0.0}) + "\n")  # of a round whose learner state was not saved
        file.write('{"round": 3, "rew')  # what a kill cuts off
    mine = ["--config", str(folder / "config.yaml"), f"resume={folder}"]
    other = run(RECIPE, *mine, "lora.r=8", cwd=folder)
    assert other.status == 2 and "other settings of 'lora'" in other.stderr
    ended = run(RECIPE, *mine, cwd=folder)
    assert ended.status == 0, ended.stderr
    assert "going on after round 1" in ended.stdout
    counted = ("round", "reward", "loss", "pairs", "generated_tokens", "prefill_tokens", "policy_version", "grad_norm")
    resumed, undisturbed = (
        [{name: row[name] for name in counted} for row in rows(path / "metrics.jsonl")] for path in (folder, learnt[1])
    )
    assert resumed == undisturbed
    now, then = (json.loads((path / "summary.json").read_text()) for path in (folder, learnt[1]))
    for name in ("before", "after", "gain", "rounds", "generated_tokens", "prefill_tokens", "policy_version"):
        assert now[name] == then[name], name
    again = run(RECIPE, *mine, cwd=folder)
    assert again.status == 2 and "is finished" in again.stderr


def user_files(folder: Path) -> None:
    row = {"prompt": "Extract a as JSON.\n\na is 1.", "gold": {"a": 1}}
    (folder / "good.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "long.jsonl").write_text(json.dumps(row | {"id": "novel", "prompt": "a is 1. " * 3000}) + "\n")
    (folder / "broken.jsonl").write_text(json.dumps(row) + "\n{nonsense\n")
    (folder / "bad.yaml").write_text("rounds: [1\n")
    (folder / "file").write_text("")


BAD = [
    (["model.path=nowhere"], "no model folder 'nowhere'"),
    (["--config", "bad.yaml"], "bad.yaml"),
    (["rollout.num_candidate=4"], "num_candidates"),
    (["data.train=empty.jsonl", "data.eval=good.jsonl"], "empty.jsonl"),
]
BAD_SLOWER = [
    (["--config", "absent.yaml"], "no configuration file 'absent.yaml'"),
    (["rounds=many"], "rounds"),
    (["data.train=good.jsonl", "data.eval=broken.jsonl"], "broken.jsonl:2"),
    (["data.train=long.jsonl", "data.eval=good.jsonl"], "'novel'"),
    (["output_dir=file/below"], "file/below"),
    (["engine.stages=[1,7]"], "the model has 2"),
    (["ray.address=127.0.0.1:1"], "no Ray cluster answers"),
]


@pytest.mark.parametrize(
    ("arguments", "says"), BAD + [pytest.param(*case, marks=pytest.mark.slow) for case in BAD_SLOWER], ids=str
)
def test_bad_input_is_one_line_and_status_2(arguments: list[str], says: str, tmp_path: Path) -> None:
    user_files(tmp_path)
    ended = run(RECIPE, *arguments, "tracker=none", cwd=tmp_path, limit_s=60)
    assert ended.status == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ") and says in line
    assert ended.left == []


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_status_2(tmp_path: Path) -> None:
    """A disk that fills up in the middle of the run; tmpfs needs root, as in CI."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=66m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount: {mounted.stderr.decode().strip()}")
    try:
        command = Command(RECIPE, *ENDLESS, "tracker=none", f"output_dir={small}", cwd=tmp_path)
        deadline = time.monotonic() + 120
        while not list(small.glob("*/metrics.jsonl")):
            assert time.monotonic() < deadline and command.process.poll() is None
            time.sleep(0.1)
        with contextlib.suppress(OSError), open(small / "ballast", "wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(1 << 16))
        ended = command.end(90)
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    assert ended.status == 2
    assert ended.stderr.startswith("error: ") and "No space left" in ended.stderr and str(small) in ended.stderr
    assert "Traceback" not in ended.stderr and ended.left == []


def test_dry_run_shows_the_plan_and_starts_nothing(tmp_path: Path) -> None:
    ended = run(RECIPE, "--dry-run", "engine.stages=2", "seed=3", cwd=tmp_path)
    assert ended.status == 0 and not (tmp_path / "runs").exists()
    assert "seed: 3" in ended.stdout and "stage 1" in ended.stdout and "LM head" in ended.stdout


def test_help_names_every_key(tmp_path: Path) -> None:
    from ember_ray.config.schema import DpoExtractConfig

    ended = run(RECIPE, "--help", cwd=tmp_path)
    assert ended.status == 0
    for name, field in DpoExtractConfig.model_fields.items():
        assert name in ended.stdout
        section = getattr(field.annotation, "model_fields", None)
        for key in section or ():
            assert f"{name}.{key}" in ended.stdout or key in ended.stdout
