"""What a person sees, on a pipe and on a terminal of 80 columns."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ember_ray.tracking import console as console_module
from ember_ray.tracking.console import Console
from ember_ray.tracking.console_text import live_line, one_line, round_header, round_line, with_interval
from ember_ray.tracking.run_folder import RunFolder
from ember_ray.tracking.samples import ChangedSample

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = {
    "reward": 0.7123,
    "exact_match": 0.48,
    "tokens_per_second": 12_400.4,
    "prefix_hit_rate": 1.0,
    "policy_version": 12,
    "pairs": 1061,
    "seconds/round": 112.34,
}
SAMPLE = ChangedSample(
    request_id="r1",
    prompt="INVOICE\nFrom: [red]Kestrel[/red]\nTotal 5",
    before="\x1b[31mbad\x07",
    after='{"total": 5}',
    before_verdict="reward 0.10: no JSON",
    after_verdict="exact match, reward 1.00",
)


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(out), out


def test_a_pipe_gets_plain_lines_for_every_moment() -> None:
    console, out = plain()
    with console:
        console.title("Ember Ray", "demo")
        with console.stage("starting Ray") as stage:
            stage.note("dashboard http://127.0.0.1:8265")
        with console.phase("evaluating", 8):
            console.advance(8)
        console.start_rounds(2)
        with console.phase("rollout", 8):
            console.advance(4)
        with console.phase("publishing"):
            pass
        console.round_done(NUMBERS)
    text = out.getvalue()
    assert "\x1b" not in text and "\r" not in text
    lines = [line.rstrip() for line in text.splitlines()]
    assert lines[0] == "Ember Ray  demo"
    assert lines[1] == "  starting Ray ..."
    assert re.fullmatch(r"  \* starting Ray +0\.0 s  dashboard http://127\.0\.0\.1:8265", lines[2])
    assert lines[5:] == [
        round_header(),
        "  round 1/2: rollout ...",
        "  round 1/2: publishing ...",
        round_line(1, 2, NUMBERS),
    ]


def test_a_long_phase_tells_its_progress_on_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "_PLAIN_EVERY_S", 0.05)
    console, out = plain()
    with console.phase("rollout", 1200):
        console.advance(400)
        time.sleep(0.06)
        console.advance(400)
        console.advance(400)
    assert out.getvalue().count("/1,200") == 1 and "  rollout 800/1,200\n" in out.getvalue()


def test_seconds_add_up_by_name_even_when_a_phase_fails() -> None:
    console, _ = plain()
    for _ in range(2):
        with console.phase("rollout") as phase:
            time.sleep(0.03)
        assert 0.03 <= phase.seconds < 1
    with pytest.raises(RuntimeError), console.phase("learning"):
        raise RuntimeError
    assert 0.06 <= console.seconds["rollout"] < 2
    assert console.seconds["learning"] < 1
    console.advance()  # outside any phase: nothing to count


def test_lines_fit_80_columns() -> None:
    assert len(live_line(NUMBERS)) <= 80 - 4
    assert len(round_line(10, 12, NUMBERS)) == len(round_header()) <= 80
    assert live_line({}) == "reward -  exact match -  - tok/s  cache hits -  policy -"


def test_an_interval_is_shown_only_where_there_is_one() -> None:
    part = {"f1": 0.5, "f1_interval": [0.4, 0.6], "x": 0.25, "y": None}
    assert with_interval(part, "f1") == "0.50 [0.40, 0.60]"
    assert with_interval(part, "f1", signed=True) == "+0.50 [0.40, 0.60]"
    assert (with_interval(part, "x"), with_interval(part, "y"), with_interval(None, "x")) == ("0.25", "-", "-")


def test_a_models_output_cannot_steer_the_terminal() -> None:
    assert one_line("a\x1b[31mb\r\nc\td\x00\x9b") == "a?[31mb\\nc d??"


def test_the_end_shows_before_and_after_samples_and_files(finished_run: Path) -> None:
    console, out = plain()
    summary = json.loads((finished_run / "summary.json").read_text())
    console.final(summary, [SAMPLE], finished_run, RunFolder(finished_run).files())
    text = out.getvalue()
    before, after = (summary[part]["exact_match_sampled"] for part in ("before", "after"))
    assert re.search(rf"exact match sampled +{before:.2f} \[0\.\d\d, 0\.\d\d\] +{after:.2f} \[.*\] +\+0\.\d\d \[", text)
    assert "INVOICE From: [red]Kestrel[/red] Total 5" in text
    assert "before  ?[31mbad?" in text and "reward 0.10: no JSON" in text and "exact match, reward 1.00" in text
    assert f"{finished_run}/" in text and "metrics.jsonl" in text
    assert "\x1b" not in text


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    console, out = plain()
    console.final({"status": "interrupted", "rounds": 2, "before": None, "after": None}, [], tmp_path, {})
    assert "interrupted after 2 rounds; what was learnt so far is saved" in out.getvalue()


TERMINAL = """
import sys, time
from ember_ray.config import signals
from ember_ray.tracking.console import Console
signals.begin()
with Console() as console:
    with console.stage("loading the model"):
        time.sleep(0.3)
    console.start_rounds(2)
    with console.phase("rollout", 512):
        console.advance(256)
        console.update({"reward": 0.5, "policy_version": 3})
        print("a line of a library", flush=True)
        time.sleep(float(sys.argv[1]))
    console.round_done({"reward": 0.5})
"""


def on_terminal(seconds: float, stop: bool = False, **environment: str) -> tuple[int, str]:
    main, side = pty.openpty()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TERM": "xterm",
        "COLUMNS": "80",
        "LINES": "24",
        **environment,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, str(seconds)], stdout=side, stderr=side, stdin=side, env=environment
    )
    os.close(side)
    text = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:
            break
        if not part:
            break
        text += part
        if stop and b"256/512" in text:
            process.send_signal(signal.SIGINT)
            stop = False
    os.close(main)
    return process.wait(timeout=30), text.decode(errors="replace")


def test_a_terminal_shows_bars_and_the_line_of_numbers() -> None:
    status, text = on_terminal(0.5)
    assert status == 0
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert "loading the model" in seen and "round 1/2: rollout" in seen and "256/512" in seen and "rounds" in seen
    assert "reward 0.500  exact match -  - tok/s  cache hits -  policy v3" in seen
    assert "a line of a library" in seen
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is back


def test_ctrl_c_leaves_the_terminal_in_order() -> None:
    status, text = on_terminal(20, stop=True)
    assert status != 0 and "KeyboardInterrupt" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_dumb_terminal_gets_plain_lines() -> None:
    status, text = on_terminal(0.0, TERM="dumb")
    assert status == 0 and "\x1b" not in text and "round 1/2: rollout ..." in text
