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


class LearnerSection(Section):
    """``learner.*``"""

    base: Literal["auto", "shared", "own"] = Field(
        "auto",
        description="Base weights of the learner: shared = those of the engine, in its memory; own = a copy; "
        "auto = shared where the stages are on the learner's node and its number format is theirs.",
    )


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
    mismatch_candidates: Annotated[int, Field(ge=0)] | None = Field(
        32, description="Candidates of a round on which engine and learner are compared; null = all, 0 = none."
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
    pairs_per_prompt: int = Field(1, ge=0, description="Most pairs of one prompt; 0 = all that the choice allows.")
    pair_choice: Literal["best_worst", "all_margin", "oracle"] = Field(
        "best_worst",
        description="best_worst: best with worst, and so on inwards; all_margin: all that differ enough; "
        "oracle: the gold answer with the worst.",
    )
    reference: Literal["trainer", "engine"] = Field(
        "engine", description="Who computes the reference's log-probabilities: a pass of the trainer, or the engine."
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


class SftSection(OptimizerSection):
    """``sft.*``"""

    faults: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Faults of the generated demonstrations: 0 = none, 1 = as many as the shipped model learnt from.",
    )
    rows_per_round: PositiveInt = Field(512, description="Demonstrations of one round.")
    loss_type: Literal["nll", "dft"] = Field("nll", description="nll: likelihood; dft: weighed by the probability.")


class BestOfNSection(OptimizerSection):
    """``best_of_n.*``"""

    min_reward: float | None = Field(
        None,
        description="Least reward of a candidate that is learnt from; null = 0.999 of the most that the weights of "
        "reward.functions add up to.",
    )
    per_prompt: int = Field(
        1, ge=0, description="Most candidates of a prompt that are learnt from, best first; 0 = all."
    )
    epochs_per_round: PositiveInt = Field(1, description="Passes over the chosen candidates of a round.")


class GrpoSection(OptimizerSection):
    """``grpo.*``"""

    per_device_train_batch_size: PositiveInt = Field(64, description="Candidates in one forward and backward.")
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"] = Field(
        "dapo", description="The loss, by TRL's names."
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="Advantages are divided by the spread of rewards in the group, in the round, or not."
    )
    beta: float = Field(
        0.0, ge=0, description="Weight of the KL term to the policy that the run starts from; 0 = none."
    )
    use_bias_correction_kl: bool = Field(True, description="Multiply the KL term with the ratio.")
    num_iterations: PositiveInt = Field(1, description="Passes over the candidates of a round.")
    epsilon: float = Field(0.2, gt=0, lt=1, description="The ratio is clipped to [1 - epsilon, 1 + epsilon_high].")
    epsilon_high: Annotated[float, Field(gt=0)] | None = Field(None, description="See grpo.epsilon; null = epsilon.")
    delta: Annotated[float, Field(gt=1)] | None = Field(
        None, description="Bound of the ratio where the advantage is negative; null = none."
    )
    importance_sampling_level: Literal["token", "sequence"] = Field(
        "token", description="A ratio per token, or one per candidate (GSPO)."
    )
    vllm_importance_sampling_correction: bool = Field(
        True,
        description="Weigh the loss by trainer over rollout probabilities; false takes the rollout's as the old ones.",
    )
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        Field("token_truncate", description="The weight is per token or candidate; beyond its bounds cut, or masked.")
    )
    vllm_importance_sampling_clip_max: Annotated[float, Field(gt=0)] | None = Field(
        3.0, description="Most that the weight may be; null = no bound."
    )
    vllm_importance_sampling_clip_min: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Least that the weight may be; null = no bound."
    )
    off_policy_mask_threshold: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Leave out bad candidates that the policy has moved away from further than this; null = none."
    )
    mask_truncated_completions: bool = Field(
        False, description="Leave candidates that ran into rollout.max_tokens out of the loss (over-long filtering)."
    )
    top_entropy_quantile: float = Field(
        1.0, gt=0, le=1, description="Share of tokens, those of highest entropy, whose loss counts; 1 = all."
    )
    skip_zero_std_groups: bool = Field(True, description="Leave out groups whose rewards are all equal.")
    refill: bool = Field(
        False, description="Roll out other prompts in place of groups whose rewards are all equal, once a rollout."
    )
    async_steps: int = Field(
        0,
        ge=0,
        description="Rounds that the rollout may run ahead of learning; the policy is that much older.",
    )
    in_flight: bool = Field(
        False,
        description="A rollout that runs ahead goes on under each new policy at once, not only the next one.",
    )

    @model_validator(mode="after")
    def _check_in_flight(self) -> GrpoSection:
        if self.in_flight and not self.async_steps:
            raise ValueError(
                "in_flight needs a rollout that runs while the learner works; set async_steps to 1 or more"
            )
        return self
