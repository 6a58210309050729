"""A learner that starts from an adapter: it computes the adapter, and its reference is the adapter."""

import pytest
import torch

from ember_ray.model.lora import load_peft_adapter
from ember_ray.train.dpo import DpoLearner, DpoOptions, LearnerError, LoraOptions

pytestmark = pytest.mark.slow  # each one trains

LORA = LoraOptions(r=4, lora_alpha=8, rank_pattern={"up_proj": 2}, alpha_pattern={"down_proj": 4.0})
DPO = DpoOptions(learning_rate=1e-2, seed=5)


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def start(tiny_qwen3, make_pair, tmp_path):
    """Folder of an adapter that moves the model."""
    learner = DpoLearner(tiny_qwen3, LORA, DPO)
    for _ in range(3):
        learner.learn([make_pair()])
    learner.save_adapter(tmp_path / "start")
    return tmp_path / "start"


def test_it_starts_at_the_adapter_which_is_the_reference(tiny_qwen3, make_pair, start, tmp_path):
    first = load_peft_adapter(start, 1)
    learner = DpoLearner(tiny_qwen3, LORA, DPO, init_adapter=start)
    update = learner.adapter_update(1)
    assert equal(update.tensors, first.tensors) and dict(update.scaling) == pytest.approx(dict(first.scaling))
    bare = DpoLearner(tiny_qwen3, LORA, DPO).learn([make_pair()])
    metrics = learner.learn([make_pair()])
    assert abs(metrics["logps/chosen"] - bare["logps/chosen"]) > 0.5  # it is not the base model
    assert metrics["rewards/chosen"] == pytest.approx(0.0, abs=1e-5)  # but it is its reference
    again = learner.learn([make_pair()])
    moved = again["logps/chosen"] - metrics["logps/chosen"]
    assert abs(moved) > 0.1 and again["rewards/chosen"] == pytest.approx(0.1 * moved, rel=1e-3)

    learner.save_adapter(tmp_path / "saved")  # without the reference beside it
    assert {path.name for path in (tmp_path / "saved").iterdir()} >= {"adapter_model.safetensors"}
    assert not any(path.is_dir() for path in (tmp_path / "saved").iterdir())
    assert equal(load_peft_adapter(tmp_path / "saved", 1).tensors, learner.adapter_update(1).tensors)


def test_resume_needs_the_same_start(tiny_qwen3, make_pair, start, tmp_path):
    learner = DpoLearner(tiny_qwen3, LORA, DPO, init_adapter=start)
    learner.learn([make_pair()])
    learner.save_state(tmp_path / "state")
    wanted = learner.learn([make_pair()])
    resumed = DpoLearner(tiny_qwen3, LORA, DPO, init_adapter=start)
    resumed.load_state(tmp_path / "state")
    got = resumed.learn([make_pair()])
    del wanted["seconds"], got["seconds"]
    assert got == wanted
    assert equal(resumed.adapter_update(1).tensors, learner.adapter_update(1).tensors)
    with pytest.raises(LearnerError, match="was made with init_adapter="):
        DpoLearner(tiny_qwen3, LORA, DPO).load_state(tmp_path / "state")


def test_an_adapter_of_another_shape_is_refused(tiny_qwen3, start, tmp_path):
    for lora, words in (
        (LoraOptions(r=8, lora_alpha=16), "does not fit the lora options: '.*' is .* there and .* here"),
        (LoraOptions(r=4, lora_alpha=8, rank_pattern={"up_proj": 2}), "the scale of '.*down_proj' is 1 there and 2"),
        (LoraOptions(r=4, lora_alpha=8, target_modules=("q_proj",)), "and missing here"),
    ):
        with pytest.raises(LearnerError, match=words):
            DpoLearner(tiny_qwen3, lora, DPO, init_adapter=start)
    with pytest.raises(LearnerError, match="no PEFT adapter in"):
        DpoLearner(tiny_qwen3, LORA, DPO, init_adapter=tmp_path / "nowhere")
