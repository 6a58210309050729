"""``summary.json``: what a run came to, in one small file that tools can compare."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

_PACKAGES = ("ember-ray", "torch", "ray", "transformers", "peft", "trl", "numpy")


def build_summary(
    *,
    name: str,
    seed: int,
    status: Literal["finished", "interrupted", "failed"],
    rounds: int,
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any] | None,
    gain: Mapping[str, Any] | None,
    seconds: Mapping[str, float],
    counters: Mapping[str, float],
    policy_version: int,
    **extra: Any,
) -> dict[str, Any]:
    """Puts the summary together.

    Args:
        name, seed: of the run.
        status: how it ended.
        rounds: rounds that were carried through.
        before, after: from ``evaluation.summarize``; None when not measured.
        gain: from ``evaluation.gains``.
        seconds: wall seconds by phase over the whole run.
        counters: the engine's totals; ``generated_tokens``, ``prefill_tokens``, ``prefix_hit_tokens`` are taken.
        policy_version: what the engine served at the end.
        extra: further keys.
    """
    commit, dirty = git_state()
    return {
        "name": name,
        "status": status,
        "before": dict(before) if before is not None else None,
        "after": dict(after) if after is not None else None,
        "gain": dict(gain) if gain is not None else None,
        "rounds": rounds,
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "generated_tokens": int(counters.get("generated_tokens", 0)),
        "prefill_tokens": int(counters.get("prefill_tokens", 0)),
        "prefix_hit_tokens": int(counters.get("prefix_hit_tokens", 0)),
        "policy_version": policy_version,
        "seed": seed,
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": versions(),
        **extra,
    }


def git_state(package_root: Path | None = None) -> tuple[str | None, bool | None]:
    """The commit that this code was checked out at, and whether tracked files differ from it.

    Returns:
        (None, None) outside a checkout of this project; a virtual environment inside another
        repository does not count, so the package's own files must be tracked there.
    """
    root = package_root or Path(__file__).resolve().parent.parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "ember_ray/__init__.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def versions() -> dict[str, str]:
    """Python and the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
