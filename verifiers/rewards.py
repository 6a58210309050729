"""The three reward designs: how the parts of a verdict become one number between 0 and 1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from verifiers.compare import Comparison, Path, dotted, leaves

DesignName = Literal["binary", "weighted", "decomposed"]

# Shares of the decomposed reward. Fields weigh most: parsing and the schema are means to them, and a model that has
# learned only the form should stay far below one that has learned the content.
DEFAULT_SHARES = {"parse": 0.1, "schema": 0.2, "fields": 0.7, "clean": 0.0}


@dataclass(frozen=True)
class RewardDesign:
    """One of three ways to make a scalar.

    - ``binary``: 1 if `exact_match`, else 0.
    - ``weighted``: ``fields``, with a weight for every field: the weight of the right fields divided by the weight of
      all fields of the gold and all invented ones. The schema plays no part.
    - ``decomposed``: ``(parse * share + schema * share + fields * share + clean * share) / sum of shares``; `fields`
      with every weight 1. No JSON, no reward.

    Attributes:
        name: which.
        weights: for ``weighted``, dotted field paths (``items.0.price``; ``items.*.price`` for every index) to weights
            of at least 0; a path of an object or array holds for what is inside it, the longest path wins, an exact
            index before ``*``; 1 where none fits. For ``decomposed``, the shares of ``parse``, ``schema``, ``fields``
            and ``clean``; those left out keep their defaults 0.1, 0.2, 0.7 and 0. For ``binary``, none.

    Raises ValueError for an unknown name, a weight that is negative or not finite, an unknown or all-zero share.
    """

    name: DesignName = "decomposed"
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_weights(self.name, self.weights)
        if self.name == "decomposed":
            check_shares(self.name, self.weights, DEFAULT_SHARES)

    @property
    def shares(self) -> dict[str, float]:
        """The shares of the decomposed reward, defaults filled in; not normalized."""
        return {**DEFAULT_SHARES, **self.weights}

    def check_gold(self, gold: object) -> None:
        """Raise ValueError if no field of `gold` has a weight above 0: nothing could be learned from it."""
        if self._is_weighted and self._total(leaves(gold)) <= 0:
            raise ValueError("no field of the gold answer has a weight above 0: give one of its fields a weight")

    def fields_score(self, comparison: Comparison) -> float:
        """Weight of the right leaves over that of all leaves of the gold and the invented ones, 0 to 1."""
        parts = (comparison.right, comparison.wrong, comparison.missing, comparison.invented)
        right, *others = (self._total(paths) if self._is_weighted else len(paths) for paths in parts)
        return right / math.fsum((right, *others)) if right else 0.0

    def reward(self, components: Mapping[str, float]) -> float:
        """The scalar, 0 to 1, from a verdict's components."""
        if self.name == "binary":
            return components["exact_match"]
        if self.name == "weighted":
            return components["fields"]
        return weighted_mean(self.shares, components)

    @property
    def _is_weighted(self) -> bool:
        return self.name == "weighted" and bool(self.weights)

    def _total(self, paths: list[Path]) -> float:
        longest = max(_steps(key) for key in self.weights)
        return math.fsum(self._weight(path, longest) for path in paths)

    def _weight(self, path: Path, longest: int) -> float:
        for length in range(min(len(path), longest), 0, -1):
            for any_index in (False, True):
                weight = self.weights.get(dotted(path[:length], any_index))
                if weight is not None:
                    return weight
        return self.weights.get("$", 1.0)


def check_weights(name: str, weights: Mapping[str, float]) -> None:
    """Raise ValueError for an unknown design, a weight that is negative or not finite, or weights of ``binary``."""
    if name not in get_args(DesignName):
        raise ValueError(f"unknown reward design {name!r}: choose one of {', '.join(get_args(DesignName))}")
    for key, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"the weight of {key!r} must be a finite number of at least 0, not {weight!r}")
    if name == "binary" and weights:
        raise ValueError("the binary reward takes no weights: use weighted or decomposed")


def check_shares(name: str, weights: Mapping[str, float], defaults: Mapping[str, float]) -> None:
    """Raise ValueError if `weights` name a share that the design does not have, or leave every share at 0."""
    unknown = set(weights) - set(defaults)
    if unknown:
        raise ValueError(f"unknown share {min(unknown)!r} of the {name} reward: it has {', '.join(defaults)}")
    if sum({**defaults, **weights}.values()) <= 0:
        raise ValueError(f"the shares of the {name} reward must not all be 0")


def weighted_mean(shares: Mapping[str, float], components: Mapping[str, float]) -> float:
    """``sum(share * component) / sum(share)``."""
    # Divided by fsum of the same shares: an answer with every part at 1 gets exactly 1.
    return math.fsum(share * components[part] for part, share in shares.items()) / math.fsum(shares.values())


def _steps(key: str) -> int:
    return key.replace("\\\\", "").replace("\\.", "").count(".") + 1
