"""The cluster bootstrap over prompts: means of held-out candidates with intervals that know which ones belong together.

Samples of one prompt are alike, so the unit that is drawn again is the prompt (Cameron and Miller 2015, section VI.C).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95


class PerPrompt(NamedTuple):
    """A measure of each prompt as a ratio: ``sums / counts``, float64 [prompts] each; a count of 0 = nothing measured.

    For a mean over candidates the count is their number; for a share of fields it is the number of fields.
    """

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of_means(cls, values: Iterable[float | None]) -> PerPrompt:
        """One number a prompt, None where there is none."""
        listed = list(values)
        sums = np.array([0.0 if value is None else value for value in listed], float)
        return cls(sums, np.array([value is not None for value in listed], float))

    @property
    def mean(self) -> float | None:
        """The ratio over all prompts; None if nothing was measured."""
        return float(self.sums.sum() / self.counts.sum()) if self.counts.sum() else None

    def resampled(self, seed: int) -> np.ndarray | None:
        """The ratio of ``RESAMPLES`` draws of as many prompts, float64; None if nothing was measured.

        The same seed draws the same prompts, so that differences between two measures pair up.
        """
        if not self.counts.sum():
            return None
        drawn = np.random.default_rng(seed).integers(0, len(self.sums), size=(RESAMPLES, len(self.sums)))
        totals = self.counts[drawn].sum(axis=1)
        return np.divide(self.sums[drawn].sum(axis=1), totals, out=np.full(RESAMPLES, np.nan), where=totals > 0)


def interval(means: np.ndarray | None) -> list[float] | None:
    """The percentile interval [low, high] of resampled means, at ``CONFIDENCE``."""
    if means is None:
        return None
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(means, [tail, 100 - tail])
    return [float(low), float(high)]


def measured(name: str, values: PerPrompt, seed: int) -> dict[str, float | list[float] | None]:
    """``{name: mean, name_interval: [low, high]}``, both None if nothing was measured."""
    return {name: values.mean, f"{name}_interval": interval(values.resampled(seed))}
