"""Creates .venv and installs the project with its tested versions; `make` calls it when either is out of date.

What pip prints goes to .venv/install.log; a terminal sees one moving line of it, and a fault shows pip's own words.
The CUDA kernels are compiled meanwhile: pip keeps one core busy at most, and their compiler needs no package.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import build_cuda

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOG, KERNELS_LOG = VENV / "install.log", VENV / "kernels.log"
STEP = re.compile(r"^\s*((?:Collecting|Downloading|Building|Preparing|Installing)\b[^\n(]*)", re.MULTILINE)
CHECK = """
import importlib.metadata as installed
import ray, torch, transformers
from cuda_ext.device import CudaUnavailable, require_cuda
names = ("torch", "ray", "transformers", "peft", "trl")
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device, so everything runs on the CPU"
print(", ".join(f"{name} {installed.version(name)}" for name in names) + f"; {device}")
try:
    if torch.cuda.is_available():
        require_cuda("cuda")
except CudaUnavailable as fault:
    print(fault)
"""


def say(stage: int, text: str) -> None:
    print(f"[{stage}/4] {text}", flush=True)


def create_venv() -> None:
    """An environment that works is kept; one that does not (moved, half made, its Python gone) is made anew."""
    if PYTHON.exists():
        check = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
        if subprocess.run([PYTHON, "-c", check], capture_output=True).returncode == 0:
            return say(1, "keeping .venv")
        shutil.rmtree(VENV)
    say(1, f"creating .venv with Python {sys.version.split()[0]}")
    made = subprocess.run([sys.executable, "-m", "venv", VENV], capture_output=True, text=True)
    if made.returncode != 0:
        shutil.rmtree(VENV, ignore_errors=True)
        sys.exit(
            f"{made.stdout}{made.stderr}\n{sys.executable} cannot create a virtual environment; install its venv "
            "module (Debian and Ubuntu: apt install python3-venv) or name another Python: make PYTHON=python3.12"
        )


def install() -> None:
    """Runs pip with the user's own settings; exits with pip's last lines when it fails."""
    say(2, "installing the packages (the first time about 2 GB and a few minutes; details: .venv/install.log)")
    command = [PYTHON, "-m", "pip", "install", "--constraint", "constraints.txt", "--editable", ".[dev]"]
    environ = {**os.environ, "EMBER_SKIP_CUDA": "1"}  # the next step does it, where one can see it
    start = time.monotonic()
    with open(LOG, "w", encoding="utf-8") as log:
        pip = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environ)
        while True:
            try:
                status = pip.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                show(f"{time.monotonic() - start:3.0f} s  {last_step()}")
    show("")
    if status != 0:
        lines = [line for line in LOG.read_text(errors="replace").splitlines() if not line.startswith("WARNING")]
        sys.exit("\n".join(lines[-20:]) + "\npip could not install the packages; all it said is in .venv/install.log")
    print(f"      done in {time.monotonic() - start:.0f} s", flush=True)


def last_step() -> str:
    """What pip does right now: the last line of its log that says so."""
    steps = STEP.findall(LOG.read_text(encoding="utf-8", errors="replace"))
    return steps[-1] if steps else "starting pip"


def show(text: str) -> None:
    """Replaces the moving line, where there is a terminal to move it on; an empty text removes it."""
    if sys.stdout.isatty():
        line = f"      {text}"[: shutil.get_terminal_size().columns - 1] if text else ""
        print(f"\r\033[K{line}", end="", flush=True)


def begin_kernels() -> subprocess.Popen[bytes] | None:
    """Begins to build the CUDA library where nvcc is found."""
    if build_cuda.reason_to_skip():
        return None
    with open(KERNELS_LOG, "wb") as log:
        return subprocess.Popen(
            [sys.executable, "-u", build_cuda.__file__], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def finish_kernels(kernels: subprocess.Popen[bytes] | None) -> None:
    """Waits for the CUDA library; exits with nvcc's words when a kernel does not compile."""
    if kernels is None:
        return say(3, f"leaving out the CUDA kernels: {build_cuda.reason_to_skip()}")
    say(3, "compiling the CUDA kernels (the first time a few minutes; begun beside the packages)")
    start = time.monotonic()
    while kernels.poll() is None:
        show((KERNELS_LOG.read_text(errors="replace").splitlines() or ["..."])[-1])
        time.sleep(0.5)
    show("")
    said = KERNELS_LOG.read_text(errors="replace").strip()
    if kernels.returncode:
        sys.exit(f"{said}\nthe CUDA kernels could not be built; EMBER_SKIP_CUDA=1 leaves them out, for use on the CPU")
    print(f"      {said.splitlines()[-1]}, {time.monotonic() - start:.0f} s of it after the packages", flush=True)


def stop(kernels: subprocess.Popen[bytes] | None) -> None:
    """Ends the compilers too."""
    if kernels is not None and kernels.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(kernels.pid, signal.SIGTERM)
        kernels.wait()


def check() -> None:
    """Imports the large packages once, so that a broken one shows here and not in the middle of a run."""
    say(4, "checking")
    found = subprocess.run([PYTHON, "-c", CHECK], cwd=ROOT, capture_output=True, text=True)
    if found.returncode != 0:
        sys.exit(f"{found.stderr}\nan installed package does not work; run make clean, then make again")
    print(f"      {found.stdout.strip()}", flush=True)


def main() -> None:
    kernels = None
    try:
        create_venv()
        kernels = begin_kernels()
        install()
        finish_kernels(kernels)
        check()
    except KeyboardInterrupt:
        sys.exit("\nstopped; the next make goes on from here")
    finally:
        stop(kernels)
    (VENV / "installed.stamp").touch()


if __name__ == "__main__":
    main()
