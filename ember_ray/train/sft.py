"""Supervised fine-tuning on TRL's SFTTrainer: imitates answers, which people gave or the verifier chose.

The loss is over the answer's tokens alone. Rows come as token ids with their labels, so that no text is tokenised
again, and TRL's preparation of data sets, which would cut long ones, is passed over. All tokens of an optimizer step
weigh the same, however it is divided into forward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ember_ray.data.scored_group import ScoredGroup
from ember_ray.train.adapter_learner import AdapterLearner, RoundRows, Row, TrainerParts
from ember_ray.train.batch import Demonstration
from ember_ray.train.best_of_n import select_best
from ember_ray.train.errors import LearnerError
from ember_ray.train.options import SftOptions

IGNORED = -100
"""The label of a token that is not learnt, in TRL and torch."""


class SftLearner(AdapterLearner):
    """Learns a LoRA adapter by imitation, round after round; see `AdapterLearner`.

    `learn` takes demonstrations, and scored groups, of which it takes the best candidates as the options say
    (best-of-N). Of TRL's metrics it gives ``entropy`` and ``mean_token_accuracy``, both over the answers' tokens; its
    counts are ``rows`` (learned from), ``rows_too_long`` (left out, never cut), ``answer_tokens`` (in one pass over
    the rows), and for groups the fields of `SelectionCounts` as ``selection/<field>``.
    """

    options: SftOptions

    def _make_trainer(self, parts: TrainerParts) -> Any:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        from ember_ray.train.trl_trainer import watched

        return watched(SFTTrainer)(
            model=parts.model,
            peft_config=parts.peft_config,
            args=SFTConfig(
                **parts.arguments,
                loss_type=self.options.loss_type,
                max_length=None,  # checked here: TRL would cut
                packing=False,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            # TRL wants a data set at the start; the rounds' own rows take its place in learn().
            train_dataset=Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[IGNORED, 0]]}),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=parts.pad_token_id),
            processing_class=parts.tokenizer,
            callbacks=parts.callbacks,
        )

    def _round_rows(self, batch: Sequence[Demonstration | ScoredGroup]) -> RoundRows:
        for entry in batch:
            if not isinstance(entry, Demonstration | ScoredGroup):
                raise LearnerError(f"SFT learns from demonstrations or scored groups, not from {type(entry).__name__}")
        found = [entry for entry in batch if isinstance(entry, Demonstration)]
        groups = [entry for entry in batch if isinstance(entry, ScoredGroup)]
        counts: dict[str, float] = {}
        if groups:
            best, selection = select_best(groups, self.options.min_reward, self.options.per_prompt)
            found += best
            counts = {f"selection/{name}": count for name, count in asdict(selection).items()}
        rows = [row for row in map(self._row, found) if row is not None]
        answers = sum(label != IGNORED for row in rows for label in row["labels"])
        counts |= {"rows": len(rows), "rows_too_long": len(found) - len(rows), "answer_tokens": answers}
        return RoundRows(rows, sum(len(row["input_ids"]) for row in rows), counts)

    def _row(self, shown: Demonstration) -> Row | None:
        """The demonstration in the columns of TRL's collator; None when it is too long."""
        prompt, answer = list(shown.prompt_token_ids), list(shown.completion_token_ids)
        self.check_tokens(
            f"the demonstration of '{shown.request_id}'", {"prompt_ids": prompt, "completion_ids": answer}
        )
        if not self.fits(len(prompt) + len(answer)):
            return None
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}
