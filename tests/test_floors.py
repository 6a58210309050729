"""The import rule of the floors holds, and the check would notice if it did not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("actors", "cuda_ext", "ember_ray", "recipes", "verifiers")
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter over the packages in a folder, with the contracts of its pyproject.toml."""
    return subprocess.run([sys.executable, "-c", LINT, "--no-cache"], cwd=folder, capture_output=True, text=True)


def test_the_import_rule_holds() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 kept, 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("package", "line", "broken"),
    [
        ("actors", "import recipes", "A floor imports only from floors below it"),
        ("ember_ray", "import actors", "A floor imports only from floors below it"),
        ("ember_ray", "import verifiers", "A floor imports only from floors below it"),
        ("cuda_ext", "import ember_ray", "A floor imports only from floors below it"),
        ("ember_ray", "def late():\n    import ray", "One process knows nothing of Ray"),
        ("cuda_ext", "import transformers", "Kernels need torch only"),
        ("verifiers", "import torch", "Verifiers can be used by anyone"),
        ("verifiers", "def late():\n    from ray import get", "Verifiers can be used by anyone"),
        ("verifiers", "from ember_ray import data", "Verifiers can be used by anyone"),
    ],
)
def test_a_planted_import_is_caught(tmp_path: Path, package: str, line: str, broken: str) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for name in PACKAGES:  # empty rooms: the rule alone is looked at, and quickly
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "ember_ray" / "data").mkdir()
    (tmp_path / "ember_ray" / "data" / "__init__.py").touch()
    assert lint(tmp_path).returncode == 0
    (tmp_path / package / "planted.py").write_text(f"{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert any(row.startswith(broken) and row.endswith("BROKEN") for row in result.stdout.splitlines())


@pytest.mark.parametrize(
    ("package", "absent"),
    [
        ("verifiers", ("torch", "ray", "transformers", "ember_ray")),
        pytest.param("cuda_ext", ("ray", "transformers", "ember_ray"), marks=pytest.mark.slow),
        pytest.param("ember_ray", ("ray", "actors", "recipes", "verifiers"), marks=pytest.mark.slow),
    ],
)
def test_what_a_package_loads(package: str, absent: tuple[str, ...]) -> None:
    """Imports every module of a package in a fresh process, and looks at what came along (also by other packages)."""
    code = f"""
import importlib.util, pkgutil, sys
import {package}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    if importlib.util.find_spec(module.name).origin.endswith(".py"):  # the CUDA library lies there, too, once built
        importlib.import_module(module.name)
print(sorted(set({absent!r}) & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"
