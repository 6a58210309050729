"""``report.html``: a run on one page that needs no network, made from the run folder's files alone.

``python -m ember_ray.tracking.report RUN_DIR`` makes it again.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ember_ray.config.errors import UserError
from ember_ray.tracking import report_charts as charts
from ember_ray.tracking.files import read_jsonl, write_text
from ember_ray.tracking.report_page import card, page, table
from ember_ray.tracking.report_samples import candidates_section, samples_section

MEASURES = (
    ("exact_match_sampled", "Exact match, sampled"),
    ("exact_match_greedy", "Exact match, greedy"),
    ("f1", "Field F1, sampled"),
    ("rows", "Overlap of rows, sampled"),
    ("reward_mean", "Reward, sampled"),
)
COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
SMALL = charts.Frame(width=240, height=124, left=42, right=6, top=8, bottom=22)
# Curves of the learner and the engine that are worth a look, by TRL's names; those that a run has are drawn.
CURVES = (
    ("loss", "Loss"),
    ("rewards/margins", "DPO margin (chosen minus rejected)"),
    ("rewards/accuracies", "DPO accuracy (chosen above rejected)"),
    ("reward_std", "Spread of reward in a group"),
    ("frac_reward_zero_std", "Share of groups without spread"),
    ("pairs", "Pairs learnt from"),
    ("rows", "Answers imitated"),
    ("entropy", "Entropy of the policy, nats a token"),
    ("kl", "KL divergence to the reference"),
    ("clip_ratio/region_mean", "Share of ratios clipped"),
    ("mismatch/max", "Engine and learner apart, at most (log-probability)"),
    ("mismatch/outside", "Share of tokens with a ratio outside 0.9 to 1.1"),
    ("completions/mean_length", "Tokens a candidate"),
    ("completions/clipped_ratio", "Share cut at max_tokens"),
    ("tokens_per_second", "Generated tokens a second"),
    ("prefix_hit_rate", "Prefix cache hit rate"),
    ("grad_norm", "Gradient norm"),
)
MOST_BARS = 40
SHARES = {
    "rewards/accuracies",
    "frac_reward_zero_std",
    "completions/clipped_ratio",
    "prefix_hit_rate",
    "clip_ratio/region_mean",
    "mismatch/outside",
}


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds; parts that an interrupted run did not write are empty."""

    path: Path
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]
    last_round: list[dict[str, Any]]
    config: str


def write_report(run_dir: str | Path) -> Path:
    """Reads a run folder and writes ``report.html`` into it.

    Works on whatever is there: without ``summary.json`` (a crash) the curves and samples are shown.

    Returns:
        The path of the report.

    Raises:
        UserError: there is no such folder, it holds no run, a file in it is damaged, or the disk is full.
    """
    run = read_run(Path(run_dir))
    path = run.path / "report.html"
    write_text(path, render(run))
    return path


def read_run(path: Path) -> RunFiles:
    """The files of a run. Raises: UserError, see ``write_report``."""
    if not path.is_dir():
        raise UserError(f"no run folder '{path}'; give one like runs/<name>_<timestamp>")
    summary_path, config_path = path / "summary.json", path / "config.yaml"
    metrics = read_jsonl(path / "metrics.jsonl")
    if not summary_path.is_file() and not metrics:
        raise UserError(f"'{path}' holds neither summary.json nor metrics.jsonl; give the folder of a run")
    try:
        summary = json.loads(summary_path.read_text(encoding="utf-8")) if summary_path.is_file() else {}
    except ValueError as fault:
        raise UserError(f"{summary_path}: not JSON ({fault}); the file was changed") from None
    rollouts = sorted((path / "rollouts").glob("round_*.jsonl"))
    return RunFiles(
        path,
        summary,
        metrics,
        read_jsonl(path / "eval" / "before.jsonl"),
        read_jsonl(path / "eval" / "after.jsonl"),
        read_jsonl(rollouts[-1]) if rollouts else [],
        config_path.read_text(encoding="utf-8") if config_path.is_file() else "",
    )


