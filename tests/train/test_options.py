"""Options that make no sense are refused by name."""

import pytest

from ember_ray.train.options import DpoOptions, LoraOptions, SftOptions


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"beta": -1.0}, "beta"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"epochs_per_round": 0}, "epochs_per_round"),
        ({"lr_scheduler_type": "cosinus"}, "cosinus"),
        ({"lr_scheduler_type": "cosine"}, "planned_steps is needed"),
        ({"warmup_steps": 0.1}, "planned_steps is needed"),
        ({"planned_steps": 0}, "planned_steps"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"loss_type": "sigmoid"}, "loss_type"),
        ({"loss_weights": (1.0,)}, "loss_weights"),
        ({"max_length": 1}, "max_length"),
        ({"pair_choice": "worst"}, "pair_choice"),
        ({"min_margin": -0.1}, "min_margin"),
        ({"pairs_per_prompt": -1}, "pairs_per_prompt"),
        ({"reference": "base"}, "reference must be one of trainer, engine"),
        ({"mismatch_candidates": -1}, "mismatch_candidates"),
    ],
)
def test_dpo(values, word):
    with pytest.raises(ValueError, match=word):
        DpoOptions(**values)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"r": 0}, "r must"),
        ({"lora_alpha": float("inf")}, "lora_alpha"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"target_modules": ("q_proj", "lm_head")}, "lm_head"),
        ({"target_modules": "q_proj"}, "target_modules"),
        ({"target_modules": ()}, "target_modules"),
        ({"layers_to_transform": ()}, "layers_to_transform"),
    ],
)
def test_lora(values, word):
    with pytest.raises(ValueError, match=word):
        LoraOptions(**values)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"loss_type": "sigmoid"}, "sft options: loss_type must be one of nll, dft"),
        ({"min_reward": float("nan")}, "min_reward"),
        ({"per_prompt": -1}, "per_prompt"),
        ({"learning_rate": -1.0}, "sft options: learning_rate"),
    ],
)
def test_sft(values, word):
    with pytest.raises(ValueError, match=word):
        SftOptions(**values)


def test_defaults_are_sound():
    assert LoraOptions().r == 16 and DpoOptions().loss_type == ("sigmoid", "sft") and SftOptions().loss_type == "nll"


def test_a_warmup_below_one_is_a_share():
    assert DpoOptions(warmup_steps=0.1, planned_steps=25).whole_warmup_steps == 3
    assert DpoOptions(warmup_steps=4, planned_steps=25).whole_warmup_steps == 4
    assert DpoOptions().whole_warmup_steps == 0
