"""What the GRPO learner refuses to be told."""

import pytest

from ember_ray.train.grpo_options import GrpoOptions


@pytest.mark.parametrize(
    "options, words",
    [
        ({"loss_type": "ppo"}, "loss_type must be one of grpo, dr_grpo, .*, not 'ppo'"),
        ({"scale_rewards": "std"}, "scale_rewards must be one of group, batch, none, not 'std'"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of token, sequence"),
        ({"vllm_importance_sampling_mode": "mask"}, "vllm_importance_sampling_mode must be one of token_truncate"),
        ({"epochs_per_round": 2}, "epochs_per_round must be 1, num_iterations repeats a round"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, not 0"),
        ({"max_completion_length": 0}, "max_completion_length must be at least 1"),
        ({"beta": -0.1}, "beta must be finite and at least 0"),
        ({"epsilon": 1.0}, "epsilon must be above 0 and below 1"),
        ({"epsilon_high": 0.0}, "epsilon_high must be finite and above 0"),
        ({"temperature": float("inf")}, "temperature must be finite and above 0"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile must be above 0 and at most 1"),
        ({"delta": 1.2}, r"delta must be finite and above 1 \+ epsilon_high, which is 1.2"),
        ({"off_policy_mask_threshold": 0.0}, "off_policy_mask_threshold must be finite and above 0"),
        ({"vllm_importance_sampling_clip_max": 0.0}, "clip_max must be finite and above 0"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "clip_min 4.0 must be below vllm_importance_sampling_clip_max 3"),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "'token_truncate' needs vllm_importance_sampling_clip_min or",
        ),
        ({"loss_type": "cispo"}, "loss_type 'cispo' needs epsilon_high"),
        ({"loss_type": "luspo"}, "loss_type 'luspo' needs importance_sampling_level 'sequence'"),
        ({"loss_type": "vespo"}, "loss_type 'vespo' needs vllm_importance_sampling_mode"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options, words):
    with pytest.raises(ValueError, match=f"^grpo options: .*{words}"):
        GrpoOptions(**options)


def test_what_can_be_is_taken():
    GrpoOptions()
    GrpoOptions(loss_type="cispo", epsilon_high=5.0)
    GrpoOptions(loss_type="luspo", importance_sampling_level="sequence", delta=1.5)
    GrpoOptions(loss_type="vespo", vllm_importance_sampling_correction=False)
    GrpoOptions(vllm_importance_sampling_mode="token_mask", vllm_importance_sampling_clip_max=None)