def render(run: RunFiles) -> str:
    """The page as text."""
    sections = (
        _header(run),
        _warning(run.summary),
        _headline(run.summary),
        _over_rounds(run),
        _time(run),
        samples_section(run.before, run.after, seed=int(run.summary.get("seed") or 0)),
        candidates_section(run.last_round),
        _curves(run.metrics),
        _setup(run),
    )
    return page(f"{run.summary.get('name') or run.path.name}: run report", "".join(sections))


def _header(run: RunFiles) -> str:
    summary = run.summary
    status = str(summary.get("status") or "no summary")
    facts = [f"{summary.get('rounds', len(run.metrics))} rounds"]
    if "policy_version" in summary:
        facts.append(f"policy v{summary['policy_version']}")
    if "seed" in summary:
        facts.append(f"seed {summary['seed']}")
    if summary.get("git_commit"):
        facts.append(f"commit {summary['git_commit'][:10]}{' with local changes' if summary.get('git_dirty') else ''}")
    if summary.get("seconds"):
        facts.append(f"{_duration(sum(summary['seconds'].values()))} in all")
    facts.append(str(run.path))
    spans = " ".join(f"<span>{escape(fact)}</span>" for fact in facts)
    badge = f'<span class="badge {escape(status)}">{escape(status)}</span>'
    name = escape(str(summary.get("name") or run.path.name))
    return f'<header><h1>{name}{badge}</h1><p class="facts">{spans}</p></header>'


def _headline(summary: Mapping[str, Any]) -> str:
    before, after, gain = summary.get("before"), summary.get("after"), summary.get("gain")
    if not before:
        return ""
    tiles = "".join(_tile(name, key, before, after, gain) for key, name in MEASURES if key in before)
    part = after or before
    note = (
        f'<p class="soft">{part.get("prompts", 0):,} held-out prompts, {part.get("samples", 0):,} samples, the same '
        "prompts before and after. Brackets and bars are 95 % intervals by bootstrap over prompts; the gain is "
        "measured prompt by prompt.</p>"
    )
    return f'<h2>Held-out quality, before and after</h2><div class="grid">{tiles}</div>{note}'


def _warning(summary: Mapping[str, Any]) -> str:
    warning = summary.get("warning")
    return f"<p><strong>{escape(warning)}</strong></p>" if warning else ""


def _tile(
    name: str, key: str, before: Mapping[str, Any], after: Mapping[str, Any] | None, gain: Mapping[str, Any] | None
) -> str:
    numbers = _value(before.get(key))
    if after is not None:
        numbers = f'{numbers}<span class="arrow"> → </span>{_value(after.get(key))}'
    line = ""
    if gain is not None and gain.get(key) is not None:
        interval = gain.get(f"{key}_interval")
        css = "even" if not interval or interval[0] <= 0 <= interval[1] else "good" if interval[0] > 0 else "bad"
        brackets = f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else ""
        line = f'<div class="gain {css}">{gain[key]:+.3f}<span class="soft">{brackets}</span></div>'
    return card(name, f'<div class="big">{numbers}</div>{line}{_interval_strip(key, before, after)}', "tile")


