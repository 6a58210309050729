"""The command line: options, help, dry run, exit statuses and signals, in real processes."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from pydantic import Field

from ember_ray.config import signals
from ember_ray.config.cli import find_config, parse_arguments, run_cli, user_fault_line
from ember_ray.config.errors import ConfigError, UserError, user_faults
from ember_ray.config.schema import DpoExtractConfig, RunConfig

ROOT = Path(__file__).resolve().parents[2]


class SmallConfig(RunConfig):
    """Another recipe's configuration."""

    steps: int = Field(10, ge=1, description="Optimizer steps.")


def call(*argv: str, main=lambda config: None, **more) -> int:
    return run_cli(
        DpoExtractConfig,
        prog="python -m recipes.dpo_extract",
        description="DPO on extraction.",
        main=main,
        default_config="dpo_extract.yaml",
        argv=argv,
        **more,
    )


def script(body: str) -> list[str]:
    """A recipe as a program of its own."""
    text = f"""
        import sys, time
        from ember_ray.config import signals
        from ember_ray.config.cli import run_cli
        from ember_ray.config.errors import UserError
        from ember_ray.config.schema import RunConfig
        def main(config):
{textwrap.indent(textwrap.dedent(body), " " * 12)}
        sys.exit(run_cli(RunConfig, prog="recipe", description="A recipe.", main=main))
    """
    return [sys.executable, "-c", textwrap.dedent(text)]


def run_script(body: str, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*script(body), *argv], capture_output=True, text=True, env=environment, timeout=60)


def test_options_and_overrides_come_in_any_order() -> None:
    found = parse_arguments(["a=1", "--config", "x.yaml", "b.c=2", "--dry-run", "--tracker=none"])
    assert (found.config, found.dry_run, found.help) == ("x.yaml", True, False)
    assert found.overrides == ["a=1", "b.c=2", "tracker=none"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rounds=3"], "write rounds=3 without dashes"),
        (["--frob"], "unknown option '--frob'; --help lists the options"),
        (["--config"], "option --config needs a value"),
        (["--tracker", "--dry-run"], "option --tracker needs a value"),
    ],
)
def test_a_bad_option_says_what_to_write(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse_arguments(argv)


def test_main_gets_the_configuration_and_gives_the_status() -> None:
    seen = []
    assert call("seed=7", "--tracker", "none", main=lambda config: seen.append(config)) == 0
    assert (seen[0].seed, seen[0].tracker, seen[0].name) == (7, "none", "dpo_extract")
    assert call(main=lambda config: 5) == 5


def test_help_lists_every_key_in_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help", main=lambda config: pytest.fail("help must not run anything")) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "  dpo.learning_rate=0.001  (number > 0)",
        "engine: the rollout engine",
        "--dry-run",
        "--tracker KIND",
    ):
        assert part in text
    assert "      Peak learning rate of AdamW." in text


def test_help_works_even_when_the_rest_of_the_line_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help", "nonsense=1") == 0
    assert "usage: python -m recipes.dpo_extract" in capsys.readouterr().out


def test_the_command_line_serves_any_configuration_class(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    options = {"prog": "python -m recipes.other", "description": "Another.", "main": seen.append}
    assert run_cli(SmallConfig, **options, argv=["steps=3"]) == 0 and seen[0].steps == 3
    assert run_cli(SmallConfig, **options, argv=["--help"]) == 0
    assert "  steps=10  (integer >= 1)" in capsys.readouterr().out
    assert run_cli(SmallConfig, **options, argv=["step=3"]) == 2
    assert "did you mean 'steps'?" in capsys.readouterr().err


def test_dry_run_prints_what_can_be_loaded_again_and_the_plan_and_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "main": lambda config: pytest.fail("a dry run must not run"),
        "plan": lambda config: f"plan: {config.rounds}",
    }
    assert call("rounds=9", "--dry-run", **options) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("\nplan: 9\n")
    (tmp_path / "again.yaml").write_text(printed.partition("\nplan:")[0])
    seen = []
    assert call("--config", str(tmp_path / "again.yaml"), main=seen.append) == 0
    assert seen[0] == DpoExtractConfig(rounds=9)


