"""A run folder is whole at every moment, and a disk or folder that cannot be written is told in one line."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ember_ray.config.errors import UserError
from ember_ray.config.load import load_config
from ember_ray.config.schema import DpoExtractConfig
from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import Candidate
from ember_ray.tracking.files import json_line, read_jsonl, write_text
from ember_ray.tracking.rows import group_row, prompt_text
from ember_ray.tracking.run_folder import RunFolder


def group(text: str = '{"a": 1}') -> ScoredGroup:
    logprobs = torch.tensor([-0.1, -1 / 3, -7.25], dtype=torch.float32).tolist()
    made = Candidate("r1", 0, [5, 6, 7], logprobs, [value / 2 for value in logprobs], text, "stop", 4)
    return ScoredGroup(
        "r1", "read this", (1, 2), [ScoredCandidate(made, 0.5, {"f1": 0.5, "exact_match": 0.0}, "a: wrong")]
    )


def test_two_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path) -> None:
    folders = [RunFolder.create(tmp_path / "deep" / "runs", "demo").path for _ in range(4)]
    assert len(set(folders)) == 4
    assert all(re.fullmatch(r"demo_\d{8}-\d{6}(_\d+)?", path.name) and path.is_dir() for path in folders)
    assert list(folders[0].iterdir()) == []


def test_a_place_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "runs", Path("/proc/runs")):
        with pytest.raises(UserError, match=re.escape(f"output_dir '{place}' cannot be written: ")) as caught:
            RunFolder.create(place, "demo")
        assert "\n" not in str(caught.value)


def test_a_disk_with_too_little_room_is_told_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MiB free and a run needs \d+ MiB"):
        RunFolder.create(tmp_path, "demo", needed_bytes=2**60)
    assert list(tmp_path.iterdir()) == []


def test_rows_hold_all_that_the_candidates_hold(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "demo")
    path = folder.write_rollouts(3, [group(), group('{"a": "Söhne\n"}')])
    assert path.name == "round_0003.jsonl"
    first, second = read_jsonl(path)
    assert (first["round"], first["request_id"], first["prompt"], first["prompt_token_ids"]) == (
        3,
        "r1",
        "read this",
        [1, 2],
    )
    (candidate,) = first["candidates"]
    assert candidate["rewards"] == {"f1": 0.5, "exact_match": 0.0}
    assert (candidate["reward"], candidate["reason"], candidate["policy_version"]) == (0.5, "a: wrong", 4)
    assert (candidate["finish_reason"], candidate["token_ids"], candidate["cache_exact"]) == ("stop", [5, 6, 7], True)
    # float32 log-probabilities come back to the bit
    made = group().candidates[0].candidate
    assert np.array_equal(np.float32(candidate["logprobs"]), np.float32(made.logprobs))
    assert np.array_equal(np.float32(candidate["sampling_logprobs"]), np.float32(made.sampling_logprobs))
    assert second["candidates"][0]["text"] == '{"a": "Söhne\n"}'


def test_evaluation_rows_say_how_they_were_drawn(tmp_path: Path) -> None:
    path = RunFolder.create(tmp_path, "demo").write_eval("before", [group()], [group()])
    assert [row["kind"] for row in read_jsonl(path)] == ["sampled", "greedy"]


def test_metrics_are_on_disk_line_by_line_and_strict_json(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "demo")
    for number in (1, 2):
        folder.append_metrics(
            {"round": number, "reward": np.float32(0.5), "loss": float("nan"), "t": torch.tensor(2.0), "x": math.inf}
        )
        lines = (folder.path / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == number
        row = json.loads(lines[-1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert row == {"round": number, "reward": 0.5, "loss": None, "t": 2.0, "x": None}
    folder.close()
    folder.close()


def test_the_configuration_of_a_run_can_be_run_again(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "demo")
    config = DpoExtractConfig(seed=3, rounds=2)
    folder.write_config(config)
    assert load_config(DpoExtractConfig, folder.path / "config.yaml") == config


def test_a_full_disk_is_told_when_a_line_is_appended(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "demo")
    (folder.path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write '.*metrics.jsonl': No space left on device; free the disk"):
        folder.append_metrics({"round": 1})


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_file_is_written_whole_or_not_at_all_on_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "summary.json"
    write_text(path, "old")
    with pytest.raises(UserError, match="cannot write '.*summary.json': No space left on device"):
        write_text(path, "x" * 2**21)
    assert path.read_text() == "old"
    assert os.listdir(small_disk) == ["summary.json"]


def test_a_small_disk_is_refused_before_the_run(small_disk: Path) -> None:
    with pytest.raises(UserError, match="1.0 MiB free and a run needs 64 MiB"):
        RunFolder.create(small_disk, "demo")


def test_a_write_that_is_interrupted_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["summary.json"]


def test_a_killed_process_leaves_rows_that_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert read_jsonl(path) == [{"a": 1}]
    path.write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(UserError, match=re.escape(f"{path}:2: not a line of JSON")):
        read_jsonl(path)
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_what_is_there_is_listed_with_its_meaning(finished_run: Path) -> None:
    files = RunFolder(finished_run).files()
    assert list(files) == ["summary.json", "metrics.jsonl", "rollouts/", "eval/", "config.yaml"]


def test_plain_values() -> None:
    assert json.loads(json_line({"a": (1, np.int64(2)), 3: torch.ones(2), "p": Path("x")})) == {
        "a": [1, 2],
        "3": [1.0, 1.0],
        "p": "x",
    }


def test_text_that_utf8_does_not_have_comes_back(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "demo")
    (row,) = read_jsonl(folder.write_rollouts(1, [group("a\ud800b")]))
    assert row["candidates"][0]["text"] == "a\ud800b"
    folder.append_metrics({"note": "\udfff"})
    assert read_jsonl(folder.path / "metrics.jsonl") == [{"note": "\udfff"}]


def test_the_prompt_that_people_read_is_the_last_user_message() -> None:
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u1"}, {"role": "user", "content": "u2"}]
    assert prompt_text(chat) == "u2"
    assert prompt_text("text") == "text"
    assert prompt_text([{"role": "system", "content": "s"}]) == "s"
    assert "round" not in group_row(group())
