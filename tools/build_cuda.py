"""Compiles ``cuda_ext/csrc/*.cu`` into ``cuda_ext/libember_cuda.so``; setup.py calls it where nvcc is found.

    python tools/build_cuda.py [--arch 80 --arch 86 --arch 89 --arch 90 --arch 90a] [--out FILE]

It needs nvcc and a C++ compiler, no torch and no GPU. What it compiles is kept in ``build/cuda`` under a hash of the
file, its headers, the compiler and the flags, so what has not changed is not compiled again; the compiler's report of
each file (registers, spills) is kept beside it.

Environment: CUDA_HOME says where nvcc is, EMBER_CUDA_ARCHS=90a (or 80,90a) limits the targets, EMBER_SKIP_CUDA=1
makes an installation build nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "cuda_ext" / "csrc"
LIBRARY = ROOT / "cuda_ext" / "libember_cuda.so"
WORK = ROOT / "build" / "cuda"
ARCHS = ("80", "86", "89", "90", "90a")
FLAGS = (
    *("-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
    *("-lineinfo", "-Xfatbin", "-compress-all", "-Xptxas", "-v"),
)


class BuildError(RuntimeError):
    """Something does not compile; the text holds the compiler's own words."""


def find_nvcc(environ: Mapping[str, str] = os.environ) -> str | None:
    """The compiler of CUDA_HOME (or CUDA_PATH), else of the PATH, else of the usual place."""
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    path = environ.get("PATH", "")
    return shutil.which(
        "nvcc", path=f"{home}/bin{os.pathsep}{path}" if home else f"{path}{os.pathsep}/usr/local/cuda/bin"
    )


def reason_to_skip(environ: Mapping[str, str] = os.environ) -> str | None:
    """Why an installation builds no library, or None."""
    if environ.get("EMBER_SKIP_CUDA", "0") not in ("", "0"):
        return "EMBER_SKIP_CUDA is set"
    return None if find_nvcc(environ) else "there is no nvcc on the PATH or in CUDA_HOME"


def chosen_archs(environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The targets that EMBER_CUDA_ARCHS names, or all."""
    archs = tuple(re.split(r"[\s,;]+", environ.get("EMBER_CUDA_ARCHS", "").strip()))
    if archs == ("",):
        return ARCHS
    for arch in archs:
        if arch not in ARCHS:
            raise BuildError(f"EMBER_CUDA_ARCHS names '{arch}'; the kernels are written for {', '.join(ARCHS)}")
    return archs


def targets(archs: tuple[str, ...]) -> list[str]:
    """Machine code for each, and PTX of the newest that is no Hopper special, for GPUs to come."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if "90" in archs:
        flags.append("-gencode=arch=compute_90,code=compute_90")
    return flags


def with_headers(source: Path) -> list[Path]:
    """A source file and all of our headers that it includes, directly or not."""
    found: list[Path] = []
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.append(path)
            waiting += [path.parent / name for name in re.findall(r'^\s*#include "([^"]+)"', path.read_text(), re.M)]
    return sorted(found)


def run(command: list[str], what: str) -> str:
    """What the compiler says on its error channel, where it puts its reports."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{what} does not compile:\n{done.stdout}{done.stderr}")
    return done.stderr


def build(
    archs: tuple[str, ...] = ARCHS, out: Path = LIBRARY, work: Path = WORK, say: Callable[[str], object] = print
) -> list[Path]:
    """Compiles what has changed and links the library; a half-made file never stands under a final name.

    Returns:
        The compiler's report on each source file.

    Raises:
        BuildError: no nvcc, or a file that does not compile.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("there is no nvcc; install the CUDA toolkit or set CUDA_HOME")
    work.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, *targets(archs)]
    compiler = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    # The long ones first, so that no core idles at the end: what includes most, takes longest.
    sources = sorted(SOURCES.glob("*.cu"), key=lambda path: -sum(part.stat().st_size for part in with_headers(path)))
    part = f".{os.getpid()}.part"

    def compile_one(source: Path) -> Path:
        digest = hashlib.sha256(repr((compiler, flags)).encode())
        for path in with_headers(source):
            digest.update(path.read_bytes())
        target = work / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            start = time.monotonic()
            report = run([nvcc, *flags, "-c", str(source), "-o", str(target) + part], source.name)
            target.with_suffix(".log").write_text(report)
            os.replace(str(target) + part, target)
            say(f"Compiling CUDA: {source.name} took {time.monotonic() - start:.0f} s")
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    out.parent.mkdir(parents=True, exist_ok=True)
    # nvcc's own runtime goes in statically: the library then needs the driver alone.
    link = [nvcc, "-shared", *targets(archs[-1:]), "-cudart", "static", *map(str, objects), "-o", str(out) + part]
    run(link, out.name)
    os.replace(str(out) + part, out)
    return [target.with_suffix(".log") for target in objects]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append", choices=ARCHS, help="a target; may be given several times")
    parser.add_argument("--out", type=Path, default=LIBRARY)
    options = parser.parse_args()
    start = time.monotonic()
    try:
        archs = tuple(options.arch or chosen_archs())
        build(archs, options.out, say=lambda text: print(text, flush=True))
    except BuildError as fault:
        sys.exit(str(fault))
    print(f"{options.out} for {', '.join(archs)} in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
