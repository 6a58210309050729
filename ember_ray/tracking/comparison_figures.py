"""The figures of a comparison, as PNG and SVG, made from its rows alone.

Colours are those of Okabe and Ito (2008), which people with any colour vision tell apart; markers and line styles
differ as well. Whiskers reach from the least to the greatest seed, or over the 95 % interval of a single seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ember_ray.tracking.comparison_lines import NAMES, TASK_NAMES, Line, Row, Spread, lines_of
from ember_ray.tracking.comparison_rows import QUALITY
from ember_ray.tracking.evaluation_curves import SELECTORS, SIZES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "base": "#7f7f7f",
    "sft": "#000000",
    "best_of_n": "#E69F00",
    "dpo": "#0072B2",
    "grpo": "#009E73",
    "sft_clean": "#CC79A7",
}
MARKERS = {"base": "v", "sft": "o", "best_of_n": "s", "dpo": "^", "grpo": "D", "sft_clean": "P"}
DESIGN_LOOKS = {"binary": ("#56B4E9", ""), "weighted": ("#D55E00", "//"), "decomposed": ("#0072B2", "..")}
SELECTOR_LOOKS = {
    "valid_logprob": ("#000000", "o", "-"),
    "majority": ("#CC79A7", "s", "-"),
    "oracle": ("#7f7f7f", "^", "--"),
}

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "ember-ray",
    "hatch.linewidth": 0.6,
}
QUALITY_LABEL = "exact match of sampled answers"


def write_figures(folder: Path, rows: Sequence[Row], tasks: Sequence[str], designs: Sequence[str]) -> list[Path]:
    """All figures that the rows suffice for.

    Args:
        folder: where they are written.
        rows: of finished cells.
        tasks, designs: in the order in which they are shown.

    Returns:
        The PNG files; an SVG of the same name lies beside each.
    """
    import matplotlib

    shown = [task for task in tasks if any(row["task"] == task for row in rows)]
    of_learners = [row for row in rows if row["design"] is not None]
    found_designs = [design for design in designs if any(row["design"] == design for row in of_learners)]
    makers: dict[str, Callable[[], Figure]] = {}
    if shown:
        makers["learners"] = lambda: learners(rows, shown, found_designs[:1])
    if of_learners:
        makers["quality_over_tokens"] = lambda: quality_over(rows, shown, found_designs, "tokens")
        makers["quality_over_seconds"] = lambda: quality_over(rows, shown, found_designs, "seconds")
        makers["quality_over_dollars"] = lambda: quality_over(rows, shown, found_designs, "dollars")
    if any(row["algorithm"] == "sft" for row in rows):
        makers["best_of_n_inference"] = lambda: best_of_n(rows, shown, found_designs[:1])
    if len(found_designs) > 1:
        makers["reward_designs"] = lambda: reward_designs(rows, shown, found_designs)
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, make in makers.items():
            figure = make()
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=160, metadata={"Software": None})
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return paths


def learners(rows: Sequence[Row], tasks: Sequence[str], designs: Sequence[str]) -> Figure:
    """Sampled and greedy exact match of every learner."""
    figure, axes = _panels(1, len(tasks), height=2.7)
    of_task = {task: lines_of(rows, task, designs) for task in tasks}
    present = {line.algorithm for lines in of_task.values() for line in lines}
    names = [name for name in NAMES if name in present][::-1]
    for (axis,), task in zip(axes.T, tasks, strict=True):
        for line in of_task[task]:
            for offset, measure, filled in ((0.15, QUALITY, True), (-0.15, "exact_match_greedy", False)):
                spread = line.quality(measure)
                if spread is None:
                    continue
                place, colour = names.index(line.algorithm) + offset, COLOURS[line.algorithm]
                _whisker(axis, spread, place, colour, across=True)
                face = colour if filled else "white"
                axis.plot(spread.mean, place, MARKERS[line.algorithm], color=colour, mfc=face, zorder=5)
        labels = [NAMES[name] for name in names] if axis is axes[0, 0] else [""] * len(names)
        axis.set_yticks(range(len(names)), labels)
        axis.set_ylim(-0.6, len(names) - 0.4)
        axis.set_title(TASK_NAMES[task])
        axis.set_xlabel("exact match on held-out prompts")
        axis.grid(axis="y", visible=False)
    keys = [_key("sampled at temperature 1", "o", "#444444"), _key("greedy", "o", "#444444", mfc="white")]
    figure.legend(handles=keys, loc="outside upper center", ncols=2)
    return figure


def quality_over(rows: Sequence[Row], tasks: Sequence[str], designs: Sequence[str], cost: str) -> Figure:
    """Exact match of learners over what they cost: a panel a task and design.

    Args:
        cost: ``tokens``, ``seconds`` or ``dollars``.
    """
    figure, axes = _panels(len(designs), len(tasks), height=2.9)
    scale, label = _cost_axis(rows, cost)
    used: dict[str, Any] = {}
    for row_of_axes, design in zip(axes, designs, strict=True):
        for axis, task in zip(row_of_axes, tasks, strict=True):
            for line in lines_of(rows, task, [design]):
                if line.algorithm in ("base", "sft_clean"):
                    _level(axis, line)
                elif line.design is not None:
                    # ends of one budget lie on each other: set them apart a little
                    apart = 0.013 * (list(COLOURS).index(line.algorithm) - 3) if cost == "tokens" else 0.0
                    _path(axis, line, lambda row, point: scale * _cost(row, point, cost), apart)
                else:
                    spread = line.quality(QUALITY)
                    if spread is not None:
                        _whisker(axis, spread, 0.0, COLOURS["sft"])
                        axis.plot(0.0, spread.mean, MARKERS["sft"], color=COLOURS["sft"], zorder=4)
                used[line.algorithm] = line
            axis.set_title(TASK_NAMES[task] + (f", {design} reward" if len(designs) > 1 else ""))
            axis.set_xlabel(label)
            axis.set_ylabel(QUALITY_LABEL)
            axis.margins(x=0.06)
    handles = [
        _key(line.name, "", COLOURS[name], "--" if name == "sft_clean" else ":")
        if name in ("base", "sft_clean")
        else _key(
            line.name if name != "sft" else "SFT checkpoint", MARKERS[name], COLOURS[name], "" if name == "sft" else "-"
        )
        for name, line in used.items()
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(6, len(handles)), columnspacing=1.4)
    figure.supxlabel(
        "Lines: rollouts of each whole round, on training prompts. Marks: held-out prompts, before and after.",
        fontsize=8,
        color="#555555",
    )
    return figure


def best_of_n(rows: Sequence[Row], tasks: Sequence[str], designs: Sequence[str]) -> Figure:
    """Choosing among N samples of the SFT checkpoint, beside one sample of each learner that went on from it."""
    figure, axes = _panels(1, len(tasks), height=3.1)
    handles: dict[str, Any] = {}
    for (axis,), task in zip(axes.T, tasks, strict=True):
        for line in lines_of(rows, task, designs):
            if line.design is not None:
                spread = line.quality(QUALITY)
                if spread is not None:
                    axis.axhline(spread.mean, color=COLOURS[line.algorithm], lw=1.1, ls=(0, (1, 1.5)))
                    handles[line.name] = _key(f"one sample after {line.name}", "", COLOURS[line.algorithm], ":")
            if line.algorithm != "sft":
                continue
            for selector, words in SELECTORS.items():
                colour, marker, style = SELECTOR_LOOKS[selector]
                points = [(size, spread) for size in SIZES if (spread := line.best_of(selector, size)) is not None]
                sizes, means = [size for size, _ in points], [spread.mean for _, spread in points]
                axis.plot(sizes, means, marker=marker, ls=style, color=colour, zorder=3)
                bounds = [(size, s.low, s.high) for size, s in points if s.low is not None and s.high is not None]
                if bounds:
                    axis.fill_between(*zip(*bounds, strict=True), color=colour, alpha=0.13, lw=0)
                handles[selector] = _key(words, marker, colour, style)
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, [str(size) for size in SIZES])
        axis.set_xlim(0.92, max((s for s in SIZES if _drawn(rows, task, s)), default=1) * 1.09)
        axis.set_title(TASK_NAMES[task])
        axis.set_xlabel("N, samples of the SFT checkpoint to choose from")
        axis.set_ylabel("exact match of the chosen answer")
    order = [*SELECTORS, *(name for name in handles if name not in SELECTORS)]
    figure.legend(handles=[handles[name] for name in order if name in handles], loc="outside upper center", ncols=2)
    return figure


def reward_designs(rows: Sequence[Row], tasks: Sequence[str], designs: Sequence[str]) -> Figure:
    """Exact match after learning, by reward design."""
    from matplotlib.patches import Patch

    figure, axes = _panels(1, len(tasks), height=3.0)
    width = 0.8 / len(designs)
    for (axis,), task in zip(axes.T, tasks, strict=True):
        lines = lines_of(rows, task, designs)
        names = list(dict.fromkeys(line.algorithm for line in lines if line.design is not None))
        for line in lines:
            spread = line.quality(QUALITY)
            if line.design is None or spread is None:
                if line.algorithm == "sft" and spread is not None:
                    axis.axhline(spread.mean, color=COLOURS["sft"], lw=1.1, ls="--", zorder=3)
                continue
            place = names.index(line.algorithm) + (designs.index(line.design) - (len(designs) - 1) / 2) * width
            colour, hatch = DESIGN_LOOKS[line.design]
            axis.bar(place, spread.mean, width * 0.92, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
            _whisker(axis, spread, place, "#222222")
        axis.set_xticks(range(len(names)), [next(x.name for x in lines if x.algorithm == name) for name in names])
        axis.grid(axis="x", visible=False)
        axis.set_title(TASK_NAMES[task])
        axis.set_ylabel(QUALITY_LABEL)
        axis.set_ylim(0, None)
    looks = [(design, *DESIGN_LOOKS[design]) for design in designs]
    handles: list[Any] = [Patch(facecolor=c, hatch=h, edgecolor="white", label=f"{d} reward") for d, c, h in looks]
    handles.append(_key("SFT checkpoint that all start from", "", COLOURS["sft"], "--"))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(4, len(handles)))
    return figure


def _panels(rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3 * max(columns, 1.35), height * rows + 0.75), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _cost_axis(rows: Sequence[Row], cost: str) -> tuple[float, str]:
    """A factor and the label of an axis, in units in which the numbers are easy to read."""
    learning = [row for row in rows if row["design"] is not None]
    if cost == "tokens":
        return 1e-3, "generated tokens learnt from (thousands)"
    if cost == "seconds":
        return 1.0, "training time after SFT (s)"
    prices = sorted({f"${row['gpu_price_per_hour']:g}/h" for row in learning})
    shares = sorted({Fraction(max(1, row.get("gpus", 0)), row["at_once"]) for row in learning}, reverse=True)
    of = "GPU" if any(row.get("gpus") for row in learning) else "machine"
    terms = f"{', '.join(prices)}, {' or '.join(map(str, shares))} {of}"
    cents = max(row["dollars"] for row in learning) < 0.5
    return (100.0 if cents else 1.0), f"training cost after SFT (US {'cents' if cents else 'dollars'}; {terms})"


def _cost(row: Row, point: Row, cost: str) -> float:
    if cost == "tokens":
        return float(point["generated_tokens"])
    if cost == "seconds":
        return float(point["seconds"])
    return float(row["dollars"] * point["seconds"] / row["training_seconds"]) if row["training_seconds"] else 0.0


def _path(axis: Axes, line: Line, cost: Callable[[Row, Row], float], apart: float) -> None:
    """A learner's rollouts round by round, from the checkpoint on, then its held-out quality at the end.

    Candidates of a round come from the policy that the rounds before it made, so they stand at what those cost. A
    round that the budget cut short says little and is left out.

    Args:
        apart: by which share of the cost the end is moved aside.
    """
    colour = COLOURS[line.algorithm]
    paths = [whole_rounds(row, cost) for row in line.rows]
    steps = [[path[index] for path in paths] for index in range(min(map(len, paths), default=0))]
    xs = [fmean(x for x, _ in step) for step in steps]
    axis.plot(xs, [fmean(y for _, y in step) for step in steps], color=colour, alpha=0.85)
    if len(paths) > 1:
        low, high = ([of(y for _, y in step) for step in steps] for of in (min, max))
        axis.fill_between(xs, low, high, color=colour, alpha=0.12, lw=0)
    spread = line.quality(QUALITY)
    ends = [cost(row, row["curve"][-1]) for row in line.rows if row["curve"]]
    if spread is not None and ends:
        end = fmean(ends) * (1 + apart)
        _whisker(axis, spread, end, colour)
        axis.plot(end, spread.mean, MARKERS[line.algorithm], color=colour, zorder=5)


def whole_rounds(row: Row, cost: Callable[[Row, Row], float]) -> list[tuple[float, float]]:
    """(cost so far, exact match) of the rounds that have at least half as many tokens as the largest."""
    totals = [0, *(point["generated_tokens"] for point in row["curve"])]
    tokens = [after - before for before, after in pairwise(totals)]
    costs = [0.0, *(cost(row, point) for point in row["curve"])]
    return [
        (x, point["exact_match"])
        for x, point, own in zip(costs, row["curve"], tokens, strict=False)
        if point["exact_match"] is not None and 2 * own >= max(tokens)
    ]


def _level(axis: Axes, line: Line) -> None:
    spread = line.quality(QUALITY)
    if spread is not None:
        style = "--" if line.algorithm == "sft_clean" else ":"
        axis.axhline(spread.mean, color=COLOURS[line.algorithm], lw=1.3, ls=style)


def _whisker(axis: Axes, spread: Spread, at: float, colour: str, across: bool = False) -> None:
    if spread.low is None or spread.high is None:
        return
    reach = [[max(0.0, spread.mean - spread.low)], [max(0.0, spread.high - spread.mean)]]
    look: dict[str, Any] = {"ecolor": colour, "elinewidth": 1.2, "capsize": 2.5, "zorder": 4}
    if across:
        axis.errorbar(spread.mean, at, xerr=reach, fmt="none", **look)
    else:
        axis.errorbar(at, spread.mean, yerr=reach, fmt="none", **look)


def _key(words: str, marker: str, colour: str, style: str = "", mfc: str | None = None) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], marker=marker, color=colour, ls=style or "none", mfc=mfc or colour, label=words)


def _drawn(rows: Sequence[Row], task: str, size: int) -> bool:
    return any(
        row["task"] == task and any(point["n"] == size for point in row["after"].get("pass_at_k", ())) for row in rows
    )
