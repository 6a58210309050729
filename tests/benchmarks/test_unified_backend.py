"""The benchmark of one copy of the model against two, itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import unified_backend


@pytest.mark.slow
def test_a_cell_runs_and_is_not_measured_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "unified.jsonl"
    command = ["--shape", "tiny", "--device", "cpu", "--output", str(output), "--work", "2", "4", "24", "8"]
    command += ["--alone", "4", "4", "24", "8", "--rounds", "1", "--alone-rounds", "1", "--git-commit", "abc"]
    command += ["--cells", "unified_slots"]
    assert unified_backend.main(command) == 0
    row = json.loads(output.read_text())
    assert row["cell"] == "unified_slots"
    assert row["mismatch"] < 1e-4 < 0.01 < row["moved"]  # the engine serves what was learnt
    assert 0 < row["publish_s"] < row["first_token_s"] and row["tokens_per_s"] > 0
    assert row["base_gb"] < row["loaded_gb"]
    assert output.with_suffix(".svg").is_file() and output.with_suffix(".png").is_file()
    capsys.readouterr()
    assert unified_backend.main(command) == 0
    assert capsys.readouterr().out == "" and len(output.read_text().splitlines()) == 1