def _interval_strip(key: str, before: Mapping[str, Any], after: Mapping[str, Any] | None) -> str:
    """Both intervals on one axis from 0 to 1 (or as far as the reward goes)."""
    rows = [(part, css, name) for part, css, name in ((before, "c6", "before"), (after, "c2", "after")) if part]
    bounds = [bound for part, _, _ in rows for bound in (part.get(f"{key}_interval") or ())]
    if not bounds:
        return ""
    low, high = min(0.0, *bounds), max(1.0, *bounds)

    def px(value: float) -> float:
        return 4 + (value - low) / (high - low) * 212

    out = [f'<svg viewBox="0 0 220 {12 * len(rows) + 18}" role="img" aria-label="intervals">']
    for index, (part, css, name) in enumerate(rows):
        interval, y = part.get(f"{key}_interval"), 12 * index + 8
        out.append(f'<rect class="track" x="4" y="{y - 2}" width="212" height="4" rx="2"/>')
        if interval:
            width = max(2.0, px(interval[1]) - px(interval[0]))
            title = f"{name}: {part[key]:.3f}, 95 % interval {interval[0]:.3f} to {interval[1]:.3f}"
            out.append(
                f'<rect class="{css}" x="{px(interval[0]):.1f}" y="{y - 4}" width="{width:.1f}" height="8" rx="3">'
                f"<title>{escape(title)}</title></rect>"
            )
    end = 12 * len(rows) + 14
    out.append(f'<text x="4" y="{end}">{low:g}</text><text x="216" y="{end}" text-anchor="end">{high:g}</text></svg>')
    return "".join(out)


def _over_rounds(run: RunFiles) -> str:
    if not run.metrics:
        return ""
    rounds = _rounds(run.metrics)
    last = rounds[-1] + 1
    before, after = run.summary.get("before"), run.summary.get("after")
    ticks = [(0.0, "before")] if before else []
    ticks += [(float(number), str(number)) for number in rounds]
    ticks += [(float(last), "after")] if after else []
    cards = []
    for title, key, measures in (
        (
            "Exact match",
            "exact_match",
            (("exact_match_sampled", "held-out, sampled", "c2"), ("exact_match_greedy", "held-out, greedy", "c3")),
        ),
        ("Reward", "reward", (("reward_mean", "held-out, sampled", "c2"),)),
    ):
        offset = 0.025 * (last + 1)  # so that two whiskers at one x stay apart
        line = charts.Series("training prompts", _points(run.metrics, rounds, key))
        estimates = [
            charts.Estimate(f"{name}, {when}", x + offset * index, part[measure], part.get(f"{measure}_interval"), css)
            for index, (measure, name, css) in enumerate(measures)
            for when, x, part in (("before", 0.0, before), ("after", float(last), after))
            if part and part.get(measure) is not None
        ]
        share = (0.0, 1.0) if key == "exact_match" else (None, None)
        chart = charts.line_chart([line], estimates, x_ticks=ticks, x_label="round", y_label=title, limits=share)
        names = [("training prompts", "c1", "dash")] + [(name, css, "point") for _, name, css in measures if estimates]
        keys = "".join(charts.legend([(name, css)], shape) for name, css, shape in names)
        cards.append(card(title, chart + f'<div style="display:flex;flex-wrap:wrap">{keys}</div>'))
    note = (
        '<p class="soft">The line is what the engine sampled while training; the candidates of a round are made by the '
        "policy that the round before it published.</p>"
    )
    return f'<h2>Over the rounds</h2><div class="two">{"".join(cards)}</div>{note}'


def _time(run: RunFiles) -> str:
    phases = list(
        dict.fromkeys(key.removeprefix("seconds/") for row in run.metrics for key in row if key.startswith("seconds/"))
    )
    phases = [phase for phase in phases if phase not in ("round", "total")]
    if not phases and not run.summary.get("seconds"):
        return ""
    css = {phase: COLOURS[index % len(COLOURS)] for index, phase in enumerate(phases)}
    bars = []
    rounds, step = _rounds(run.metrics), math.ceil(len(run.metrics) / MOST_BARS)
    for start in range(0, len(rounds), step or 1):
        label = (
            f"round {rounds[start]}"
            if step == 1
            else f"{rounds[start]} to {rounds[min(start + step, len(rounds)) - 1]}"
        )
        part = run.metrics[start : start + step]
        sums = [(phase, sum(float(row.get(f"seconds/{phase}") or 0.0) for row in part)) for phase in phases]
        bars.append(charts.Bar(label, sums))
    body = (
        card(
            "By phase and round",
            f'<div class="scroll wide">{charts.stacked_bars(bars, css)}</div>' + charts.legend(list(css.items())),
        )
        if phases
        else ""
    )
    return f'<h2>Where the time went</h2>{body}<div class="two" style="margin-top:14px">{_whole_run(run.summary)}</div>'


