"""A finished cell as one row: all that tables and figures of a comparison are made from, read off its run folder."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ember_ray.config.errors import UserError
from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import Candidate
from ember_ray.evaluation.cost import gpu_dollars
from ember_ray.tracking.comparison_cells import Cell
from ember_ray.tracking.evaluation_curves import TaskReader, evaluate
from ember_ray.tracking.files import read_jsonl

QUALITY = "exact_match_sampled"
"""The measure by which learners are compared."""


def cell_row(
    cell: Cell,
    run: Path,
    output_dir: Path,
    *,
    reader: TaskReader,
    wall_seconds: float,
    at_once: int,
    gpus: int,
    gpu_price_per_hour: float,
    token_budget: int,
    machine: str,
) -> dict[str, Any]:
    """The row of a finished cell.

    Args:
        run: its run folder.
        output_dir: of the comparison; the row names the run relative to it.
        reader: of the task, for pass@k and the curves of best-of-N.
        wall_seconds: from its start to its end.
        at_once: cells that ran at the same time at most.
        gpus: that they shared; 0 where there are none, and then they shared the cores.
        gpu_price_per_hour: of a GPU, or of the machine; the dollars are of the cell's share.
        token_budget: generated tokens that a learner may learn from.
        machine: what it ran on, in words.

    Returns:
        ``cell``, ``task``, ``algorithm``, ``design``, ``seed``, ``start``, ``settings``, ``run``; ``before`` and
        ``after`` with everything that ``evaluation_curves.evaluate`` measures; ``gain`` of ``evaluation.gains``;
        ``beyond_interval`` and ``beyond_interval_greedy``: whether the paired gain's interval lies above 0;
        ``above_start_interval``: whether the mean after lies above the interval before (the harder question);
        ``generated_tokens`` that were learnt from, ``evaluation_tokens``, ``token_budget`` (None for SFT);
        ``rounds``, ``seconds`` by phase, ``training_seconds`` (all rounds), ``wall_seconds``, ``dollars`` of the
        training seconds; ``curve``, a point a round with ``generated_tokens`` and ``seconds`` added up, and
        ``exact_match`` and ``reward`` of the round's candidates, which the policy before it made; ``mismatch`` of the
        last round that has it, and without rollouts to learn from of the held-out answers after it; versions, commit,
        machine.

    Raises:
        UserError: the folder is not that of a finished run.
    """
    summary = _summary(run)
    if summary["status"] != "finished" or not summary["after"]:
        raise UserError(f"the run in '{run}' is {summary['status']}, not finished")
    metrics = read_jsonl(run / "metrics.jsonl")
    curve = _curve(metrics)
    learnt_from = curve[-1]["generated_tokens"] if curve else 0
    training_seconds = curve[-1]["seconds"] if curve else 0.0
    measured = {when: _measures(run / "eval" / f"{when}.jsonl", reader, cell.seed) for when in ("before", "after")}
    gain = summary["gain"]
    start_interval = measured["before"].get(f"{QUALITY}_interval")
    return {
        "cell": cell.id,
        "task": cell.task,
        "algorithm": cell.algorithm,
        "design": cell.design,
        "seed": cell.seed,
        "start": cell.start,
        "settings": list(cell.settings),
        "run": os.path.relpath(run, output_dir),
        **measured,
        "gain": gain,
        "beyond_interval": _above_zero(gain, QUALITY),
        "beyond_interval_greedy": _above_zero(gain, "exact_match_greedy"),
        "above_start_interval": bool(start_interval and measured["after"][QUALITY] > start_interval[1]),
        "generated_tokens": learnt_from,
        "evaluation_tokens": summary["generated_tokens"] - learnt_from,
        "token_budget": token_budget if cell.design is not None else None,
        "rounds": summary["rounds"],
        "seconds": summary["seconds"],
        "training_seconds": round(training_seconds, 3),
        "wall_seconds": round(wall_seconds, 3),
        "gpu_price_per_hour": gpu_price_per_hour,
        "at_once": at_once,
        "gpus": gpus,
        "dollars": gpu_dollars(training_seconds * max(1, gpus) / at_once, gpu_price_per_hour),
        "curve": curve,
        "mismatch": next(
            (found for row in reversed(metrics) if (found := _mismatch(row))),
            _mismatch(summary.get("mismatch", {}).get("after", {})),
        ),
        "versions": summary["versions"],
        "git_commit": summary["git_commit"],
        "git_dirty": summary["git_dirty"],
        "machine": machine,
    }


def find_run(folder: Path) -> Path:
    """The run folder that a cell's only attempt made.

    Raises:
        UserError: there is none, or there are several.
    """
    runs = sorted(path for path in folder.glob("*") if path.is_dir())
    if len(runs) != 1:
        raise UserError(f"'{folder}' holds {len(runs)} runs, not one")
    return runs[0]


def read_groups(path: Path) -> tuple[list[ScoredGroup], list[ScoredGroup]]:
    """Sampled and greedy groups of an evaluation file that ``RunFolder.write_eval`` wrote.

    Raises:
        UserError: there is no such file, or it is not one.
    """
    kinds: dict[str, list[ScoredGroup]] = {"sampled": [], "greedy": []}
    rows = read_jsonl(path)
    if not rows:
        raise UserError(f"'{path}' has no evaluation")
    for row in rows:
        try:
            kinds[row["kind"]].append(_group(row))
        except (KeyError, TypeError) as fault:
            raise UserError(f"'{path}' is no evaluation: a row lacks {fault}") from None
    return kinds["sampled"], kinds["greedy"]


def machine_words() -> str:
    """Cores, system and GPUs of this machine, e.g. ``2 cores, x86_64, Linux``."""
    words = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    return ", ".join([words, *_ask_nvidia_smi("name")])


def gpus_to_share() -> list[str]:
    """The GPUs that cells may use, as CUDA_VISIBLE_DEVICES names them: those that this process sees."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _ask_nvidia_smi("index") if named is None else [one.strip() for one in named.split(",") if one.strip()]


