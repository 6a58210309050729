"""A learner on the engine's base weights: another process owns them, this one maps them and learns."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from benchmarks.rollout_engines import random_adapter
from ember_ray.engine.llm import LLM
from ember_ray.engine.options import EngineOptions
from ember_ray.model.base_weights import export_base, open_base
from ember_ray.model.tensor_handles import HandleError
from ember_ray.train.dpo import DpoLearner, DpoOptions, LoraOptions
from ember_ray.train.errors import LearnerError
from ember_ray.train.shared_base import SharedBase
from tests.support import base_process as there
from tests.train.conftest import build_tiny_qwen3

LORA = LoraOptions(r=4, lora_alpha=8)
OPTIONS = DpoOptions(learning_rate=1e-2, beta=0.3)


def process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def adapter_of(learner: DpoLearner) -> dict[str, torch.Tensor]:
    return dict(learner.adapter_update(1).tensors)


@pytest.mark.slow
def test_learns_on_mapped_weights_as_on_its_own(tmp_path, make_pair):
    """Equal to the bit: logits, reference, losses, gradients and so the adapter; nothing is written meanwhile."""
    split = (1, 2)
    folder = build_tiny_qwen3(tmp_path / "model", num_hidden_layers=3)
    rounds = [[make_pair(f"name: {n}", f'{{"name": "{n}"}}', f"{n}, it is", n)] for n in ("Ada", "Bob")]
    with process() as owner:
        handles = owner.submit(there.load, str(folder), split, tuple(range(len(split)))).result()
        before = owner.submit(there.digest).result()
        base = open_base(handles)
        mine, own = DpoLearner(folder, LORA, OPTIONS, base=base), DpoLearner(folder, LORA, OPTIONS)
        ids = torch.arange(3, 90).view(3, 29)
        assert torch.equal(mine.model(ids).logits, own.model(ids).logits)
        assert mine._trainer.ref_model is None  # the reference is the model without its adapter
        for pairs in rounds:
            told, expected = mine.learn(pairs), own.learn(pairs)
            assert told.pop("seconds") > 0 and expected.pop("seconds") > 0
            assert told == expected
        assert told["rewards/chosen"] > 0.1  # it has left its reference
        expected = adapter_of(own)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_of(mine).items())
        theirs = {tensor.untyped_storage().data_ptr() for tensor in base.values()}
        frozen = [p for name, p in mine.model.named_parameters() if "lora_" not in name]
        assert {p.untyped_storage().data_ptr() for p in frozen} <= theirs and not any(p.requires_grad for p in frozen)
        assert owner.submit(there.digest).result() == before


@pytest.mark.slow
def test_no_second_copy_is_made_not_for_a_moment(tmp_path, make_pair):
    """The learner's process may take only two thirds of the memory of the base weights beside what it has."""
    folder = build_tiny_qwen3(tmp_path / "model", num_hidden_layers=8, hidden_size=768, spread=0.02)
    with process() as owner, process() as learner:
        handles = owner.submit(there.load, str(folder), (8,), (0,)).result()
        nbytes = sum(handle.nbytes for handle in {h.memory: h for h in handles[0].values()}.values())
        found = learner.submit(
            there.learn_with_little_memory, str(folder), handles, [make_pair()], nbytes * 2 // 3
        ).result()
    assert found["shared"] > 0.9 * nbytes and found["moved"] > 0
    assert found["refused"]  # as much as a copy was not to be had
    assert found["private"] < found["shared"] / 2  # of which the larger part are imports


def test_goes_on_where_a_new_stage_has_the_weights(tiny_qwen3, make_pair):
    """As after the loss of a stage: the first owner is killed, a second one has the same weights elsewhere."""
    with process() as first, process() as second:
        gone = first.submit(there.load, str(tiny_qwen3), (2,), (0,)).result()
        learner = DpoLearner(tiny_qwen3, LORA, OPTIONS, base=open_base(gone))
        own = DpoLearner(tiny_qwen3, LORA, OPTIONS)
        learner.learn([make_pair()])
        late = first.submit(there.load, str(tiny_qwen3), (2,), (0,)).result()
        os.kill(first.submit(there.pid).result(), signal.SIGKILL)
        fresh = second.submit(there.load, str(tiny_qwen3), (2,), (0,)).result()
        with pytest.raises(HandleError, match="ended or let it go"):
            open_base(late)
        base = open_base(fresh)
        learner.open_base(base)
        assert learner.learn([make_pair()])["loss"] == [own.learn([make_pair()])["loss"] for _ in range(2)][1]
        theirs = {tensor.untyped_storage().data_ptr() for tensor in base.values()}
        names = [name for name, _ in learner.model.named_parameters() if "lora_" not in name]
        parameters = dict(learner.model.named_parameters())
        assert {parameters[name].untyped_storage().data_ptr() for name in names} <= theirs


def test_weights_with_an_adapter_in_them_are_not_the_base(tiny_qwen3):
    llm = LLM(EngineOptions(str(tiny_qwen3), lora_mode="merged", num_kv_blocks=8, max_model_len=64))
    model = llm.engine.model
    base = open_base([export_base(model.base)])
    before = {name: tensor.clone() for name, tensor in base.items()}
    llm.publish(random_adapter(model.config, 4, 1, "cpu"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.items())
    live = model.decoder_layers[1].weights["qkv_proj"]
    assert not torch.equal(live, before["model.layers.1.self_attn.qkv_proj.weight"])


def test_weights_of_another_model_are_refused(tiny_qwen3, tmp_path):
    other = build_tiny_qwen3(tmp_path / "other", hidden_size=64)
    base = LLM(EngineOptions(str(other), num_kv_blocks=8, max_model_len=64)).engine.model.base
    with pytest.raises(LearnerError, match=r"'model.embed_tokens.weight' is torch.float32 \(259, 64\), .* \(259, 32\)"):
        SharedBase(tiny_qwen3, base, torch.float32)
    with pytest.raises(LearnerError, match=r"is torch.float32 \(259, 64\), the learner needs torch.bfloat16"):
        SharedBase(other, base, torch.bfloat16)
    del base["model.layers.1.self_attn.qkv_proj.weight"]
    with pytest.raises(LearnerError, match="'model.layers.1.self_attn.qkv_proj.weight' is missing"):
        SharedBase(other, base, torch.float32)
