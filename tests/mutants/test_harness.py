"""The mutants harness itself, on a package of three lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")
CODE = "LIMIT = 3\n\n\ndef allowed(value):\n    return value <= LIMIT\n"
# The second test looks at the code from a process of its own, as a Ray worker does.
TESTS = """
import subprocess, sys
from small.limits import allowed

def test_above():
    assert not allowed(5)

def test_in_a_child_process():
    child = "from small.limits import allowed; print(allowed(4))"
    assert subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout == "False\\n"
"""
KILLED = 'Mutant("off-by-one", "small.limits", "value <= LIMIT", "value <= LIMIT + 1", ("test_limits.py",))'
SURVIVES = 'Mutant("equal", "small.limits", "value <= LIMIT", "value < LIMIT", ("test_limits.py",))'


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "__init__.py").touch()
    (tmp_path / "small" / "limits.py").write_text(CODE)
    (tmp_path / "test_limits.py").write_text(TESTS)
    return tmp_path


def run(project: Path, *mutants: str) -> subprocess.CompletedProcess[str]:
    registry = project / "registry.py"
    registry.write_text(f"from mutant import Mutant\n\nMUTANTS = [{', '.join(mutants)}]\n")
    command = [sys.executable, RUN, "--registry", registry, "--root", project, "--limit", "60"]
    return subprocess.run(command, capture_output=True, text=True, cwd=project)


def test_the_registry_fits_the_code_as_it_is() -> None:
    result = subprocess.run([sys.executable, RUN, "--list"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "lse-merge" in result.stdout.splitlines()


@pytest.mark.slow
def test_a_noticed_fault_is_killed_and_no_file_changes(project: Path) -> None:
    result = run(project, KILLED)
    assert result.returncode == 0, result.stderr
    # test_above stays green at 5, so only the child process can have noticed: the fault reached it.
    assert "by test_limits.py::test_in_a_child_process" in result.stdout
    assert (project / "small" / "limits.py").read_text() == CODE


@pytest.mark.slow
def test_a_survivor_fails_the_run_and_is_named(project: Path) -> None:
    result = run(project, KILLED, SURVIVES)
    assert result.returncode == 1, result.stderr
    assert "equal       SURVIVED" in result.stdout
    assert "1 killed, 1 survived" in result.stdout


def test_text_that_is_not_there_once_is_refused(project: Path) -> None:
    result = run(project, 'Mutant("gone", "small.limits", "LIMIT", "4", ("test_limits.py",))')
    assert result.returncode == 2
    assert "mutant 'gone': its old text is 2 times in 'small/limits.py'" in result.stderr


def test_a_fault_that_is_no_python_is_refused(project: Path) -> None:
    result = run(project, 'Mutant("typo", "small.limits", "value <= LIMIT", "value <=", ("test_limits.py",))')
    assert result.returncode == 2
    assert "mutant 'typo' is not valid Python" in result.stderr


@pytest.mark.slow
def test_tests_that_fail_without_a_fault_are_an_error(project: Path) -> None:
    (project / "test_limits.py").write_text("def test_red():\n    assert False\n")
    result = run(project, KILLED)
    assert result.returncode == 2
    assert "must pass before a fault can be seen" in result.stderr


@pytest.mark.slow
def test_a_failed_import_kills_nothing(project: Path) -> None:
    breaks = 'Mutant("import", "small.limits", "LIMIT = 3", "LIMIT = 3 / 0", ("test_limits.py",))'
    result = run(project, breaks)
    assert result.returncode == 2
    assert "no failed test" in result.stderr


@pytest.mark.slow
def test_no_tests_at_all_are_an_error(project: Path) -> None:
    result = run(project, KILLED.replace('("test_limits.py",)', '("test_limits.py", "-k", "nothing")'))
    assert result.returncode == 2
