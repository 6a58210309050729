"""An adapter goes from a learner's tensors to a stage's slots by way of shared buffers."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ember_ray.model.adapter_layout import update_of
from ember_ray.model.adapter_outbox import AdapterInbox, AdapterNotice, AdapterOutbox
from ember_ray.model.lora import AdapterError, AdapterUpdate
from ember_ray.model.qwen3_config import Qwen3Config, read_model_config
from ember_ray.model.slots import AdapterSlots
from tests.support.adapters import random_adapter
from tests.support.qwen3 import make_qwen3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_qwen3(path)
    return path


@pytest.fixture(scope="module")
def config(folder: Path) -> Qwen3Config:
    return read_model_config(folder)


@pytest.fixture
def learner(folder: Path) -> AdapterUpdate:
    return random_adapter(folder)


def outbox_of(config, update, dtype=torch.float32) -> AdapterOutbox:
    return AdapterOutbox(update, config.linear_shapes, config.num_hidden_layers, dtype, "cpu")


def sent(notice: AdapterNotice) -> AdapterNotice:
    return pickle.loads(pickle.dumps(notice))


def test_stages_read_what_the_learner_wrote(config, learner) -> None:
    outbox, inbox = outbox_of(config, learner), AdapterInbox("cpu")
    assert inbox.obstacle(outbox.source) is None
    for version in (1, 2, 3):
        for tensor in learner.tensors.values():
            tensor.add_(1.0)
        notice = outbox.write(version)
        assert len(pickle.dumps(notice)) < 20_000
        found = update_of(inbox.read(sent(notice)))
        assert found.version == version
        for name, tensor in learner.tensors.items():
            assert torch.equal(found.tensors[name.removeprefix("base_model.model.")], tensor)
        assert found.scaling == pytest.approx(dict(learner.scaling))


def test_the_version_before_stays_while_the_next_is_written(config, learner) -> None:
    outbox, inbox = outbox_of(config, learner), AdapterInbox("cpu")
    slots = AdapterSlots(config, range(config.num_hidden_layers), torch.float32, "cpu")
    first = outbox.write(1)
    for tensor in learner.tensors.values():
        tensor.mul_(2.0)
    second = outbox.write(2)
    slots.stage(inbox.read(first))
    slots.commit(1)
    for tensor in learner.tensors.values():
        tensor.mul_(2.0)
    third = outbox.write(3)  # in the buffer of the first
    with pytest.raises(AdapterError, match="checksum of 'model.layers.0.self_attn.q_proj.lora_A.weight'"):
        slots.stage(replace(inbox.read(first), version=4))
    assert slots.version == 1
    slots.stage(inbox.read(second))
    slots.commit(2)
    slots.stage(inbox.read(third))
    slots.commit(3)


def test_a_single_changed_value_is_noticed(config, learner) -> None:
    outbox, inbox = outbox_of(config, learner), AdapterInbox("cpu")
    slots = AdapterSlots(config, range(config.num_hidden_layers), torch.float32, "cpu")
    notice = outbox.write(1)
    adapter = inbox.read(notice)
    piece = adapter.layout.pieces[5]
    adapter.flat[piece.first] += 1e-3
    with pytest.raises(AdapterError, match=f"checksum of '{piece.name}' is not the published one"):
        slots.stage(inbox.read(notice))


def test_what_is_not_finite_is_not_written(config, learner) -> None:
    outbox = outbox_of(config, learner, torch.float16)
    outbox.write(1)
    name, tensor = next(iter(learner.tensors.items()))
    tensor[0, 0] = 1e6  # infinite in float16
    with pytest.raises(AdapterError, match=f"'{name.removeprefix('base_model.model.')}' has NaN or Inf in float16"):
        outbox.write(2)
    tensor[0, 0] = 1.0
    assert outbox.write(3).version == 3
