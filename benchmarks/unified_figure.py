"""The figure of the unified-backend benchmark, made of its rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ember_ray.tracking.comparison_figures import STYLE

LABELS = {
    "unified_slots": "unified,\nslots",
    "unified_merged": "unified,\nmerged",
    "dual_file": "two copies,\nadapter by file",
    "dual_full": "two copies,\nall weights",
}
COLOURS = ("#0072B2", "#56B4E9", "#E69F00", "#D55E00")
PANELS = (
    ("gpu_loaded_gb", "GPU memory after load (GB)", False),
    ("gpu_peak_gb", "GPU memory at peak (GB)", False),
    ("first_token_s", "optimizer step to first token (s)", True),
    ("tokens_per_s", "rollout + update (tokens/s)", False),
)


def write_figure(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Four panels, the last row of each cell; as SVG and PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    last = {row["cell"]: row for row in rows}
    names = [name for name in LABELS if name in last]
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, len(PANELS), figsize=(3.3 * len(PANELS), 3.2), layout="constrained")
        for axis, (key, title, logarithmic) in zip(axes, PANELS, strict=True):
            bars = axis.bar([LABELS[name] for name in names], [last[name][key] for name in names], color=COLOURS)
            axis.bar_label(bars, fmt="%.3g", fontsize=8)
            axis.set_title(title, fontsize=9)
            axis.tick_params(axis="x", labelsize=7)
            if logarithmic:
                axis.set_yscale("log")
        for suffix in (".svg", ".png"):
            figure.savefig(path.with_suffix(suffix), metadata={"Date": None} if suffix == ".svg" else None, dpi=150)
        pyplot.close(figure)
