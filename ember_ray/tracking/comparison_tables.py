"""The tables of a comparison: CSV for tools, Markdown for people."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ember_ray.tracking.comparison_lines import OWN_MEASURES, TASK_NAMES, Line, Row, Spread, lines_of
from ember_ray.tracking.comparison_rows import QUALITY

MEASURES = (QUALITY, "exact_match_greedy", "f1", "rows", "reward_mean")
NUMBERS = ("generated_tokens", "training_seconds", "wall_seconds", "dollars")
MISMATCH = ("mean", "p95", "max", "outside")


def cells_csv(rows: Iterable[Row]) -> str:
    """``table2.csv``: a row a cell. Intervals are two columns, ``<measure>_low`` and ``<measure>_high``."""
    return _csv([_flat(row) for row in rows])


def summary_csv(rows: Sequence[Row], tasks: Sequence[str], designs: Sequence[str]) -> str:
    """``summary.csv``: a row a learner and design; each number as its mean over seeds, ``_min`` and ``_max``."""
    found = []
    for line in (line for task in tasks for line in lines_of(rows, task, designs)):
        row: dict[str, Any] = {"task": line.task, "algorithm": line.algorithm, "design": line.design}
        row["seeds"] = len(line.rows)
        spreads = {name: line.quality(name) for name in MEASURES}
        spreads |= {f"gain_{name}": line.gain(name) for name in MEASURES}
        spreads |= {name: line.number(name) for name in NUMBERS}
        spreads |= {f"mismatch_{name}": line.mismatch(name) for name in MISMATCH}
        for name, spread in spreads.items():
            if spread is not None:
                several = spread.seeds > 1
                row[name] = spread.mean
                row[f"{name}_min"], row[f"{name}_max"] = (
                    (spread.low, spread.high) if several else (spread.mean, spread.mean)
                )
        if line.algorithm != "base":
            row["beyond_interval"] = line.count("beyond_interval")
        found.append(row)
    return _csv(found)


def quality_table(lines: Sequence[Line]) -> str:
    """Table 2 of one task."""
    key, words = OWN_MEASURES[lines[0].task]
    most = max((size for size in (1, 2, 4, 8, 16) if any(line.pass_at(size) for line in lines)), default=1)
    head = ["learner", "exact match, sampled", "greedy", words, *([f"pass@{most}"] if most > 1 else [])]
    head += ["gain over its start", "beyond its interval", "generated tokens", "training s", "dollars"]
    body = []
    for line in lines:
        base = line.algorithm == "base"
        body.append(
            [
                line.name,
                in_words(line.quality(QUALITY)),
                in_words(line.quality("exact_match_greedy")),
                in_words(line.quality(key)),
                *([in_words(line.pass_at(most))] if most > 1 else []),
                in_words(line.gain(QUALITY), signed=True),
                "" if base else f"{line.count('beyond_interval')} of {_seeds(len(line.rows))}",
                _plain(line.number("generated_tokens"), ",.0f"),
                _plain(line.number("training_seconds"), ",.0f"),
                _plain(line.number("dollars"), ".4f"),
            ]
        )
    return markdown(head, body)


def improvement_sentences(lines: Sequence[Line]) -> list[str]:
    """Which learners improved the checkpoint that they started from, and which did not."""
    sentences = []
    for line in (line for line in lines if line.algorithm != "base"):
        start = "the base model" if line.algorithm in ("sft", "sft_clean") else "the SFT checkpoint"
        beyond, seeds, gain = line.count("beyond_interval"), len(line.rows), line.gain(QUALITY)
        if gain is None:
            continue
        verb = "improved" if beyond else "**did not improve**"
        only = "" if beyond in (0, seeds) else " only"
        sentences.append(
            f"{line.name} {verb} {start} beyond its interval for {beyond} of {_seeds(seeds)}{only}: mean gain "
            f"{gain.mean:+.3f} in sampled exact match; {line.count('above_start_interval')} of {_seeds(seeds)} ended "
            "above the start's own interval."
        )
    return sentences


def design_table(rows: Sequence[Row], task: str, designs: Sequence[str]) -> str:
    """The reward ablation of one task: a learner a row, a design a column."""
    lines = [line for line in lines_of(rows, task, designs) if line.design is not None]
    body = []
    for algorithm in dict.fromkeys(line.algorithm for line in lines):
        of = {line.design: line for line in lines if line.algorithm == algorithm}
        cells: list[str] = []
        for design in designs:
            line = of.get(design)
            cells += [in_words(line.quality(QUALITY)), in_words(line.gain(QUALITY), signed=True)] if line else ["", ""]
        body.append([next(iter(of.values())).name, *cells])
    return markdown(["learner", *(f"{design}{more}" for design in designs for more in ("", ": gain"))], body)


def selector_table(line: Line, sizes: Sequence[int], selectors: Mapping[str, str]) -> str:
    """Best-of-N at inference time, of one line's checkpoint."""
    body = [
        [words, *(in_words(line.best_of(selector, size)) for size in sizes)] for selector, words in selectors.items()
    ]
    return markdown(["chosen by", *(f"N = {size}" for size in sizes)], body)


