"""The benchmark of adapter swaps runs on a CPU, and refuses what it must not count."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import adapter_swap
from ember_ray.model.slots import AdapterSlots

TRY = ["--shape", "tiny", "--device", "cpu", "--ranks", "4", "--modules", "qkvo"]
KEYS = {"mode", "source", "rank", "modules", "ms", "publish_ms", "pause_ms", "git_commit"}


def test_a_line_for_each_mode_and_source(tmp_path: Path) -> None:
    assert adapter_swap.main([*TRY, "--output", str(tmp_path / "swap.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "swap.jsonl").read_text().splitlines()]
    assert [(row["mode"], row["source"]) for row in rows] == [
        (mode, source) for mode in ("slots", "merged") for source in ("gpu", "host", "file")
    ]
    for row in rows:
        assert row.keys() >= KEYS and row["repetitions"] >= 20 and row["publish_ms"] is None
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"] and row["commit_ms"] > 0 and row["rank"] == 4


def test_a_try_is_not_written_down(tmp_path: Path) -> None:
    given = [*TRY, "--modes", "slots", "--sources", "gpu", "--repetitions", "2"]
    assert adapter_swap.main([*given, "--output", str(tmp_path / "swap.jsonl")]) == 0
    assert not (tmp_path / "swap.jsonl").exists()


@pytest.mark.parametrize("mode", ["slots", "merged"])
def test_a_switch_that_does_nothing_is_refused(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def idle(self: AdapterSlots, held: object) -> None:
        self._active = self._places.get(held.shape) or self._new_places(held.shape)  # type: ignore[attr-defined]
        if self._active.flat is not None:
            self._active.flat.fill_(torch.nan)

    monkeypatch.setattr(AdapterSlots, "_activate", idle)
    given = [*TRY, "--modes", mode, "--sources", "gpu", "--repetitions", "1"]
    assert adapter_swap.main(given) == 1
    assert "is not" in capsys.readouterr().err
