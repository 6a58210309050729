"""An evaluation in words: Markdown tables for people, and its curves as a figure that stands alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ember_ray.tracking import report_charts as charts
from ember_ray.tracking.console_text import with_interval
from ember_ray.tracking.report_page import STYLE

# name, key of the sampled number, key of the greedy one
ROWS = (
    ("exact match", "exact_match_sampled", "exact_match_greedy"),
    ("reward", "reward_mean", "reward_greedy"),
    ("parses", "parse_sampled", "parse_greedy"),
    ("satisfies the schema", "schema_sampled", "schema_greedy"),
    ("executes", "execute_sampled", "execute_greedy"),
    ("overlap of rows", "rows", ""),
    ("field precision (micro)", "field_precision", ""),
    ("field recall (micro)", "field_recall", ""),
    ("field F1 (micro)", "field_f1", "field_f1_greedy"),
    ("field F1 (mean of answers)", "f1", ""),
)
CURVES = (
    ("oracle", "oracle = pass@N, sees the gold answer", "c6"),
    ("majority", "majority of valid answers", "c2"),
    ("valid_logprob", "valid, then mean log-probability", "c1"),
)


def evaluation_markdown(result: Mapping[str, Any], title: str, facts: Sequence[str], figure: str | None) -> str:
    """The evaluation as a page of Markdown.

    Args:
        result: what ``evaluation_curves.evaluate`` gave.
        title: its first line.
        facts: further lines, e.g. on cost.
        figure: path of the curves relative to the page; None leaves them out.
    """
    parts = [f"# {title}", measures_table(result)]
    if "pass_at_k" in result:
        parts += ["## Best of N", curves_table(result)]
        if figure is not None:
            parts.append(f"![Exact match over N]({figure})")
    parts.append("\n".join(f"- {fact}" for fact in (*notes(result), *facts)))
    return "\n\n".join(parts) + "\n"


def measures_table(result: Mapping[str, Any]) -> str:
    """What was measured, sampled and greedy, with intervals."""
    rows = [
        [name, with_interval(result, sampled), with_interval(result, greedy)]
        for name, sampled, greedy in ROWS
        if sampled in result or greedy in result
    ]
    return _table(["measure", "sampled", "greedy"], rows)


def curves_table(result: Mapping[str, Any]) -> str:
    """pass@k and the best-of-N curves, one line an N."""
    best = result["best_of_n"]
    curves = [best["valid_logprob"]["points"], best["majority"]["points"], result["pass_at_k"]]
    rows = [
        [str(row[0]["n"]), *(with_interval({"m": one["mean"], "m_interval": one["interval"]}, "m") for one in row)]
        for row in zip(*curves, strict=True)
    ]
    return _table(["N", "valid, then log-probability", "majority", "oracle = pass@N (sees gold)"], rows)


def notes(result: Mapping[str, Any]) -> list[str]:
    """How the numbers are to be read."""
    found = [
        f"{result['prompts']:,} held-out prompts, {result['samples']:,} samples, "
        f"{result['verifier_failures']:,} left out because the verifier failed on them",
        "brackets are 95 % intervals by bootstrap over prompts",
    ]
    if "best_of_n" in result:
        found.append(
            "of N samples one is chosen, in expectation over all subsets of the samples; "
            "the oracle sees the gold answer, the other choices do not"
        )
        if not result["has_logprobs"]:
            found.append("no log-probabilities were given: among valid answers the choice is random")
    return found


def curves_svg(result: Mapping[str, Any]) -> str:
    """Exact match of the chosen candidate over N as an SVG document, with 95 % intervals and the greedy answer."""
    lines, marks = [], []
    points = result["pass_at_k"]
    ticks = [(math.log2(point["n"]), str(point["n"])) for point in points]
    for place, (name, words, css) in enumerate(CURVES):
        curve = result["best_of_n"][name]["points"]
        lines.append(charts.Series(words, [(math.log2(point["n"]), point["mean"]) for point in curve], css))
        shift = 0.03 * (place - 1)  # so that whiskers at one N stay apart
        marks += [
            charts.Estimate(f"{words}, N = {point['n']}", math.log2(point["n"]) + shift, point["mean"], interval, css)
            for point in curve
            if (interval := point["interval"]) is not None
        ]
    greedy = result.get("exact_match_greedy")
    if greedy is not None:
        lines.append(charts.Series("greedy", [(x, greedy) for x, _ in ticks], "c3"))
    frame = charts.Frame(width=640, height=320)
    chart = charts.line_chart(
        lines, marks, x_ticks=ticks, x_label="N samples", y_label="exact match", limits=(0.0, 1.0), frame=frame
    )
    return _standalone(chart, [(line.name, line.css) for line in lines], frame)


def _standalone(chart: str, names: Sequence[tuple[str, str]], frame: charts.Frame) -> str:
    """A chart of the report with its style and a legend, as a document of its own."""
    found = re.fullmatch(r"<svg [^>]*>(.*)</svg>", chart, re.DOTALL)
    if found is None:  # nothing was measured
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width:g} 20"></svg>\n'
    legend = []
    for place, (name, css) in enumerate(names):
        y = frame.height + 10 + 18 * place
        legend.append(
            f'<line class="line {css}" x1="{frame.left:g}" x2="{frame.left + 22:g}" y1="{y:g}" y2="{y:g}"/>'
            f'<text class="label" x="{frame.left + 30:g}" y="{y + 4:g}">{escape(name)}</text>'
        )
    height = frame.height + 10 + 18 * len(names)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width:g} {height:g}" width="{frame.width:g}" '
        f'role="img" aria-label="exact match over N"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" style="fill: var(--bg)"/>{found[1]}{"".join(legend)}</svg>\n'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also stand below each other as plain text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    rule = "| " + " | ".join("-" * width for width in widths) + " |"
    return "\n".join([line(header), rule, *map(line, rows)])
