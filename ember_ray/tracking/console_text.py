"""The words and tables of the console, as pure functions."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ember_ray.tracking.samples import ChangedSample

MEASURES = (
    ("exact_match_sampled", "exact match sampled"),
    ("exact_match_greedy", "exact match greedy"),
    ("f1", "field F1 sampled"),
    ("rows", "overlap of rows"),
    ("reward_mean", "reward sampled"),
)
_COLUMNS = (
    ("round", 7),
    ("reward", 8),
    ("exact match", 13),
    ("tokens/s", 10),
    ("cache hits", 12),
    ("pairs", 7),
    ("policy", 8),
    ("seconds", 9),
)


def number(value: Any, style: str) -> str:
    """A number for people: ``score`` 0.712, ``percent`` 48.0 %, ``count`` 1,240, ``seconds`` 12.3; absent is ``-``."""
    if not isinstance(value, (int, float)):
        return "-"
    formats = {
        "score": f"{value:.3f}",
        "percent": f"{100 * value:.1f} %",
        "whole percent": f"{100 * value:.0f} %",
        "count": f"{value:,.0f}",
        "seconds": f"{value:.1f}",
    }
    return formats[style]


def version(value: Any) -> str:
    return f"v{int(value)}" if isinstance(value, (int, float)) else "-"


def live_line(numbers: Mapping[str, Any]) -> str:
    """The newest numbers in one line of at most 80 columns."""
    return "  ".join(
        [
            f"reward {number(numbers.get('reward'), 'score')}",
            f"exact match {number(numbers.get('exact_match'), 'percent')}",
            f"{number(numbers.get('tokens_per_second'), 'count')} tok/s",
            f"cache hits {number(numbers.get('prefix_hit_rate'), 'whole percent')}",
            f"policy {version(numbers.get('policy_version'))}",
        ]
    )


def round_header() -> str:
    """Column titles over the lines of the rounds."""
    return "".join(f"{name:>{width}}" for name, width in _COLUMNS)


def round_line(done: int, total: int, numbers: Mapping[str, Any]) -> str:
    """One finished round under ``round_header``."""
    cells = (
        f"{done}/{total}",
        number(numbers.get("reward"), "score"),
        number(numbers.get("exact_match"), "percent"),
        number(numbers.get("tokens_per_second"), "count"),
        number(numbers.get("prefix_hit_rate"), "percent"),
        number(numbers.get("pairs"), "count"),
        version(numbers.get("policy_version")),
        number(numbers.get("seconds/round"), "seconds"),
    )
    return "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))


def one_line(text: str) -> str:
    """Text without line breaks and control characters: a model's output must not steer the terminal."""
    text = text.replace("\r\n", "\n").replace("\n", "\\n").replace("\t", " ")
    return "".join(char if char.isprintable() else "?" for char in text)


def with_interval(part: Mapping[str, Any] | None, key: str, signed: bool = False) -> str:
    """``0.43 [0.40, 0.46]``."""
    value = part.get(key) if part is not None else None
    if value is None or part is None:
        return "-"
    sign = "+" if signed else ""
    interval = part.get(f"{key}_interval")
    if interval is None:
        return f"{value:{sign}.2f}"
    return f"{value:{sign}.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def before_after(summary: Mapping[str, Any]) -> Table:
    """The table of held-out quality; a gain is green or red only when its interval leaves zero out."""
    before, after, gain = summary.get("before"), summary.get("after"), summary.get("gain")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))  # no frame: the four columns just fit 80
    table.add_column("held-out prompts", no_wrap=True)
    for title in ("before", "after", "gain"):
        table.add_column(title, justify="right", no_wrap=True)
    for key, name in MEASURES:
        if before is not None and key not in before:
            continue  # the task does not have it
        interval = gain.get(f"{key}_interval") if gain is not None else None
        style = "dim" if interval is None or interval[0] <= 0 <= interval[1] else "green" if interval[0] > 0 else "red"
        table.add_row(
            name,
            with_interval(before, key),
            with_interval(after, key),
            Text(with_interval(gain, key, signed=True), style),
        )
    return table


def final_lines(
    summary: Mapping[str, Any], changed: Sequence[ChangedSample], run_dir: Path, files: Mapping[str, str], width: int
) -> Iterator[RenderableType]:
    """Everything that is shown at the end, in order."""
    if summary.get("before") is not None:
        yield Text()
        yield before_after(summary)
        part = summary.get("after") or summary["before"]
        if part.get("prompts"):
            yield Text(
                f"{part['prompts']} prompts, {part['samples']:,} samples; 95 % intervals by bootstrap over prompts",
                "dim",
            )
    if changed:
        yield Text()
        yield Text("greedy answers that changed, drawn at random", "bold")
        for sample in changed:
            yield from _sample_lines(sample, width)
    yield Text()
    status = summary.get("status")
    if status not in (None, "finished"):
        yield Text(f"{status} after {summary.get('rounds', 0)} rounds; what was learnt so far is saved", "yellow")
    if summary.get("warning"):
        yield Text(summary["warning"], "bold yellow")
    yield Text(f"{run_dir}/", "bold")
    for name, meaning in files.items():
        yield Text.assemble(f"  {name:<16}", (meaning, "dim"))


def _sample_lines(sample: ChangedSample, width: int) -> Iterator[Text]:
    prompt = textwrap.shorten(one_line(sample.prompt).replace("\\n", " "), width - 10, placeholder=" ...")
    yield Text.assemble(("\n  prompt  ", "dim"), (prompt, "dim"))
    rows = (("before", sample.before, sample.before_verdict), ("after", sample.after, sample.after_verdict))
    for name, answer, verdict in rows:
        style = "green" if verdict.startswith("exact match") else "red"
        lines = textwrap.wrap(one_line(answer), width - 10, break_on_hyphens=False) or ["(nothing)"]
        if len(lines) > 4:
            lines = [*lines[:3], lines[3][: width - 14] + " ..."]
        yield Text.assemble((f"  {name:<8}", "bold"), f"\n{'':10}".join(lines))
        verdict_lines = textwrap.wrap(one_line(verdict), width - 10)[:2] or [""]
        yield Text.assemble(f"{'':10}", (f"\n{'':10}".join(verdict_lines), style))