def _ask_nvidia_smi(what: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    asked = subprocess.run(
        ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"], capture_output=True, text=True
    )
    return [line.strip() for line in asked.stdout.splitlines() if line.strip()] if asked.returncode == 0 else []


def _summary(run: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UserError(f"the summary of the run in '{run}' cannot be read: {fault}") from None
    return found


def _measures(path: Path, reader: TaskReader, seed: int) -> dict[str, Any]:
    sampled, greedy = read_groups(path)
    return evaluate(sampled, greedy, reader, seed)


def _group(row: Mapping[str, Any]) -> ScoredGroup:
    candidates = [
        ScoredCandidate(
            Candidate(
                request_id=row["request_id"],
                index=one["index"],
                token_ids=one["token_ids"],
                logprobs=one["logprobs"],
                sampling_logprobs=one["sampling_logprobs"],
                text=one["text"],
                finish_reason=one["finish_reason"],
                policy_version=one["policy_version"],
                cache_exact=one["cache_exact"],
            ),
            reward=one["reward"],
            components=one["rewards"],
            reason=one["reason"],
        )
        for one in row["candidates"]
    ]
    return ScoredGroup(row["request_id"], row["prompt"], tuple(row["prompt_token_ids"]), candidates)


def _curve(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    points, tokens, seconds = [], 0, 0.0
    for row in metrics:
        tokens += int(row.get("generated_tokens", 0))
        seconds += row["seconds/round"]
        points.append(
            {
                "round": row["round"],
                "generated_tokens": tokens,
                "seconds": round(seconds, 3),
                "exact_match": row.get("exact_match"),
                "reward": row.get("reward"),
            }
        )
    return points


def _mismatch(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix("mismatch/"): value for key, value in row.items() if key.startswith("mismatch/")}


def _above_zero(gain: Mapping[str, Any], measure: str) -> bool:
    bounds = gain.get(f"{measure}_interval")
    return bool(bounds and bounds[0] > 0)
