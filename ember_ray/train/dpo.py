"""DPO on TRL's DPOTrainer: learns from preference pairs.

The reference is the policy that the run started from: the base model with the adapter off, or the starting adapter.
TRL takes the base where it wraps the model itself (``peft_config=``); handed a model that is wrapped already, it keeps
a copy of its adapter. With ``reference`` ``engine`` its log-probabilities come with the batch instead, and the learner
makes no forward pass of the reference.

Completions are trained on exactly the tokens that the engine sampled: the data set has the columns that TRL's own
collator reads (``prompt_ids``, ``chosen_ids``, ``rejected_ids``, ``ref_chosen_logps``, ``ref_rejected_logps``), so no
text is tokenised again.

Rafailov et al. 2023, "Direct Preference Optimization", equation 7, is the ``sigmoid`` loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ember_ray.train.adapter_learner import STATE_FILE, AdapterLearner, RoundRows, Row, TrainerParts
from ember_ray.train.batch import Answer, ReferenceScore
from ember_ray.train.errors import LearnerError
from ember_ray.train.options import DpoOptions, LoraOptions
from ember_ray.train.pairs import PreferencePair
from ember_ray.train.preferences import PreferenceEntry, batch_pairs

__all__ = ["STATE_FILE", "DpoLearner", "DpoOptions", "LearnerError", "LoraOptions"]


class DpoLearner(AdapterLearner):
    """Learns a LoRA adapter from preference pairs, round after round; see `AdapterLearner`.

    `learn` takes scored groups, of which it makes pairs as the options say, and pairs as they are; beside them gold
    answers for ``pair_choice`` ``oracle``, and reference scores for ``reference`` ``engine``. Of TRL's metrics it
    gives ``rewards/chosen``, ``rewards/rejected``, ``rewards/accuracies``, ``rewards/margins``, ``logps/chosen``,
    ``logps/rejected``, ``logits/...``, ``entropy``, ``mean_token_accuracy``; its counts are ``pairs`` (learned from),
    ``pairs_too_long`` (left out), and for groups the fields of `PairCounts` as ``pairs/<field>``.
    """

    options: DpoOptions

    def _make_trainer(self, parts: TrainerParts) -> Any:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        from ember_ray.train.trl_trainer import watched

        options = self.options
        trainer = watched(DPOTrainer)(
            model=parts.model,
            peft_config=parts.peft_config,
            args=DPOConfig(
                **parts.arguments,
                beta=options.beta,
                loss_type=list(options.loss_type),
                loss_weights=list(options.loss_weights) if options.loss_weights else None,
                max_length=None,  # checked here: TRL would cut
                disable_dropout=self.lora.lora_dropout == 0.0,
            ),
            # TRL wants a data set of texts at the start; the rounds' own pairs take its place in learn().
            train_dataset=Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}),
            data_collator=DataCollatorForPreference(pad_token_id=parts.pad_token_id),
            processing_class=parts.tokenizer,
            callbacks=parts.callbacks,
        )
        # Not through DPOConfig.precompute_ref_log_probs: TRL would run the reference itself, once, at the start.
        trainer.precompute_ref_logps = options.reference == "engine"
        return trainer

    def _round_rows(self, batch: Sequence[PreferenceEntry]) -> RoundRows:
        pairs, counts = batch_pairs(batch, self.options)
        scores: dict[Answer, float] = {
            (entry.prompt_token_ids, entry.completion_token_ids): entry.logprob
            for entry in batch
            if isinstance(entry, ReferenceScore)
        }
        rows = [row for row in (self._row(pair, scores) for pair in pairs) if row is not None]
        tokens = sum(2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
        return RoundRows(rows, tokens, {"pairs": len(rows), "pairs_too_long": len(pairs) - len(rows)} | counts)

    def _row(self, pair: PreferencePair, scores: dict[Answer, float]) -> Row | None:
        """The pair in the columns of TRL's collator; None when it is too long."""
        row: Row = {
            "prompt_ids": list(pair.prompt_token_ids),
            "chosen_ids": list(pair.chosen_token_ids),
            "rejected_ids": list(pair.rejected_token_ids),
        }
        self.check_tokens(f"a pair of prompt '{pair.request_id}'", row)
        if not self.fits(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))):
            return None
        if self.options.reference == "engine":
            for column, tokens in (
                ("ref_chosen_logps", pair.chosen_token_ids),
                ("ref_rejected_logps", pair.rejected_token_ids),
            ):
                if (pair.prompt_token_ids, tokens) not in scores:
                    raise LearnerError(
                        f"a pair of prompt '{pair.request_id}' has no reference log-probabilities in the batch; have "
                        "the engine score its answers, or set dpo.reference to 'trainer'"
                    )
                row[column] = scores[pair.prompt_token_ids, tokens]
        return row
