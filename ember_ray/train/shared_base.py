"""The learner's transformers model on base weights that are there already: the engine's own, mapped into this process.

No second copy of them is ever made: the model is built without memory (on torch's ``meta`` device), and each parameter
becomes a view of a base weight. Importing this module imports torch and transformers (seconds): do so late.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ember_ray.model.qwen3 import FUSED
from ember_ray.model.qwen3_config import read_model_config
from ember_ray.train.errors import LearnerError


@dataclass(frozen=True)
class _View:
    """A parameter, and which rows of which base weight it is (None: all of it)."""

    module: nn.Module
    name: str
    source: str
    rows: slice | None

    def of(self, base: Mapping[str, Tensor]) -> Tensor:
        wanted, tensor = getattr(self.module, self.name), base.get(self.source)
        if tensor is not None and self.rows is not None:
            tensor = tensor[self.rows]
        if tensor is None or tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            have = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise LearnerError(
                f"the engine's base weight '{self.source}' is {have}, the learner needs {wanted.dtype} "
                f"{tuple(wanted.shape)}; is it of another model?"
            )
        return tensor


class SharedBase:
    """A frozen ``Qwen3ForCausalLM`` on given tensors, which it never writes.

    Args:
        folder: Hugging Face folder of the model; its weights are not read.
        base: all weights, by the names of ``StageModel.base``. Layers that lie on two GPUs make a model that is cut
            between the same layers: hidden states go from one GPU to the other, see also `gather`.
        dtype: that the weights must have.

    Raises:
        LearnerError: a weight is missing or has another shape or dtype.

    Attributes:
        model: for PEFT to wrap.
    """

    def __init__(self, folder: str | Path, base: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        # of an embedding that is the LM head too, the last one of several stages has a copy of its own
        config.tie_word_embeddings = "lm_head.weight" not in base
        with torch.device("meta"):
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if (Path(folder) / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        self._views = list(_views(self.model, folder))
        self.open(base)
        rotary = self.model.model.rotary_emb  # its table is computed, and the only thing beside weights
        self.model.model.rotary_emb = type(rotary)(config=config).to(self.model.model.embed_tokens.weight.device)
        _cut(self.model)
        self.model.eval()

    def gather(self, wrapped: Any) -> None:
        """Lets what a model cut in two computes come back to where its input was.

        Args:
            wrapped: the model in PEFT's, which trainers call; they may have replaced this one's own ``forward``.
        """
        if not hasattr(self.model, "hf_device_map"):
            return
        from accelerate.utils import send_to_device

        first = self.model.model.embed_tokens.weight.device
        wrapped.register_forward_hook(lambda module, given, output: send_to_device(output, first))

    def open(self, base: Mapping[str, Tensor]) -> None:
        """Puts other tensors with the same values in the place of those before, which are let go.

        Raises:
            LearnerError: see the class; nothing is changed then.
        """
        found = [view.of(base) for view in self._views]
        for view, tensor in zip(self._views, found, strict=True):
            setattr(view.module, view.name, nn.Parameter(tensor, requires_grad=False))
        if self.model.config.tie_word_embeddings:
            self.model.lm_head.weight = self.model.model.embed_tokens.weight


def _views(model: nn.Module, folder: str | Path) -> Iterator[_View]:
    shapes = read_model_config(folder).linear_shapes
    rows: dict[str, tuple[str, slice]] = {}
    for fused, names in FUSED.items():
        first = 0
        for name in names:
            rows[name] = fused, slice(first, first + shapes[name][0])
            first += shapes[name][0]
    for path, _ in model.named_parameters():  # a tied one comes once
        parent, _, name = path.rpartition(".")
        block, _, leaf = parent.rpartition(".")
        fused, part = rows.get(leaf, (leaf, None))
        yield _View(model.get_submodule(parent), name, f"{block}.{fused}.{name}" if block else path, part)


def _cut(model: Any) -> None:
    """Where layers lie on several GPUs: each gets its input where it is, and the Trainer is told to move nothing."""
    inner = model.model
    parts = {"model.embed_tokens": inner.embed_tokens}
    parts |= {f"model.layers.{index}": layer for index, layer in enumerate(inner.layers)}
    parts |= {"model.norm": inner.norm, "lm_head": model.lm_head}
    devices = {name: next(part.parameters()).device for name, part in parts.items()}
    if len(set(devices.values())) == 1:
        return
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model.hf_device_map = devices
    for name, part in parts.items():
        add_hook_to_module(part, AlignDevicesHook(execution_device=devices[name]))
