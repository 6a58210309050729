"""What a learner can be told; the field names are PEFT's and TRL's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ember_ray.train.pairs import PAIR_CHOICES
from ember_ray.train.schedule import SCHEDULES

REFERENCES = ("trainer", "engine")
SFT_LOSSES = ("nll", "dft")
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraOptions:
    """The shape of the adapter, as in ``peft.LoraConfig``.

    Attributes:
        r: rank of A and B where no pattern says otherwise.
        lora_alpha: the scale is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        target_modules: which linear layers get an adapter.
        rank_pattern, alpha_pattern: other values by module name or regular expression.
        layers_to_transform: layer indices to adapt; None adapts all.
        lora_dropout: dropout on the input of A while learning, in [0, 1).

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    r: int = 16
    lora_alpha: float = 32.0
    target_modules: tuple[str, ...] = LINEAR_LAYERS
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: tuple[int, ...] | None = None
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        _need(self.r >= 1, "lora", f"r must be at least 1, not {self.r}")
        _need(math.isfinite(self.lora_alpha), "lora", f"lora_alpha must be finite, not {self.lora_alpha}")
        _need(0 <= self.lora_dropout < 1, "lora", f"lora_dropout must be in [0, 1), not {self.lora_dropout}")
        _need(not isinstance(self.target_modules, str), "lora", "target_modules must be a list, not one string")
        unknown = [name for name in self.target_modules if name not in LINEAR_LAYERS]
        _need(not unknown, "lora", f"target_modules has '{''.join(unknown[:1])}', known are {', '.join(LINEAR_LAYERS)}")
        _need(bool(self.target_modules), "lora", "target_modules must name at least one linear layer")
        _need(self.layers_to_transform != (), "lora", "layers_to_transform must name at least one layer, or be null")


@dataclass(frozen=True)
class LearnerOptions:
    """What every learner can be told, as in ``transformers.TrainingArguments``; the base of their own options.

    Attributes:
        learning_rate: peak of the schedule (AdamW, no weight decay).
        lr_scheduler_type: ``constant``, ``linear`` or ``cosine``, see ``ember_ray.train.schedule``.
        warmup_steps: optimizer steps of linear warm-up at the start of the run; below 1, a share of the planned ones.
        per_device_train_batch_size: rows in one forward pass.
        gradient_accumulation_steps: forward passes in one optimizer step.
        epochs_per_round: times each round's rows are used.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        max_length: rows with a longer prompt + answer (tokens) are left out and counted, never cut;
            None takes the model's context length.
        planned_steps: optimizer steps of the whole run, the length of the schedule; needed unless it is constant.
        seed: of the adapter's first A, the order of rows and the dropout.
        mismatch_candidates: candidates of each round on which the engine's log-probabilities are compared with the
            learner's (a forward pass each); None takes all, 0 none.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    section: ClassVar[str] = "learner"
    """Before the names of options in messages and in saved states."""

    learning_rate: float = 3e-4
    lr_scheduler_type: str = "constant"
    warmup_steps: float = 0
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1
    epochs_per_round: int = 1
    max_grad_norm: float = 1.0
    max_length: int | None = None
    planned_steps: int | None = None
    seed: int = 0
    mismatch_candidates: int | None = 32

    def __post_init__(self) -> None:
        rate = self.learning_rate
        self._need(math.isfinite(rate) and rate > 0, f"learning_rate must be finite and above 0, not {rate}")
        self._need(self.max_grad_norm >= 0, f"max_grad_norm must be at least 0, not {self.max_grad_norm}")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "epochs_per_round"):
            self._need(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        self._one_of("lr_scheduler_type", SCHEDULES)
        self._need(self.warmup_steps >= 0, f"warmup_steps must be at least 0, not {self.warmup_steps}")
        if self.planned_steps is None:
            kind = self.lr_scheduler_type
            self._need(kind.startswith("constant"), f"planned_steps is needed for lr_scheduler_type '{kind}'")
            share = 0 < self.warmup_steps < 1
            self._need(not share, f"planned_steps is needed for warmup_steps as a share ({self.warmup_steps})")
        else:
            self._need(self.planned_steps >= 1, f"planned_steps must be at least 1, not {self.planned_steps}")
        self._need(self.max_length is None or self.max_length >= 2, "max_length must be at least 2 tokens")
        measured = self.mismatch_candidates
        self._need(measured is None or measured >= 0, f"mismatch_candidates must be at least 0 or null, not {measured}")

    @property
    def whole_warmup_steps(self) -> int:
        """The warm-up in optimizer steps, a share rounded up as transformers does."""
        if 0 < self.warmup_steps < 1:
            return math.ceil((self.planned_steps or 0) * self.warmup_steps)
        return int(self.warmup_steps)

    def _need(self, ok: bool, message: str) -> None:
        _need(ok, self.section, message)

    def _one_of(self, name: str, known: Sequence[str]) -> None:
        value = getattr(self, name)
        self._need(value in known, f"{name} must be one of {', '.join(known)}, not '{value}'")


@dataclass(frozen=True)
class DpoOptions(LearnerOptions):
    """How to learn from pairs, as in ``trl.DPOConfig``.

    Attributes:
        beta: how strongly the policy is held to the reference, the policy that the run started from.
        loss_type, loss_weights: TRL's losses and their weights (None: 1 each); ``sft`` is the negative
            log-likelihood of the chosen answer.
        pair_choice, min_margin, pairs_per_prompt: which pairs are made of groups, see `make_pairs`.
        reference: who computes the reference's log-probabilities: ``trainer`` in passes of its own, or ``engine``,
            whose scores then come in the batch.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    section: ClassVar[str] = "dpo"

    beta: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid", "sft")
    loss_weights: tuple[float, ...] | None = None
    pair_choice: str = "best_worst"
    min_margin: float = 0.05
    pairs_per_prompt: int = 1
    reference: str = "trainer"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(math.isfinite(self.beta) and self.beta > 0, f"beta must be finite and above 0, not {self.beta}")
        self._need(bool(self.loss_type) and not isinstance(self.loss_type, str), "loss_type must be a list of losses")
        self._need(
            self.loss_weights is None or len(self.loss_weights) == len(self.loss_type),
            f"loss_weights must have one weight for each of loss_type's {len(self.loss_type)}",
        )
        self._one_of("pair_choice", PAIR_CHOICES)
        margin = self.min_margin
        self._need(math.isfinite(margin) and margin >= 0, f"min_margin must be finite and at least 0, not {margin}")
        self._need(self.pairs_per_prompt >= 0, f"pairs_per_prompt must be at least 0, not {self.pairs_per_prompt}")
        self._one_of("reference", REFERENCES)


@dataclass(frozen=True)
class SftOptions(LearnerOptions):
    """How to imitate answers, as in ``trl.SFTConfig``.

    Attributes:
        loss_type: ``nll``, the negative log-likelihood, or ``dft`` (Wu et al. 2025, "On the generalization of SFT"),
            which weighs it with the token's probability.
        min_reward, per_prompt: which candidates of groups are imitated, see `select_best`.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    section: ClassVar[str] = "sft"

    loss_type: str = "nll"
    min_reward: float = 0.999
    per_prompt: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("loss_type", SFT_LOSSES)
        self._need(not math.isnan(self.min_reward), "min_reward must be a number, not nan")
        self._need(self.per_prompt >= 0, f"per_prompt must be at least 0, not {self.per_prompt}")


def _need(ok: bool, what: str, message: str) -> None:
    if not ok:
        raise ValueError(f"{what} options: {message}")
