"""What the GRPO learner can be told; the field names and their meaning are TRL's where TRL has them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ember_ray.train.options import LearnerOptions

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
SCALE_REWARDS = ("group", "batch", "none")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence")
IMPORTANCE_SAMPLING_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class GrpoOptions(LearnerOptions):
    """How to learn from scored groups, as in ``trl.GRPOConfig``.

    A round is one generation batch of TRL's. It is dealt evenly to optimizer steps of at most
    ``per_device_train_batch_size * gradient_accumulation_steps`` candidates, so TRL's ``steps_per_generation`` follows
    from the round's size and is no option; see `ember_ray.train.grpo_rows.deal`.

    Attributes:
        loss_type: ``grpo`` (Shao et al. 2024, 2402.03300, equation 3), ``dr_grpo`` (Liu et al. 2025, 2503.20783),
            ``dapo`` (Yu et al. 2025, 2503.14476), ``bnpo``, ``cispo`` (2506.13585), ``sapo`` (2511.20347), ``luspo``
            (2602.05261) or ``vespo`` (2602.10693).
        scale_rewards: advantages are divided by the standard deviation of rewards in the ``group`` or in the whole
            ``batch`` (round), or not (``none``).
        beta: weight of the KL divergence to the reference, the policy that the run started from; 0 computes none.
        use_bias_correction_kl: multiply the KL term with the ratio, which makes its gradient that of the reverse KL.
        num_iterations: how often each round's candidates are used.
        epsilon, epsilon_high: the ratio is clipped to [1 - epsilon, 1 + epsilon_high]; None takes epsilon. For
            ``cispo`` epsilon_high is the largest ratio.
        delta: bound of the ratio where the advantage is negative (2505.07291); None leaves it.
        importance_sampling_level: a ratio per ``token``, or one per ``sequence`` (GSPO, 2507.18071).
        vllm_importance_sampling_correction: what the rollout's recorded log-probabilities do, see
            `ember_ray.train.grpo`. True: they weigh the loss (pi_start / pi_rollout, truncated or masked) while the
            clipped ratio is pi / pi_start, of the trainer at the round's start. False: they are the old policy itself,
            the clipped ratio is pi / pi_rollout, which saves a pass over the round.
        vllm_importance_sampling_mode: the weight is per token or per sequence; outside the two bounds it is truncated
            to them, or masked (0).
        vllm_importance_sampling_clip_max, vllm_importance_sampling_clip_min: the bounds; None is no bound.
        off_policy_mask_threshold: leaves out candidates with a negative advantage whose mean log(pi_rollout / pi) a
            token is above it (2512.02556, equation 9); None leaves none out.
        mask_truncated_completions: candidates that ran into the length limit count in their group's mean, but are
            masked from the loss.
        max_completion_length: most tokens of a candidate, the constant that ``dr_grpo`` divides by.
        top_entropy_quantile: share of tokens, by entropy, whose loss counts (2506.01939); 1 takes all.
        temperature: what the rollouts were drawn with. At 1 the recorded ``logprobs`` are used. Otherwise the trainer
            divides its logits by it and ``sampling_logprobs`` are used; a rollout with top-k or top-p then has ratios
            below 1, since those are log-probabilities among the tokens that were left.
        skip_zero_std_groups: leave out groups whose rewards are all equal. They have no advantage, but cost as much as
            others; with ``beta`` above 0 they still pull towards the reference.

    Raises:
        ValueError: a value is out of range; the message names it.
    """

    section: ClassVar[str] = "grpo"

    loss_type: str = "dapo"
    scale_rewards: str = "group"
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    num_iterations: int = 1
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: str = "token"
    vllm_importance_sampling_correction: bool = True
    vllm_importance_sampling_mode: str = "sequence_mask"
    vllm_importance_sampling_clip_max: float | None = 3.0
    vllm_importance_sampling_clip_min: float | None = None
    off_policy_mask_threshold: float | None = None
    mask_truncated_completions: bool = False
    max_completion_length: int = 512
    top_entropy_quantile: float = 1.0
    temperature: float = 1.0
    skip_zero_std_groups: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need(self.epochs_per_round == 1, "epochs_per_round must be 1, num_iterations repeats a round")
        for name, choices in (
            ("loss_type", LOSS_TYPES),
            ("scale_rewards", SCALE_REWARDS),
            ("importance_sampling_level", IMPORTANCE_SAMPLING_LEVELS),
            ("vllm_importance_sampling_mode", IMPORTANCE_SAMPLING_MODES),
        ):
            value = getattr(self, name)
            self._need(value in choices, f"{name} must be one of {', '.join(choices)}, not '{value}'")
        for name in ("num_iterations", "max_completion_length"):
            self._need(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        self._need(math.isfinite(self.beta) and self.beta >= 0, f"beta must be finite and at least 0, not {self.beta}")
        self._need(0 < self.epsilon < 1, f"epsilon must be above 0 and below 1, not {self.epsilon}")
        for name in ("epsilon_high", "off_policy_mask_threshold", "temperature"):
            self._need_positive(name)
        share = self.top_entropy_quantile
        self._need(0 < share <= 1, f"top_entropy_quantile must be above 0 and at most 1, not {share}")
        bound = 1 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)
        self._need(
            self.delta is None or bound < self.delta < math.inf,
            f"delta must be finite and above 1 + epsilon_high, which is {bound:g}, not {self.delta}",
        )
        self._check_weights()
        self._check_loss()

    def _check_weights(self) -> None:
        least, most = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        for name in ("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"):
            self._need_positive(name)
        self._need(
            least is None or most is None or least < most,
            f"vllm_importance_sampling_clip_min {least} must be below vllm_importance_sampling_clip_max {most}",
        )
        bounded = least is not None or most is not None or not self.vllm_importance_sampling_correction
        mode = self.vllm_importance_sampling_mode
        self._need(
            bounded or mode.endswith("_mask"),
            f"vllm_importance_sampling_mode '{mode}' needs vllm_importance_sampling_clip_min or ..._clip_max",
        )

    def _check_loss(self) -> None:
        if self.loss_type == "cispo":
            self._need(
                self.epsilon_high is not None,
                "loss_type 'cispo' needs epsilon_high, there the largest ratio; 5.0 is usual",
            )
        if self.loss_type == "luspo":
            self._need(
                self.importance_sampling_level == "sequence",
                "loss_type 'luspo' needs importance_sampling_level 'sequence'",
            )
        if self.loss_type == "vespo":
            self._need(
                self.importance_sampling_level == "token", "loss_type 'vespo' needs importance_sampling_level 'token'"
            )
            self._need(
                not self.vllm_importance_sampling_correction or self.vllm_importance_sampling_mode.startswith("token_"),
                "loss_type 'vespo' needs vllm_importance_sampling_mode 'token_truncate' or 'token_mask'",
            )

    def _need_positive(self, name: str) -> None:
        value = getattr(self, name)
        ok = value is None or (math.isfinite(value) and value > 0)
        self._need(ok, f"{name} must be finite and above 0, not {value}")
