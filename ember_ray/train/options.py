"""What a learner can be told; the field names are PEFT's and TRL's own."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from ember_ray.train.schedule import SCHEDULES

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

    def __post_init__(self) -> None:
        rate = self.learning_rate
        self._need(math.isfinite(rate) and rate > 0, f"learning_rate must be finite and above 0, not {rate}")
        self._need(self.max_grad_norm >= 0, f"max_grad_norm must be at least 0, not {self.max_grad_norm}")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "epochs_per_round"):
            self._need(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        kind = self.lr_scheduler_type
        self._need(kind in SCHEDULES, f"lr_scheduler_type must be one of {', '.join(SCHEDULES)}, not '{kind}'")
        self._need(self.warmup_steps >= 0, f"warmup_steps must be at least 0, not {self.warmup_steps}")
        if self.planned_steps is None:
            self._need(kind.startswith("constant"), f"planned_steps is needed for lr_scheduler_type '{kind}'")
            share = 0 < self.warmup_steps < 1
            self._need(not share, f"planned_steps is needed for warmup_steps as a share ({self.warmup_steps})")
        else:
            self._need(self.planned_steps >= 1, f"planned_steps must be at least 1, not {self.planned_steps}")
        self._need(self.max_length is None or self.max_length >= 2, "max_length must be at least 2 tokens")

    @property
    def whole_warmup_steps(self) -> int:
        """The warm-up in optimizer steps, a share rounded up as transformers does."""
        if 0 < self.warmup_steps < 1:
            return math.ceil((self.planned_steps or 0) * self.warmup_steps)
        return int(self.warmup_steps)

    def _need(self, ok: bool, message: str) -> None:
        _need(ok, self.section, message)


@dataclass(frozen=True)
class DpoOptions(LearnerOptions):
    """How to learn from pairs, as in ``trl.DPOConfig``.

    Attributes:
        beta: how strongly the policy is held to the reference, the policy that the run started from.
        loss_type, loss_weights: TRL's losses and their weights (None: 1 each); ``sft`` is the negative
            log-likelihood of the chosen answer.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    section: ClassVar[str] = "dpo"

    beta: float = 0.1
    loss_type: tuple[str, ...] = ("sigmoid", "sft")
    loss_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(math.isfinite(self.beta) and self.beta > 0, f"beta must be finite and above 0, not {self.beta}")
        self._need(bool(self.loss_type) and not isinstance(self.loss_type, str), "loss_type must be a list of losses")
        self._need(
            self.loss_weights is None or len(self.loss_weights) == len(self.loss_type),
            f"loss_weights must have one weight for each of loss_type's {len(self.loss_type)}",
        )


def _need(ok: bool, what: str, message: str) -> None:
    if not ok:
        raise ValueError(f"{what} options: {message}")
