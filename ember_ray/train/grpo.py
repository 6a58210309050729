"""GRPO on TRL's GRPOTrainer: learns from scored groups (Shao et al. 2024, "DeepSeekMath", 2402.03300).

TRL's rollout hook gives it the engine's own tokens, log-probabilities and rewards; no text is tokenised and no answer
verified again. `GrpoOptions` has TRL's names.

**Off-policy.** A group may be older than the learner: drawn by a policy some updates back, as it is where the next
rollout overlaps learning. Its candidates carry the log-probabilities of the policy that drew them, and these are what
is corrected with, whatever the version: no weights of older policies are kept. With pi the policy that learns,
pi_start that of the round's start and pi_rollout the recorded one,

- ``vllm_importance_sampling_correction=True``: the clipped ratio is pi / pi_start, and the loss is weighed with
  pi_start / pi_rollout, truncated or masked (truncated importance sampling: Ionides 2008; with the two policies kept
  apart: Hilton et al. 2022, 2110.00641);
- ``False``: the clipped ratio is pi / pi_rollout, as in PPO (Schulman et al. 2017, 1707.06347).

On a fresh rollout pi_start is pi_rollout but for rounding, and both are the same.

**Left out.** Candidates whose verifier failed, that were aborted, empty or too long are not learnt from: their group's
mean and deviation are over the rest, they are in no loss and no mean, and they are counted.

The reference of the KL term is the policy that the run started from: the base model, or the starting adapter.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

from ember_ray.data.scored_group import ScoredGroup
from ember_ray.train.adapter_learner import AdapterLearner, RoundRows, TrainerParts
from ember_ray.train.errors import LearnerError
from ember_ray.train.grpo_options import GrpoOptions
from ember_ray.train.grpo_rows import AnswerGroup, make_groups, round_metrics, zero_spread

__all__ = ["GrpoLearner", "GrpoOptions", "LearnerError", "zero_spread"]


class GrpoLearner(AdapterLearner):
    """Learns a LoRA adapter from scored groups, round after round; see `AdapterLearner`.

    `learn` takes `ScoredGroup`s. Of TRL's metrics it gives, averaged over the round's steps, ``loss``, ``grad_norm``,
    ``learning_rate``, ``entropy``, ``kl`` (with ``beta``), ``clip_ratio/{low_mean,low_min,high_mean,high_max,
    region_mean}`` (of the losses that clip), ``sampling/sampling_logp_difference/{mean,max}`` and
    ``sampling/importance_sampling_ratio/{min,mean,max}`` (against the recorded log-probabilities), and of the round
    what `round_metrics` has (``reward``, ``reward_std``, ``frac_reward_zero_std``, ``completions/...``). Its counts
    are those of `make_groups`, ``groups_zero_std`` (all rewards equal) and ``groups_skipped`` (those left out by
    ``skip_zero_std_groups``).

    Raises:
        LearnerError: beside what `AdapterLearner` has, ``lora_dropout`` is not 0: ratios would compare a policy with
            dropout to one without.
    """

    options: GrpoOptions

    def _make_trainer(self, parts: TrainerParts) -> Any:
        from datasets import Dataset
        from trl import GRPOConfig

        from ember_ray.train.grpo_trainer import RolloutGRPOTrainer

        options = self.options
        if self.lora.lora_dropout:
            raise LearnerError(f"GRPO needs lora_dropout 0, not {self.lora.lora_dropout}: the rollout has no dropout")
        arguments = parts.arguments | {"steps_per_generation": 2 * options.gradient_accumulation_steps}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'", category=UserWarning)
            return RolloutGRPOTrainer(
                model=parts.model,
                peft_config=parts.peft_config,
                args=GRPOConfig(
                    **arguments,  # the steps are of the placeholder; each round has its own
                    num_generations=2,
                    loss_type=options.loss_type,
                    scale_rewards=options.scale_rewards,
                    beta=options.beta,
                    use_bias_correction_kl=options.use_bias_correction_kl,
                    num_iterations=options.num_iterations,
                    epsilon=options.epsilon,
                    epsilon_high=options.epsilon_high,
                    delta=options.delta,
                    importance_sampling_level=options.importance_sampling_level,
                    vllm_importance_sampling_correction=options.vllm_importance_sampling_correction,
                    vllm_importance_sampling_mode=options.vllm_importance_sampling_mode,
                    vllm_importance_sampling_clip_max=options.vllm_importance_sampling_clip_max,
                    vllm_importance_sampling_clip_min=options.vllm_importance_sampling_clip_min,
                    off_policy_mask_threshold=options.off_policy_mask_threshold,
                    max_completion_length=options.max_completion_length,
                    top_entropy_quantile=options.top_entropy_quantile,
                    temperature=options.temperature,
                    disable_dropout=True,
                ),
                train_dataset=Dataset.from_dict({"prompt": ["a"]}),
                processing_class=parts.tokenizer,
                callbacks=parts.callbacks,
                batch_size=options.per_device_train_batch_size,
                accumulation=options.gradient_accumulation_steps,
                mask_truncated=options.mask_truncated_completions,
            )

    def _round_rows(self, batch: Sequence[ScoredGroup]) -> RoundRows:
        options = self.options
        groups, counts = make_groups(batch, self.fits, use_sampling_logprobs=options.temperature != 1.0)
        for group in groups:
            self._check(group)
        useless = sum(group.is_zero_spread for group in groups)
        counts |= {"groups_zero_std": useless, "groups_skipped": useless if options.skip_zero_std_groups else 0}
        learnt = [group for group in groups if not (options.skip_zero_std_groups and group.is_zero_spread)]
        tokens = options.num_iterations * sum(group.num_tokens for group in learnt)
        return RoundRows([{"group": group} for group in learnt], tokens, counts | round_metrics(groups))

    def _check(self, group: AnswerGroup) -> None:
        """Refuses what the engine cannot have made of this model."""
        for answer in group.answers:
            whose = f"a candidate of prompt '{group.request_id}'"
            self.check_tokens(whose, {"prompt_token_ids": group.prompt_token_ids, "token_ids": answer.token_ids})
            known = [value for value in answer.logprobs if math.isfinite(value)]
            if len(known) != len(answer.token_ids):
                raise LearnerError(
                    f"{whose} has {len(known)} finite log-probabilities for {len(answer.token_ids)} tokens; GRPO needs "
                    "the engine's own for every token"
                )
