"""The three reward designs for SQL: how the parts of a verdict become one number between 0 and 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from verifiers.rewards import DesignName, check_shares, check_weights, weighted_mean

DEFAULT_SHARES: dict[DesignName, dict[str, float]] = {
    "binary": {"exact_match": 1.0},
    # What the query gives, and not whether it is SQL: with nothing of the gold in the result there is no reward.
    "weighted": {"columns": 1.0, "rows": 2.0, "exact_match": 1.0},
    # The form earns little: a model that has learned only to write queries that run stays far below one whose rows are
    # right, and a table that is right in part stays well below an equal one.
    "decomposed": {"parse": 0.05, "execute": 0.1, "columns": 0.15, "rows": 0.3, "exact_match": 0.4},
}


@dataclass(frozen=True)
class SqlRewardDesign:
    """One of three ways to make a scalar.

    - ``binary``: 1 if `exact_match` (execution accuracy), else 0.
    - ``weighted``: the mean of ``columns``, ``rows`` and ``exact_match``, weighted 1, 2 and 1: the result alone counts.
    - ``decomposed``: the mean of ``parse``, ``execute``, ``columns``, ``rows`` and ``exact_match``, weighted 0.05, 0.1,
      0.15, 0.3 and 0.4. No query, no reward.

    Attributes:
        name: which.
        weights: in place of the weights above; those left out keep them. For ``binary``, none.

    Raises ValueError for an unknown name or weight, a weight that is negative or not finite, weights that are all 0.
    """

    name: DesignName = "decomposed"
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_weights(self.name, self.weights)
        check_shares(self.name, self.weights, DEFAULT_SHARES[self.name])

    @property
    def shares(self) -> dict[str, float]:
        """The weight of each component, defaults filled in; not normalized."""
        return {**DEFAULT_SHARES[self.name], **self.weights}

    def reward(self, components: Mapping[str, float]) -> float:
        """The scalar, 0 to 1, from a verdict's components."""
        return weighted_mean(self.shares, components)