def _whole_run(summary: Mapping[str, Any]) -> str:
    cards = ""
    seconds = {name: float(value) for name, value in (summary.get("seconds") or {}).items()}
    if seconds:
        total = sum(seconds.values()) or 1.0
        rows = [[name, f"{value:.1f} s", f"{100 * value / total:.0f} %"] for name, value in seconds.items()]
        cards += card("Whole run", table(["phase", "seconds", "share"], rows))
    tokens = {
        key: summary[key] for key in ("generated_tokens", "prefill_tokens", "prefix_hit_tokens") if key in summary
    }
    if len(tokens) == 3:
        prompt_tokens = tokens["prefill_tokens"] + tokens["prefix_hit_tokens"]
        share = 100 * tokens["prefix_hit_tokens"] / prompt_tokens if prompt_tokens else 0.0
        rows = [
            ["generated", f"{tokens['generated_tokens']:,}"],
            ["prompt tokens computed (prefill)", f"{tokens['prefill_tokens']:,}"],
            ["prompt tokens read from the prefix cache", f"{tokens['prefix_hit_tokens']:,}"],
            ["share of prompt tokens from the cache", f"{share:.1f} %"],
        ]
        cards += card("Tokens through the engine", table(["", "tokens"], rows))
    return cards


def _curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    if not metrics:
        return ""
    rounds = _rounds(metrics)
    ticks = [(float(number), str(number)) for number in rounds]
    names = dict(CURVES)
    for row in metrics:  # the verifier's components have names of their own
        for key in row:
            if key.startswith("rewards/") and key.endswith("/mean"):
                names.setdefault(key, f"Reward component: {key.split('/')[1]}")
    cards = []
    for index, (key, name) in enumerate(names.items()):
        points = _points(metrics, rounds, key)
        if any(y is not None for _, y in points):
            line = charts.Series(name, points, COLOURS[index % len(COLOURS)])
            share = (key in SHARES or key.endswith("/mean")) and all(0 <= y <= 1 for _, y in points if y is not None)
            limits = (0.0, 1.0) if share else (None, None)
            cards.append(card(name, charts.line_chart([line], x_ticks=ticks, frame=SMALL, limits=limits)))
    return f'<h2>Learner and engine</h2><div class="grid">{"".join(cards)}</div>' if cards else ""


def _setup(run: RunFiles) -> str:
    parts = ""
    versions = run.summary.get("versions") or {}
    if versions:
        text = ", ".join(f"{name} {value}" for name, value in versions.items())
        parts += f'<p class="soft">{escape(text)}</p>'
    if run.config:
        text = card("", f"<pre>{escape(run.config)}</pre>")
        parts += f"<details><summary>resolved configuration (config.yaml)</summary>{text}</details>"
    return f"<h2>Set-up</h2>{parts}" if parts else ""


def _rounds(metrics: Sequence[Mapping[str, Any]]) -> list[int]:
    return [int(row.get("round", index)) for index, row in enumerate(metrics, 1)]


def _points(metrics: Sequence[Mapping[str, Any]], rounds: Sequence[int], key: str) -> list[charts.Point]:
    values = [row.get(key) for row in metrics]
    return [(float(x), float(y) if isinstance(y, (int, float)) else None) for x, y in zip(rounds, values, strict=True)]


def _value(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def main(argv: Sequence[str]) -> int:
    """``python -m ember_ray.tracking.report RUN_DIR``"""
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print("usage: python -m ember_ray.tracking.report RUN_DIR", file=sys.stderr)
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    try:
        print(write_report(argv[0]))
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
