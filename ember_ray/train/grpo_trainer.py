"""TRL's GRPOTrainer on rollouts that the engine has made.

Importing this module imports torch, transformers and TRL (seconds): do so late.

TRL calls its rollout hook once a round and learns from what the hook returns: token ids, log-probabilities and, as a
further column, rewards. Five things are not as TRL has them, each in a method of its own below:

- a round may be of any size (`get_train_dataloader`, `_generate_and_score_completions`): TRL wants rounds of
  ``steps_per_generation * per_device_train_batch_size`` rows and groups of one size. Smaller groups are filled up with
  rows without a reward, which TRL keeps out of a group's mean and deviation; they are taken out before the loss, and
  what is missing to equal batches is filled with rows whose tokens are all masked.
- the mean over rows, in losses that have one, is over real rows (`_compute_loss`);
- log-probabilities of the rollout are used, which TRL does for vLLM alone (`use_vllm`, set after the construction);
- or they are the old policy themselves (``vllm_importance_sampling_correction=False``);
- a candidate is truncated if the engine says so, not if its last token is no EOS: it may have met a stop string.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from trl import GRPOTrainer

from ember_ray.train.grpo_rows import Answer, AnswerGroup, Deal, deal
from ember_ray.train.trl_trainer import watched

ROW_MEAN_LOSSES = ("grpo", "dr_grpo", "sapo", "luspo")
"""Losses that are means over rows; the others are means over tokens."""


@dataclass(frozen=True)
class RoundRow:
    """A row as TRL takes it; without an answer it fills its group up."""

    prompt_token_ids: tuple[int, ...]
    answer: Answer | None


class WeightsElsewhere:
    """Stands where TRL has its vLLM engine; ours gets its weights from the recipe, which publishes them."""

    def sync_weights(self) -> None:
        """Nothing to do."""


class RolloutGRPOTrainer(watched(GRPOTrainer)):  # type: ignore[misc]
    """Learns from groups of recorded candidates: ``train_dataset`` is a list of rows ``{"group": AnswerGroup}``.

    Args:
        batch_size, accumulation: most rows of a forward pass, most passes of an optimizer step; a round's own are as
            `deal` says.
        mask_truncated: mask candidates that ran into the length limit from the loss.
    """

    def __init__(self, *args: Any, batch_size: int, accumulation: int, mask_truncated: bool, **kwargs: Any) -> None:
        self.batch_size, self.accumulation, self.mask_truncated = batch_size, accumulation, mask_truncated
        self.rows: list[RoundRow] = []
        self.dealt = Deal(0, 0, 0)
        self.last_logps = torch.empty(0)
        super().__init__(*args, reward_funcs=[recorded_rewards], rollout_func=recorded_rollouts, **kwargs)
        self.use_vllm = self.args.vllm_importance_sampling_correction
        self.vllm_generation = WeightsElsewhere()
        self._last_loaded_step = -1

    def get_train_dataloader(self) -> DataLoader:
        """Once a round: its rows, given as often as there are forward passes. `_prepare_inputs` takes each its part."""
        groups: list[AnswerGroup] = [row["group"] for row in self.train_dataset]
        self.num_generations = max(len(group.answers) for group in groups)
        self.rows, inputs = [], []
        for group in groups:
            answers: list[Answer | None] = [*group.answers]
            answers += [None] * (self.num_generations - len(answers))
            self.rows += [RoundRow(group.prompt_token_ids, answer) for answer in answers]
            inputs += [{"prompt": group.request_id} for _ in answers]
        self.dealt = deal(sum(row.answer is not None for row in self.rows), self.batch_size, self.accumulation)
        self.args.gradient_accumulation_steps = self.dealt.accumulation
        self.args.steps_per_generation = self.dealt.steps * self.dealt.accumulation
        self._step, self._buffered_inputs = 0, None
        passes = self.args.steps_per_generation * self.num_iterations
        return DataLoader([inputs] * passes, batch_size=None, collate_fn=_as_they_are)  # type: ignore[arg-type]

    def is_learnt(self, row: RoundRow) -> bool:
        """Whether the row's tokens are in the loss."""
        return row.answer is not None and not (self.mask_truncated and row.answer.is_truncated)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._without_old_policy():
            output = super()._generate_and_score_completions(inputs)
        if not self.use_vllm:
            output["old_per_token_logps"] = output["sampling_per_token_logps"]
        real = [position for position, row in enumerate(self.rows) if row.answer is not None]
        num_empty = self.dealt.size * self.args.steps_per_generation - len(real)
        chosen = torch.tensor(real + real[:1] * num_empty, device=output["advantages"].device)
        output = {name: value[chosen] if value.ndim else value for name, value in output.items()}
        mask = output["tool_mask"]
        mask[len(real) :] = 0  # masked, not without attention: their log-probabilities stay those of a real row
        output["num_items_in_batch"] = (mask * output["completion_mask"]).sum()
        self.row_scale = len(chosen) / len(real)
        return output

    @contextmanager
    def _without_old_policy(self) -> Iterator[None]:
        """Where the rollout's policy is the old one, TRL need not compute its own: it does not if it takes the round
        for one optimizer step."""
        accumulation = self.args.gradient_accumulation_steps
        if not self.use_vllm:
            self.args.gradient_accumulation_steps = self.args.steps_per_generation * self.num_iterations
        try:
            yield
        finally:
            self.args.gradient_accumulation_steps = accumulation

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.last_logps = result[0].detach()
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss = super()._compute_loss(model, inputs)
        if not self.use_vllm:
            self._log_ratio(inputs)
        return loss * self.row_scale if self.loss_type in ROW_MEAN_LOSSES else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, without the numbers of the reward function that only hands on recorded rewards."""
        for name in [name for name in self._metrics["train"] if name.startswith("rewards/recorded_rewards/")]:
            del self._metrics["train"][name]
        super().log(logs, start_time)

    def _log_ratio(self, inputs: dict[str, Any]) -> None:
        """What TRL tells of the rollout's log-probabilities where it corrects with them, here of each forward pass."""
        mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        if not bool(mask.any()):
            return
        difference = (self.last_logps - inputs["sampling_per_token_logps"])[mask]
        ratio, metrics = difference.exp(), self._metrics["train"]
        metrics["sampling/sampling_logp_difference/mean"].append(difference.abs().mean().item())
        metrics["sampling/sampling_logp_difference/max"].append(difference.abs().max().item())
        metrics["sampling/importance_sampling_ratio/min"].append(ratio.min().item())
        metrics["sampling/importance_sampling_ratio/mean"].append(ratio.mean().item())
        metrics["sampling/importance_sampling_ratio/max"].append(ratio.max().item())


def recorded_rollouts(prompts: list[str], trainer: RolloutGRPOTrainer) -> dict[str, Any]:
    """TRL's rollout hook: the engine's tokens and log-probabilities, and the rewards for `recorded_rewards`."""
    filler = Answer((trainer.processing_class.eos_token_id,), (0.0,), 0.0, is_truncated=False)
    answers = [row.answer or filler for row in trainer.rows]
    assert len(prompts) == len(answers)
    return {
        "prompt_ids": [list(row.prompt_token_ids) for row in trainer.rows],
        "completion_ids": [list(answer.token_ids) for answer in answers],
        "logprobs": [list(answer.logprobs) for answer in answers],
        "recorded_reward": [None if row.answer is None else row.answer.reward for row in trainer.rows],
        # TRL's name for a mask of tokens that are in the loss
        "env_mask": [
            [int(trainer.is_learnt(row))] * len(answer.token_ids)
            for row, answer in zip(trainer.rows, answers, strict=True)
        ],
    }


def recorded_rewards(recorded_reward: list[float | None], **columns: Any) -> list[float | None]:
    """TRL's reward function: what the verifiers said when the candidates were drawn."""
    return recorded_reward


def _as_they_are(inputs: Any) -> Any:
    return inputs
