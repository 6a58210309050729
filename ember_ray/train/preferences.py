"""A DPO batch: its pairs, and which answers the reference policy must score when the engine does that.

It needs neither torch nor TRL, so that the driver can say what is to be scored and the learner finds the same pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from ember_ray.data.scored_group import ScoredGroup
from ember_ray.train.batch import Answer, Demonstration, ReferenceScore
from ember_ray.train.errors import LearnerError
from ember_ray.train.options import DpoOptions
from ember_ray.train.pairs import PreferencePair, make_pairs

PreferenceEntry = ScoredGroup | PreferencePair | Demonstration | ReferenceScore
"""Groups to make pairs of, pairs as they are, gold answers for ``pair_choice`` ``oracle``, reference scores."""


def batch_pairs(batch: Sequence[PreferenceEntry], options: DpoOptions) -> tuple[list[PreferencePair], dict[str, float]]:
    """The pairs of a batch: those in it, then those of its groups.

    Returns:
        The pairs, and if there are groups the fields of `PairCounts` as ``pairs/<field>``.

    Raises:
        LearnerError: the batch holds something else, or no gold answers with ``oracle``, or gold answers without.
    """
    for entry in batch:
        if not isinstance(entry, PreferenceEntry):
            raise LearnerError(f"DPO learns from scored groups or preference pairs, not from {type(entry).__name__}")
    groups = [entry for entry in batch if isinstance(entry, ScoredGroup)]
    pairs = [entry for entry in batch if isinstance(entry, PreferencePair)]
    gold = {entry.request_id: entry for entry in batch if isinstance(entry, Demonstration)}
    if gold and options.pair_choice != "oracle":
        raise LearnerError(f"gold answers are for dpo.pair_choice 'oracle', not '{options.pair_choice}'")
    if not groups:
        return pairs, {}
    if options.pair_choice == "oracle" and not gold:
        raise LearnerError("dpo.pair_choice 'oracle' needs the gold answers of the prompts, and there are none")
    try:
        made, counts = make_pairs(groups, options.min_margin, options.pairs_per_prompt, options.pair_choice, gold)
    except ValueError as fault:
        raise LearnerError(str(fault)) from fault
    return [*pairs, *made], {f"pairs/{name}": count for name, count in asdict(counts).items()}


def answers_to_score(batch: Sequence[PreferenceEntry], options: DpoOptions) -> list[Answer]:
    """The answers, each once, of all pairs that the learner will make of a batch; none is longer than ``max_length``.

    Raises:
        LearnerError: see `batch_pairs`.
    """
    found: dict[Answer, None] = {}
    for pair in batch_pairs(batch, options)[0]:
        for tokens in (pair.chosen_token_ids, pair.rejected_token_ids):
            if options.max_length is None or len(pair.prompt_token_ids) + len(tokens) <= options.max_length:
                found[pair.prompt_token_ids, tokens] = None
    return list(found)


def reference_scores(answers: Iterable[Answer], logprobs: Iterable[Sequence[float]]) -> list[ReferenceScore]:
    """What the engine's ``score`` gave for answers, as the learner takes it in its batch.

    Args:
        answers: from `answers_to_score`.
        logprobs: one natural logarithm for each token of each answer.
    """
    return [ReferenceScore(*answer, logprob=sum(values)) for answer, values in zip(answers, logprobs, strict=True)]
