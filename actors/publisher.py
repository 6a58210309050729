"""How a learner's adapter gets to the stages: by memory that both see, else through Ray's object store."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING, Any

import ray

from actors.adapter_wire import PackedAdapter, pack_adapter
from actors.calls import cause_of, first_line

if TYPE_CHECKING:
    from ember_ray.model.adapter_outbox import AdapterNotice, AdapterOutbox
    from ember_ray.model.lora import AdapterUpdate

logger = logging.getLogger(__name__)

REACH_LIMIT_S = 60.0
"""How long the stages may take to say whether they can read the learner's memory."""


class Publisher:
    """The learner's side of publication; lives in the learner's process.

    Args:
        model_path: folder of the base model.
        update: the learner's own tensors, which its optimizer changes in place, and their scales; its version is not
            looked at.
        device: of the tensors.
        coordinator: handle of the coordinator whose stages are to read.
    """

    def __init__(self, model_path: str, update: AdapterUpdate, device: str, coordinator: Any) -> None:
        self._model_path, self._update, self._device, self._coordinator = model_path, update, device, coordinator
        self._outbox: AdapterOutbox | None = None
        self._looked = False

    def write(self, version: int) -> AdapterNotice | PackedAdapter:
        """The adapter as it is now, as the coordinator's `publish` takes it.

        Returns:
            Where the stages can read this process's memory a notice; the tensors lie in a buffer until the next call
            but one. Else the tensors.

        Raises:
            AdapterError: a value is NaN or infinite in the dtype that the engine serves in.
        """
        from ember_ray.model.lora import AdapterUpdate

        if not self._looked:
            self._look_for_a_way()
        if self._outbox is not None:
            return self._outbox.write(version)
        return pack_adapter(AdapterUpdate(version, self._update.tensors, self._update.scaling))

    def _look_for_a_way(self) -> None:
        """Buffers where all stages can read them: on the learner's device, else in host memory, else none."""
        import torch
        from ray.exceptions import RayError

        from ember_ray.model.adapter_outbox import AdapterOutbox
        from ember_ray.model.qwen3_config import read_model_config
        from ember_ray.model.tensor_handles import HandleError

        config, ask = read_model_config(self._model_path), self._coordinator
        try:
            dtype = getattr(torch, ray.get(ask.engine_dtype.remote(), timeout=REACH_LIMIT_S))
            for device in dict.fromkeys((self._device, "cpu")):
                outbox = AdapterOutbox(self._update, config.linear_shapes, config.num_hidden_layers, dtype, device)
                obstacle = ray.get(ask.obstacle.remote(outbox.source), timeout=REACH_LIMIT_S)
                if obstacle is None:
                    self._outbox = outbox
                    break
                logger.warning("stages cannot read the learner's memory (%s): %s", device, obstacle)
            self._looked = True
        except HandleError as obstacle:
            logger.warning("adapters go through the object store: %s", obstacle)
            self._looked = True
        except RayError as error:  # the stages are down just now; the next publication looks again
            logger.warning("this adapter goes through the object store: %s", first_line(cause_of(error)))


def update_digest(update: AdapterNotice | PackedAdapter) -> str:
    """Tells one adapter from another: of a notice's checksums, or of the bits of tensors."""
    made = hashlib.sha256()
    if isinstance(update, PackedAdapter):
        for name, array in sorted(update.arrays.items()):
            made.update(name.encode())
            made.update(array.data)
    else:
        made.update(update.checksums)
    return made.hexdigest()[:16]
