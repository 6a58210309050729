"""Charts as plain SVG text: axes, ticks and hover titles, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Series:
    """A line: points by x, None where nothing was measured."""

    name: str
    points: Sequence[Point]
    css: str = "c1"


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval, drawn as a point with whiskers."""

    name: str
    x: float
    value: float
    interval: Sequence[float] | None
    css: str = "c2"


@dataclass(frozen=True)
class Bar:
    """A stacked bar: (part, size) from left to right."""

    label: str
    parts: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Frame:
    """Size of a chart and the room that its labels take, in SVG units."""

    width: float = 520
    height: float = 250
    left: float = 46
    right: float = 14
    top: float = 12
    bottom: float = 40


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers that enclose [low, high] (Heckbert 1990, "Nice numbers for graph labels")."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return [0.0, 1.0]
    if high - low < 1e-8 * max(1.0, abs(low), abs(high)):  # finer than ticks are rounded to
        pad = abs(low) * 0.1 if abs(low) > 1e-6 else 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def short_number(value: float) -> str:
    """A number for a tick or a hover title: ``0.45``, ``1,200``."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.4g}"
    return text if "e" not in text else f"{value:.1e}"


def line_chart(
    series: Sequence[Series],
    estimates: Sequence[Estimate] = (),
    *,
    x_ticks: Sequence[tuple[float, str]],
    x_label: str = "",
    y_label: str = "",
    limits: tuple[float | None, float | None] = (None, None),
    frame: Frame | None = None,
    form: Callable[[float], str] = short_number,
) -> str:
    """Lines over a common x, with points that carry intervals.

    Args:
        series, estimates: what is drawn; every point has a hover title.
        x_ticks: (x, label); labels are thinned out where they would touch.
        limits: bounds that the y axis never passes, e.g. (0, 1) for a share.
        form: how values are written in hover titles and on the axis.
    """
    frame = frame or Frame()
    values = [y for line in series for _, y in line.points if y is not None]
    values += [bound for one in estimates for bound in (one.value, *(one.interval or ()))]
    if not values:
        return '<p class="none">nothing was measured</p>'
    ticks = nice_ticks(min(values), max(values), 5 if frame.height > 150 else 3)
    low = ticks[0] if limits[0] is None else max(ticks[0], limits[0])
    high = ticks[-1] if limits[1] is None else min(ticks[-1], limits[1])
    if high <= low:
        high = low + 1
    ticks = [tick for tick in ticks if low - 1e-9 <= tick <= high + 1e-9]
    xs = [x for x, _ in x_ticks] or [0.0]
    x_low, x_high = min(xs), max(xs)

    def px(x: float) -> float:
        share = 0.5 if x_high == x_low else (x - x_low) / (x_high - x_low)
        return frame.left + 10 + share * (frame.width - frame.left - frame.right - 20)

    def py(y: float) -> float:
        share = (y - low) / (high - low)
        return frame.height - frame.bottom - share * (frame.height - frame.top - frame.bottom)

    left, right, base = frame.left, frame.width - frame.right, frame.height - frame.bottom
    out = [_open(frame, y_label or ", ".join(line.name for line in series))]
    for tick in ticks:
        out.append(_rule(left, py(tick), right, py(tick), "grid"))
        out.append(_text(left - 6, py(tick) + 3.5, form(tick), "end"))
    out.append(_rule(left, base, right, base, "axis"))
    for x, label in _thin(x_ticks, right - left):
        out.append(_rule(px(x), base, px(x), base + 4, "axis"))
        out.append(_text(px(x), base + 16, label))
    if x_label:
        out.append(_text((left + right) / 2, frame.height - 5, x_label, css="label"))
    labels = dict(x_ticks)
    for line in series:
        out += _line(line, px, py, labels, form)
    for one in estimates:
        out += _estimate(one, px, py, form)
    return "".join([*out, "</svg>"])


def _line(
    line: Series,
    px: Callable[[float], float],
    py: Callable[[float], float],
    labels: dict[float, str],
    form: Callable[[float], str],
) -> list[str]:
    out, path, pen_down = [], [], False
    for x, y in line.points:
        if y is None:
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{px(x):.1f} {py(y):.1f}")
        pen_down = True
    out.append(f'<path class="line {line.css}" d="{" ".join(path)}"/>')
    for x, y in line.points:
        if y is not None:
            title = f"<title>{escape(f'{line.name}, {labels.get(x, short_number(x))}: {form(y)}')}</title>"
            at = f'cx="{px(x):.1f}" cy="{py(y):.1f}"'
            radius = 3 if len(line.points) <= 60 else 1.2
            out.append(
                f'<circle class="dot {line.css}" {at} r="{radius}"/><circle class="hit" {at} r="10">{title}</circle>'
            )
    return out


def _estimate(
    one: Estimate, px: Callable[[float], float], py: Callable[[float], float], form: Callable[[float], str]
) -> list[str]:
    x, title = px(one.x), f"{one.name}: {form(one.value)}"
    out = [f'<g class="estimate {one.css}">']
    if one.interval is not None:
        low, high = one.interval
        title += f", 95 % interval {form(low)} to {form(high)}"
        out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{py(low):.1f}" y2="{py(high):.1f}"/>')
        for bound in (low, high):
            out.append(f'<line x1="{x - 5:.1f}" x2="{x + 5:.1f}" y1="{py(bound):.1f}" y2="{py(bound):.1f}"/>')
    out.append(f'<path d="M{x:.1f} {py(one.value) - 5:.1f}l5 5l-5 5l-5 -5z"/>')
    out.append(f'<circle class="hit" cx="{x:.1f}" cy="{py(one.value):.1f}" r="12"/><title>{escape(title)}</title></g>')
    return out


def _thin(ticks: Sequence[tuple[float, str]], room: float) -> list[tuple[float, str]]:
    """Ends always, between them as many labels as have room without touching."""
    if not ticks:
        return []
    widest = max(len(label) for _, label in ticks) * 7.0 + 14
    step = max(1, math.ceil(len(ticks) * widest / max(room, 1.0)))
    inner = [tick for index, tick in enumerate(ticks[1:-1], 1) if index % step == 0 and len(ticks) - 1 - index >= step]
    return [ticks[0], *inner, *([ticks[-1]] if len(ticks) > 1 else [])]


def stacked_bars(bars: Sequence[Bar], css: dict[str, str], width: float = 1080) -> str:
    """Horizontal stacked bars of seconds with a common scale, the total at each end.

    Args:
        bars: from top to bottom.
        css: colour class of each part.
    """
    longest = max((sum(size for _, size in bar.parts) for bar in bars), default=0.0)
    if longest <= 0:
        return '<p class="none">nothing was measured</p>'
    row, left, right, bottom = 26.0, 74.0, 66.0, 36.0
    frame = Frame(width=width, height=len(bars) * row + bottom, left=left, right=right)
    ticks = [tick for tick in nice_ticks(0, longest, 7) if tick <= longest]

    def px(value: float) -> float:
        return left + value / longest * (width - left - right)

    out = [_open(frame, "time per phase")]
    base = len(bars) * row
    for tick in ticks:
        out += [_rule(px(tick), 0, px(tick), base, "grid"), _text(px(tick), base + 15, short_number(tick))]
    out.append(_text((left + width - right) / 2, base + 32, "seconds", css="label"))
    for index, bar in enumerate(bars):
        y, at, total = index * row + 3, 0.0, sum(size for _, size in bar.parts)
        out.append(_text(left - 8, y + 14, bar.label, "end"))
        for name, size in bar.parts:
            if size <= 0:
                continue
            title = f"{bar.label}, {name}: {size:.1f} s ({100 * size / total:.0f} %)"
            place = f'x="{px(at):.1f}" y="{y:.1f}" width="{max(0.6, px(at + size) - px(at) - 1):.1f}"'
            rect = f'<rect class="{css.get(name, "c1")}" {place} height="{row - 7:.1f}" rx="2">'
            out.append(f"{rect}<title>{escape(title)}</title></rect>")
            at += size
        out.append(_text(px(total) + 6, y + 14, f"{total:.1f} s", "start"))
    return "".join([*out, "</svg>"])


def legend(entries: Sequence[tuple[str, str]], shape: str = "box") -> str:
    """(name, colour class) as a line of swatches."""
    items = "".join(f'<span class="key"><i class="{css} {shape}"></i>{escape(name)}</span>' for name, css in entries)
    return f'<div class="legend">{items}</div>'


def _text(x: float, y: float, text: str, anchor: str = "middle", css: str = "tick") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _open(frame: Frame, label: str) -> str:
    return f'<svg viewBox="0 0 {frame.width:g} {frame.height:g}" role="img" aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">'
