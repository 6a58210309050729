"""How the learners learn: one section an algorithm, with the names that TRL has for the same things."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from ember_ray.config.sections import PositiveInt, Section, Weight

DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


class OptimizerSection(Section):
    """What all learners have: batches, learning rate, clipping."""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "constant", description="Learning-rate schedule over the steps of the whole run."
    )
    warmup_steps: float = Field(
        0.0, ge=0, description="Optimizer steps of linear warm-up; a value below 1 is a share of all steps."
    )
    per_device_train_batch_size: PositiveInt = Field(16, description="Rows in one forward and backward.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Forwards and backwards in one optimizer step.")
    max_grad_norm: float = Field(1.0, gt=0, description="Norm to which the gradient is clipped.")
    max_length: PositiveInt | None = Field(
        None,
        description="Longest prompt plus answer, in tokens; longer rows are left out and counted. null = the context.",
    )


class DpoSection(OptimizerSection):
    """``dpo.*``"""

    beta: float = Field(0.1, gt=0, description="Strength of the pull towards the policy that the run starts from.")
    loss_type: Annotated[list[DpoLoss], Field(min_length=1)] = Field(
        ["sigmoid", "sft"], description="Losses that are added up, by TRL's names."
    )
    loss_weights: list[Weight] | None = Field(None, description="Weight of each loss of dpo.loss_type; null = 1 each.")
    epochs_per_round: PositiveInt = Field(1, description="Passes over the pairs of a round.")
    min_margin: float = Field(
        0.05, ge=0, description="Least difference in reward between the chosen and the rejected candidate of a pair."
    )
    pairs_per_prompt: PositiveInt = Field(
        1, description="Most pairs of one prompt: best with worst, and so on inwards."
    )

    @model_validator(mode="after")
    def _weights_match(self) -> DpoSection:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"dpo.loss_weights has {len(self.loss_weights)} values and dpo.loss_type has {len(self.loss_type)}; "
                "give one weight for each loss, or null"
            )
        if self.loss_weights is not None and not any(self.loss_weights):
            raise ValueError("dpo.loss_weights are all 0, so nothing would be learnt; make one positive")
        return self
