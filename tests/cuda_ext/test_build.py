"""The CUDA library without a GPU: every kernel compiles for every target, none spills, and faces and library agree."""

from __future__ import annotations

import ast
import ctypes
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import build_cuda  # noqa: E402

CUDA_EXT = ROOT / "cuda_ext"
needs_nvcc = pytest.mark.skipif(build_cuda.find_nvcc() is None, reason="there is no nvcc on this machine")

MAY_SPILL: dict[str, str] = {}
"""Kernels that may keep values in local memory, each with the reason. All others would be slow for it."""

REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\w+)'\n.*\n"
    r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The library for all targets and the compiler's reports; what an installation compiled is used again."""
    library = tmp_path_factory.mktemp("cuda") / "libember_cuda.so"
    return library, build_cuda.build(out=library)


def entry_points() -> dict[str, int]:
    """Functions of the library that faces may call, with the number of their arguments but for the stream."""
    found = {}
    for source in sorted(build_cuda.SOURCES.glob("*.cu")):
        for name, parameters in re.findall(r"EMBER_API int ember_(\w+)\(([^)]*)\)", source.read_text()):
            if parameters.rstrip().endswith("cudaStream_t stream"):
                found[name] = parameters.count(",")
    return found


def launches() -> Iterator[tuple[str, str, int | None]]:
    """(file, entry point, number of arguments or None where a list of unknown length is among them) of all calls."""
    for path in sorted(CUDA_EXT.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("launch", "library.launch")):
                continue
            name, *arguments = node.args
            assert isinstance(name, ast.Constant), f"{path.name}:{node.lineno} must name its kernel in plain letters"
            count: int | None = 0
            for argument in arguments:
                if not isinstance(argument, ast.Starred):
                    count = None if count is None else count + 1
                elif isinstance(argument.value, ast.Tuple):
                    count = None if count is None else count + len(argument.value.elts)
                else:
                    count = None
            yield path.name, str(name.value), count


def test_every_face_calls_an_entry_point_with_all_its_arguments_and_none_is_without_a_face() -> None:
    points, called = entry_points(), list(launches())
    for file, name, count in called:
        assert name in points, f"{file} calls ember_{name}, which no source defines"
        assert count in (None, points[name]), f"{file} calls ember_{name} with {count} arguments of {points[name]}"
    assert {name for _, name, _ in called} == set(points)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_every_target_and_keeps_its_values_in_registers(
    built: tuple[Path, list[Path]],
) -> None:
    _, reports = built
    assert {report.name.rpartition("-")[0] for report in reports} == {p.stem for p in build_cuda.SOURCES.glob("*.cu")}
    spilling, archs, used = [], set(), set()
    for report in reports:
        for match in REPORT.finditer(report.read_text()):
            archs.add(match["arch"])
            if (match["stack"], match["stores"], match["loads"]) == ("0", "0", "0"):
                continue
            excuse = next((name for name in MAY_SPILL if name in match["kernel"]), None)
            used.add(excuse)
            if excuse is None:
                spilling.append(" ".join(match.groups()))
    assert archs == set(build_cuda.ARCHS)
    assert not spilling, "\n".join(["kernel, arch, bytes of stack frame, spill stores and loads:", *spilling])
    assert used == set(MAY_SPILL), "a kernel that may spill does not (any more)"


@needs_nvcc
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_library_loads_without_a_gpu_and_holds_every_entry_point(built: tuple[Path, list[Path]]) -> None:
    library = ctypes.CDLL(str(built[0]))
    assert [name for name in entry_points() if not hasattr(library, f"ember_{name}")] == []
    library.ember_built_for.restype = ctypes.c_char_p
    assert library.ember_built_for() == b"800,860,890,900"
    assert library.ember_runtime_version() >= 12000
    needed = subprocess.run(["ldd", built[0]], capture_output=True, text=True).stdout
    assert "libcuda" not in needed and "torch" not in needed and "python" not in needed


@needs_nvcc
@pytest.mark.slow
def test_a_fault_in_a_source_shows_the_compilers_words_and_leaves_the_old_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "half.cuh").write_text("__device__ inline float half_of(float x) { return x / 2; }\n")
    code = '#include "half.cuh"\n__global__ void halve(float* x) { *x = half_of(*x); }\n'
    (sources / "good.cu").write_text(code)
    monkeypatch.setattr(build_cuda, "SOURCES", sources)
    out, work, said = tmp_path / "out" / "lib.so", tmp_path / "work", list[str]()

    def build() -> None:
        build_cuda.build(("90a",), out, work, said.append)

    build()
    assert out.exists() and len(said) == 1 and "good.cu" in said[0]
    said.clear()
    build()
    assert not said, "nothing has changed, so nothing is to be compiled"
    (sources / "half.cuh").write_text("__device__ inline float half_of(float x) { return x / 2.0f; }\n")
    build()
    assert len(said) == 1, "the file that includes the changed header is compiled again"
    before = out.read_bytes()
    (sources / "bad.cu").write_text("__global__ void broken() { this_is_no_function(); }\n")
    with pytest.raises(
        build_cuda.BuildError, match=r'bad.cu does not compile:\n[^$]*"this_is_no_function" is undefined'
    ):
        build()
    assert out.read_bytes() == before
    assert not list(tmp_path.rglob("*.part"))


def test_targets_and_the_compiler_are_chosen_by_the_environment(tmp_path: Path) -> None:
    assert build_cuda.chosen_archs({}) == build_cuda.ARCHS
    assert build_cuda.chosen_archs({"EMBER_CUDA_ARCHS": " 90a "}) == ("90a",)
    assert build_cuda.chosen_archs({"EMBER_CUDA_ARCHS": "80;86,90"}) == ("80", "86", "90")
    with pytest.raises(build_cuda.BuildError, match="names '75'; the kernels are written for 80, 86"):
        build_cuda.chosen_archs({"EMBER_CUDA_ARCHS": "75"})
    assert build_cuda.targets(("90a",)) == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert build_cuda.targets(("90",))[-1] == "-gencode=arch=compute_90,code=compute_90"
    for folder in ("home/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").touch(mode=0o755)
    home, path = str(tmp_path / "home"), str(tmp_path / "path")
    assert build_cuda.find_nvcc({"CUDA_HOME": home, "PATH": path}) == f"{home}/bin/nvcc"
    assert build_cuda.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": path}) == f"{path}/nvcc"
    assert build_cuda.find_nvcc({"CUDA_HOME": str(tmp_path), "PATH": ""}) is None
