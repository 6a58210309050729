"""Judging in a child process: a reward function that hangs or ends it costs its own candidate only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from verifiers.isolated_judge import IsolatedJudge
from verifiers.judge import Batch
from verifiers.reward_functions import RewardFunction

ODD = RewardFunction("tests.actors.odd_verifier:verify")


def batch_of(*golds: str) -> Batch:
    count = len(golds)
    return Batch(["say it"] * count, ["said"] * count, [[]] * count, [{"gold": gold} for gold in golds])


@pytest.mark.slow
def test_a_candidate_that_hangs_or_kills_the_process_costs_only_itself(tmp_path: Path) -> None:
    judge = IsolatedJudge([ODD], limit_s=3.0)
    try:
        found = judge.judge(batch_of("fine", "hang", "die", f"die once {tmp_path / 'flag'}", "fail", "fine"))
    finally:
        judge.close()
    assert [one.reward for one in found] == [1.0, None, None, 1.0, None, 1.0]
    assert found[0].components == {"length": 4.0}
    assert found[1].reason == "the verifier took longer than 3 s"
    assert found[2].reason == "the verifier's process died twice on this candidate"
    assert "KeyError" in str(found[4].reason)


def test_functions_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        IsolatedJudge([RewardFunction("tests.actors.odd_verifier:nowhere")], limit_s=60)
    (tmp_path / "quits.py").write_text("import os\nos._exit(3)\n")
    with pytest.raises(ValueError, match="ended with 3 while they were imported"):
        IsolatedJudge([RewardFunction(f"{tmp_path}/quits.py:f")], limit_s=60)
    (tmp_path / "sleeps.py").write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(ValueError, match="cannot be imported within 0.1 s"):
        IsolatedJudge([RewardFunction(f"{tmp_path}/sleeps.py:f")], limit_s=60, start_limit_s=0.1)


PARENT = """
import sys
from verifiers.isolated_judge import IsolatedJudge
from verifiers.judge import Batch
from verifiers.reward_functions import RewardFunction
IsolatedJudge([RewardFunction(sys.argv[1])], limit_s=600).judge(Batch([""], [""], [[]], [{}]))
"""
HANGS = """
import os, time
def f(prompts, **kwargs):
    with open({path!r} + ".new", "w") as file:
        file.write(str(os.getpid()))
    os.rename({path!r} + ".new", {path!r})
    time.sleep(600)
"""


def test_a_child_that_hangs_ends_with_its_parent(tmp_path: Path) -> None:
    told = tmp_path / "pid"
    (tmp_path / "hangs.py").write_text(HANGS.format(path=str(told)))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, f"{tmp_path}/hangs.py:f"])
    try:
        assert _until(told.exists)
    finally:
        parent.kill()
        parent.wait()
    child = int(told.read_text())
    try:
        assert _until(lambda: not _lives(child)), "left behind"
    finally:
        if _lives(child):
            os.kill(child, signal.SIGKILL)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _until(condition) -> bool:
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()
