"""Compiles ``cuda_ext/csrc/*.cu`` into ``cuda_ext/libember_cuda.so``; setup.py calls it where nvcc is found.

    python tools/build_cuda.py [--arch 80 --arch 86 --arch 89 --arch 90 --arch 90a]

Files that have not changed since the last build are not compiled again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "cuda_ext" / "csrc"
LIBRARY = ROOT / "cuda_ext" / "libember_cuda.so"
ARCHS = ("80", "86", "89", "90", "90a")
FLAGS = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-lineinfo", "-Xptxas", "-v"]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def targets(archs: tuple[str, ...]) -> list[str]:
    """Machine code for each, and PTX of the newest that is no Hopper special, for GPUs to come."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    if "90" in archs:
        flags.append("-gencode=arch=compute_90,code=compute_90")
    return flags


def build(archs: tuple[str, ...] = ARCHS, out: Path = LIBRARY, work: Path = ROOT / "build" / "cuda") -> None:
    nvcc = find_nvcc()
    if nvcc is None:
        sys.exit("there is no nvcc; install the CUDA toolkit or set CUDA_HOME")
    work.mkdir(parents=True, exist_ok=True)
    headers = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.cuh")))

    def compile_one(source: Path) -> Path:
        key = hashlib.sha256(headers + source.read_bytes() + repr((archs, FLAGS)).encode()).hexdigest()[:16]
        target = work / f"{source.stem}-{key}.o"
        if not target.exists():
            command = [nvcc, *FLAGS, *targets(archs), "-c", str(source), "-o", str(target) + ".part"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{source.name} does not compile:\n{done.stdout}{done.stderr}")
            (work / f"{source.stem}-{key}.log").write_text(done.stderr)
            os.replace(str(target) + ".part", target)
        return target

    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, sorted(SOURCES.glob("*.cu"))))
    link = [nvcc, "-shared", *targets(archs[-1:]), "-o", str(out) + ".part", *map(str, objects), "-cudart", "static"]
    subprocess.run(link, check=True)
    os.replace(str(out) + ".part", out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", action="append")
    parser.add_argument("--out", type=Path, default=LIBRARY)
    options = parser.parse_args()
    build(tuple(options.arch or ARCHS), options.out)
