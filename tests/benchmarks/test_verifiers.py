"""The benchmark of the verifier pool, and with it: thousands of verifications leave nothing behind."""

from __future__ import annotations

import pytest

from benchmarks.verifiers import run

SLACK_FILES = 16
"""Ray opens and closes connections of its own meanwhile; a file a chunk would be over a hundred."""

SLACK_BYTES = 64 * 2**20
"""Caches of golds and schemas fill, Python keeps what it had; 20 KB an answer would be over it."""


@pytest.mark.slow
def test_thousands_of_verifications_leave_no_process_no_file_and_no_memory() -> None:
    lines = list(run(["json", "sql"], 2400, batch=800, actors=1))  # one, so that it has seen every database at first
    assert [line["kind"] for line in lines] == ["json", "sql"]
    for line in lines:
        before, after = line["before"], line["after"]
        assert line["verifications"] == 2400 and line["failures"] == 0 and line["replaced_actors"] == 0
        assert 0.1 < line["exact_match"] < 0.9 and line["per_second"] > 0
        assert before["processes"] == after["processes"] == {"json": 1, "sql": 2}[line["kind"]]
        assert line["new_files"] == [] and line["left_processes"] == 0
        for name in ("open_files", "driver_open_files"):
            assert after[name] - before[name] <= SLACK_FILES, name
        for name in ("private_bytes", "driver_private_bytes"):
            assert after[name] - before[name] <= SLACK_BYTES, name