def test_a_shipped_configuration_is_found_by_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("dpo_extract") == find_config("dpo_extract.yaml") == ROOT / "configs" / "dpo_extract.yaml"
    (tmp_path / "dpo_extract.yaml").write_text("rounds: 1\n")
    assert find_config("dpo_extract.yaml") == Path("dpo_extract.yaml")  # one's own file comes first
    with pytest.raises(ConfigError, match="one of the shipped .*dpo_extract.yaml"):
        find_config("nothing")


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (UserError("the data\n set is empty"), "the data set is empty"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x/y"), "'/x/y': No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "'/x': Permission denied"),
    ],
)
def test_a_fault_of_the_input_is_one_line_and_status_2(
    fault: Exception, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(config: DpoExtractConfig) -> None:
        raise fault

    assert call(main=main) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    "fault",
    [ValueError("x"), KeyError("x"), ConnectionResetError(errno.ECONNRESET, "r"), BrokenPipeError(errno.EPIPE, "x")],
)
def test_a_bug_is_raised(fault: Exception) -> None:
    def main(config: DpoExtractConfig) -> None:
        raise fault

    with pytest.raises(type(fault)):
        call(main=main)


def test_more_kinds_of_faults_can_be_named_by_class_or_by_module() -> None:
    class Wrapped(RuntimeError):
        def __init__(self, cause: Exception) -> None:
            self.cause = cause

    assert user_fault_line(KeyError("k"), [KeyError]) == "'k'"
    assert user_fault_line(LookupError("gone"), ["builtins:LookupError"]) == "gone"
    assert user_fault_line(LookupError("gone"), ["not.loaded:LookupError"]) is None
    assert user_fault_line(Wrapped(UserError("from an actor"))) == "from an actor"


def test_an_adapter_that_cannot_be_served_is_a_fault_of_the_input() -> None:
    from ember_ray.model.lora import AdapterError

    assert user_fault_line(AdapterError("rank 3")) == "rank 3"


def test_user_faults_turns_the_named_kinds_only() -> None:
    with pytest.raises(UserError, match="^engine.stages: too many$"), user_faults(ValueError, prefix="engine.stages: "):
        raise ValueError("too many")
    with pytest.raises(UserError, match="^as it is$"), user_faults(ValueError, prefix="p: "):
        raise UserError("as it is")
    with pytest.raises(KeyError), user_faults(ValueError):
        raise KeyError("x")


def test_an_error_leaves_no_traceback_and_a_bug_does() -> None:
    done = run_script("raise UserError('no model here')")
    assert (done.returncode, done.stderr) == (2, "error: no model here\n")
    done = run_script("raise RuntimeError('a bug')")
    assert done.returncode == 1 and "Traceback" in done.stderr
    done = run_script("return None", "seed=-3")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: override 'seed=-3'")


WAIT = """
    try:
        print("ready", flush=True)
        time.sleep(30)
    finally:
        print("cleaning", flush=True)
        time.sleep(0.5)
        print("cleaned", flush=True)
"""


def stopped(body: str, *numbers: int, pause: float = 0.1) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(script(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    first = process.stdout.readline()
    for number in numbers:
        process.send_signal(number)
        time.sleep(pause)
    out, err = process.communicate(timeout=30)
    return process.returncode, first + out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_runs_the_cleanup_and_ends_with_130(number: int) -> None:
    assert stopped(WAIT, number) == (130, "ready\ncleaning\ncleaned\n", "interrupted\n")


def test_two_signals_for_one_wish_do_not_break_the_cleanup() -> None:
    assert stopped(WAIT, signal.SIGINT, signal.SIGTERM) == (130, "ready\ncleaning\ncleaned\n", "interrupted\n")


def test_a_second_wish_leaves_a_cleanup_that_hangs() -> None:
    body = WAIT.replace("time.sleep(0.5)", "time.sleep(20)")
    status, out, _ = stopped(body, signal.SIGINT, signal.SIGINT, pause=1.2)
    assert (status, out) == (130, "ready\ncleaning\n")


def test_a_recipe_that_ends_by_itself_after_a_signal_still_tells_130() -> None:
    body = """
        try:
            print("ready", flush=True)
            time.sleep(30)
        except KeyboardInterrupt:
            print("saved", flush=True)
    """
    assert stopped(body, signal.SIGTERM)[:2] == (130, "ready\nsaved\n")


def test_a_library_that_takes_sigterm_over_changes_nothing() -> None:
    takes = "import signal\nsignal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))\n"
    assert stopped(takes + textwrap.dedent(WAIT), signal.SIGTERM)[:2] == (130, "ready\ncleaning\ncleaned\n")
    status, out, err = stopped(takes + "signals.reinstall()\n" + textwrap.dedent(WAIT), signal.SIGTERM)
    assert (status, out, err) == (130, "ready\ncleaning\ncleaned\n", "interrupted\n")


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    call()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    signals.reinstall()  # outside a run: no effect
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
