"""Dependencies are declared once and pinned, and an installed copy has all that it needs."""

from __future__ import annotations

import ast
import ctypes
import importlib.metadata
import importlib.resources
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import build_cuda  # noqa: E402

PACKAGES = ("actors", "configs", "cuda_ext", "ember_ray", "recipes", "verifiers")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = {
    canonicalize_name(requirement.name): requirement
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
    for requirement in [Requirement(line)]
}
# torch pins its own CUDA packages to the digit; which of them come depends on the build of torch.
PINNED_BY_TORCH = ("cuda-", "nvidia-", "triton")


def declared() -> list[Requirement]:
    """What `make` installs: the dependencies and the extras that are meant for everyone."""
    lines = [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["tensorboard"]]
    return [req for req in map(Requirement, lines) if req.name != PROJECT["name"]]


def installed_with(requirement: Requirement) -> set[str]:
    """Names of all packages that come with a requirement, read from what is installed."""
    names: set[str] = set()
    waiting = [requirement]
    seen: set[str] = set()
    while waiting:
        current = waiting.pop()
        name = canonicalize_name(current.name)
        if str(current) in seen or name.startswith(PINNED_BY_TORCH):
            continue
        seen.add(str(current))
        names.add(name)
        try:
            further = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for other in map(Requirement, further):
            extras = current.extras or {""}
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(other)
    return names


def imported_by_the_code() -> dict[str, str]:
    """Top-level names that the packages import, each with a file that does."""
    found: dict[str, str] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                    names = [node.module]
                else:
                    continue
                for name in names:
                    found.setdefault(name.partition(".")[0], str(path.relative_to(ROOT)))
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names and name not in PACKAGES}


def test_every_import_is_declared() -> None:
    runtime = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    optional = {canonicalize_name(Requirement(line).name) for line in [*EXTRAS["tensorboard"], *EXTRAS["gpu"]]}
    providers = importlib.metadata.packages_distributions()
    undeclared = {
        name: path
        for name, path in imported_by_the_code().items()
        if not {canonicalize_name(by) for by in providers.get(name, [name])} & (runtime | optional)
    }
    assert not undeclared, f"imported, but not declared in pyproject.toml: {undeclared}"


def test_nothing_is_declared_that_no_code_imports() -> None:
    providers = importlib.metadata.packages_distributions()
    used = {canonicalize_name(by) for name in imported_by_the_code() for by in providers.get(name, [name])}
    assert {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]} <= used


def test_every_pin_is_in_its_range_and_everything_declared_is_pinned() -> None:
    for requirement in declared():
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt has no {requirement.name}"
        version = str(pin.specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{pin} is outside {requirement}"


def test_the_pins_cover_what_comes_along() -> None:
    unpinned = {name: str(req) for req in declared() for name in installed_with(req) if name not in PINS}
    assert not unpinned, f"not in constraints.txt: {unpinned}"


def test_pins_name_no_build_and_no_address() -> None:
    for pin in PINS.values():
        assert pin.url is None and str(pin.specifier).startswith("==") and "+" not in str(pin.specifier), pin


def test_configs_are_found_as_package_data() -> None:
    names = {path.name for path in importlib.resources.files("configs").iterdir()}
    assert {path.name for path in (ROOT / "configs").glob("*.yaml")} <= names


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that git knows or would take."""
    folder = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def build(kind: str, source: Path, out: Path, **environ: str) -> tuple[Path, str]:
    """What pip makes of a source tree ("wheel" or "sdist"), and all that was said on the way."""
    command = f"import setuptools.build_meta, sys; setuptools.build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", command, out],
        cwd=source,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return next(path for path in out.iterdir() if path.suffix in (".whl", ".gz")), done.stdout


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `pip install .` makes where there is no nvcc."""
    folder = tmp_path_factory.mktemp("wheel")
    made, said = build("wheel", source, folder, CUDA_HOME=str(folder), PATH=str(folder))
    assert "CUDA kernels are not built: there is no nvcc on the PATH or in CUDA_HOME" in said
    return made


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(wheel: Path, source: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in packed} == set(PACKAGES)
    wanted = {
        str(path.relative_to(source))
        for package in PACKAGES
        for path in (source / package).rglob("*")
        if path.is_file() and (path.suffix in (".py", ".yaml") or "assets" in path.parts)
    }
    assert packed == wanted


@pytest.mark.slow
@pytest.mark.skipif(build_cuda.find_nvcc() is None, reason="there is no nvcc on this machine")
def test_a_wheel_from_the_sdist_holds_a_library_that_loads(source: Path, tmp_path: Path) -> None:
    sdist, _ = build("sdist", source, tmp_path, EMBER_SKIP_CUDA="1")
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    unpacked = next((tmp_path / "unpacked").iterdir())
    kernels = unpacked / "cuda_ext" / "csrc"
    assert {path.name for path in kernels.iterdir()} == {path.name for path in build_cuda.SOURCES.iterdir()}
    for path in kernels.glob("*.cu"):
        if path.name != "library.cu":  # that all compile is tested elsewhere
            path.unlink()
    made, _ = build("wheel", unpacked, tmp_path / "out", EMBER_CUDA_ARCHS="90")
    assert "-py3-none-linux_" in made.name
    with zipfile.ZipFile(made) as archive:
        archive.extractall(tmp_path / "site")
        assert not [name for name in archive.namelist() if "csrc" in name or name.startswith("tools")]
    library = ctypes.CDLL(str(tmp_path / "site" / "cuda_ext" / "libember_cuda.so"))
    library.ember_built_for.restype = ctypes.c_char_p
    assert library.ember_built_for() == b"900"


@pytest.mark.slow
def test_a_wish_not_to_build_kernels_is_granted(source: Path, tmp_path: Path) -> None:
    left = source / "build" / "lib" / "cuda_ext" / "libember_cuda.so"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_text("of an earlier build")
    made, said = build("wheel", source, tmp_path, EMBER_SKIP_CUDA="1")
    assert made.name.endswith("-py3-none-any.whl") and "not built: EMBER_SKIP_CUDA is set" in said
    with zipfile.ZipFile(made) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]


@pytest.mark.slow
def test_an_installed_copy_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (elsewhere / "configs").mkdir(parents=True)  # a folder of the same name must not come first
    code = """
import importlib.resources, recipes
print(sorted(path.name for path in importlib.resources.files("configs").iterdir() if path.suffix == ".yaml"))
print(recipes.__file__)
"""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(1, {str(site)!r}){code}"]
    result = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    yaml, module = result.stdout.splitlines()
    assert yaml == str(sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
    assert module.startswith(str(site))
