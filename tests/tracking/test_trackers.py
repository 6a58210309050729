"""Trackers write real files; what was logged is read back from them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ember_ray.config.errors import UserError
from ember_ray.tracking import trackers
from ember_ray.tracking.trackers import NoTracker, make_tracker, numbers

ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {"prompt": "Total: 5 | `EUR`", "answer": '{"total": 5}', "reward": 1.0, "tags": ["a"]},
    {"prompt": "two\nlines", "answer": "", "reward": None, "tags": []},
]

LOGGING = """
import os, sys, time
from ember_ray.tracking.trackers import make_tracker
tracker = make_tracker("auto", sys.argv[1], "demo", {"lora": {"r": 4}})
print(tracker.where, flush=True)
for step in (1, 2):
    tracker.log({"round": step, "reward": step / 4, "rewards/chosen": 0.5, "loss": float("nan"), "note": "x"}, step)
tracker.log_samples(2, [{"prompt": "p", "answer": "a", "reward": 0.5}])
"""


def wandb_environment(home: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    return {**kept, "PYTHONPATH": str(ROOT), "HOME": str(home), "OMP_NUM_THREADS": "1", **more}


def wandb_records(folder: Path) -> list[Any]:
    """Records of a transaction log: LevelDB's format (32 KiB blocks, fragments) behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last fragment
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    history = []
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            history.append(items)
    return history


@pytest.mark.slow
def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path: Path) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    code = "import sys\nfrom ember_ray.tracking.trackers import make_tracker\n"
    code += "tracker = make_tracker('wandb', sys.argv[1], 'demo', {})\n"
    code += "tracker.log({'reward': 0.5}, int(sys.argv[2])); tracker.finish()"
    for step in ("1", "2"):
        command = [sys.executable, "-c", code, str(run), step]
        done = subprocess.run(command, capture_output=True, text=True, env=wandb_environment(home), timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    logs = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(logs) == 2, "the second session must not write over the first"
    assert {log.stem for log in logs} == {f"run-{(run / 'wandb_run_id').read_text().strip()}"}


@pytest.mark.slow
def test_wandb_offline_keeps_numbers_and_samples(tmp_path: Path) -> None:
    run, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    code = LOGGING + "tracker.finish(); tracker.finish()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(run)], capture_output=True, text=True, env=wandb_environment(home), timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"wandb sync {run}/wandb/offline-run-") and done.stdout.count("\n") == 1
    assert done.stderr == ""
    history = wandb_history(run)
    assert [row["reward"] for row in history if "reward" in row] == [0.25, 0.5]
    assert [row["step"] for row in history if "reward" in row] == [1, 2]
    assert history[0]["rewards/chosen"] == 0.5 and "loss" not in history[0] and "note" not in history[0]
    (table,) = run.glob("wandb/offline-run-*/files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [["p", "a", 0.5]]
    config = [r.run.config for r in wandb_records(run) if r.WhichOneof("record_type") == "run"][0]
    assert {item.key: json.loads(item.value_json) for item in config.update}["lora"] == {"r": 4}


@pytest.mark.slow
def test_wandb_of_a_killed_run_keeps_what_was_logged_two_seconds_before(tmp_path: Path) -> None:
    code = LOGGING + "time.sleep(2.5); os.kill(os.getpid(), 9)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, env=wandb_environment(tmp_path), timeout=120
    )
    assert done.returncode == -9
    assert [row["reward"] for row in wandb_history(tmp_path) if "reward" in row] == [0.25, 0.5]


@pytest.mark.slow
def test_wandb_works_without_a_home_folder_that_can_be_written(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOGGING + "tracker.finish()", str(tmp_path)],
        capture_output=True,
        text=True,
        env=wandb_environment(Path("/proc/nowhere")),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/table/*.json"))


def test_wandb_is_online_only_for_people_who_are_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert trackers._wandb_mode() == "offline"
    (tmp_path / ".netrc").write_text("machine example.org login user password secret\n")
    assert trackers._wandb_mode() == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert trackers._wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert trackers._wandb_mode() == "offline"
    (tmp_path / ".netrc").unlink()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert trackers._wandb_mode() == "online"


@pytest.mark.slow
def test_tensorboard_keeps_numbers_and_samples(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = make_tracker("tensorboard", tmp_path, "demo", {"lora": {"r": 4}, "empty": {}})
    tracker.log({"reward": 0.25, "loss": float("nan"), "note": "x"}, 1)
    tracker.log({"reward": 0.5}, 2)
    tracker.log_samples(2, ROWS)
    tracker.finish()
    tracker.finish()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.25), (2, 0.5)]
    assert events.Tags()["scalars"] == ["reward"]
    (text,) = events.Tensors("samples/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert "`Total: 5 \\| 'EUR'`" in table and "`two ⏎ lines`" in table
    assert len(table.splitlines()) == 4
    assert str(tmp_path / "tensorboard") in tracker.where


def test_none_keeps_nothing(tmp_path: Path) -> None:
    tracker = make_tracker("none", tmp_path, "demo", {})
    tracker.log({"reward": 1.0}, 1)
    tracker.log_samples(1, ROWS)
    tracker.finish()
    assert isinstance(tracker, NoTracker) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_told_with_the_way_to_get_it(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"pip install {kind}"):
        make_tracker(kind, tmp_path, "demo", {})
    assert isinstance(make_tracker("auto", tmp_path, "demo", {}), NoTracker)


def test_only_numbers_are_drawn() -> None:
    assert numbers({"a": 1, "b": True, "c": None, "d": float("inf"), "e": "x", "f": [1]}) == {"a": 1.0, "b": 1.0}