def budget_table(rows: Iterable[Row]) -> str:
    """What each cell cost."""
    body = []
    for row in rows:
        budget = row["token_budget"]
        body.append(
            [
                f"`{row['cell']}`",
                f"{row['generated_tokens']:,}" if budget else "learns from answers",
                f"{row['generated_tokens'] / budget:.1%}" if budget else "",
                f"{row['rounds']}",
                f"{row['training_seconds']:,.1f}",
                f"{row['wall_seconds']:,.1f}",
                f"{row['dollars']:.4f}",
            ]
        )
    return markdown(["cell", "generated tokens", "of the budget", "rounds", "training s", "wall s", "dollars"], body)


def mismatch_table(lines: Sequence[Line]) -> str:
    """Train/inference mismatch, of the last round where there were rollouts, as means over seeds."""
    body = [
        [TASK_NAMES[line.task], line.name, line.design or "", *(_plain(line.mismatch(key), ".3g") for key in MISMATCH)]
        for line in lines
        if line.mismatch("mean") is not None
    ]
    head = ["task", "learner", "design", "mean", "p95", "max", "ratio outside [0.9, 1.1]"]
    return markdown(head, body) if body else ""


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first to the right."""
    rows = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def in_words(spread: Spread | None, signed: bool = False) -> str:
    """``0.61 [0.58, 0.64]`` of one seed, ``0.61 (0.58 to 0.64)`` of several."""
    if spread is None:
        return ""
    sign = "+" if signed else ""
    text = f"{spread.mean:{sign}.3f}"
    if spread.low is None:
        return text
    low, high = f"{spread.low:{sign}.3f}", f"{spread.high:{sign}.3f}"
    return f"{text} [{low}, {high}]" if spread.seeds == 1 else f"{text} ({low} to {high})"


def _plain(spread: Spread | None, form: str) -> str:
    return "" if spread is None else f"{spread.mean:{form}}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s'[: count != 1]}"


def _flat(row: Row) -> dict[str, Any]:
    flat = {key: row[key] for key in ("cell", "task", "algorithm", "design", "seed", "start")}
    for part in ("before", "after", "gain"):
        for measure in (name for name in MEASURES if name in row[part]):
            flat |= _with_interval(f"{part}_{measure}", row[part][measure], row[part].get(f"{measure}_interval"))
        for point in row[part].get("pass_at_k", ()):
            flat |= _with_interval(f"{part}_pass_at_{point['n']}", point["mean"], point["interval"])
        for selector, curve in row[part].get("best_of_n", {}).items():
            for point in curve["points"]:
                flat[f"{part}_best_of_{point['n']}_{selector}"] = point["mean"]
    for key in ("beyond_interval", "beyond_interval_greedy", "above_start_interval"):
        flat[key] = int(row[key])
    for key in (*NUMBERS, "token_budget", "evaluation_tokens", "rounds", "gpu_price_per_hour", "at_once"):
        flat[key] = row[key]
    flat["gpus"] = row.get("gpus", 0)
    flat |= {f"mismatch_{key}": row["mismatch"].get(key) for key in MISMATCH}
    flat |= {f"seconds_{phase.replace(' ', '_')}": seconds for phase, seconds in row["seconds"].items()}
    return flat | {key: row[key] for key in ("git_commit", "git_dirty", "machine", "run")}


def _with_interval(name: str, value: float | None, interval: Sequence[float] | None) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
