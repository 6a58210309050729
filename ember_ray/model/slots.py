"""The adapters a stage holds beside its base weights, by policy version."""

from __future__ import annotations

import torch

from cuda_ext.lora import FusedLora, LoraPart
from ember_ray.model.lora import AdapterError, AdapterUpdate, LoraPair, check_adapter
from ember_ray.model.qwen3 import FUSED, LayerLora
from ember_ray.model.qwen3_config import Qwen3Config

BASE_VERSION = 0
"""The version of the model without an adapter."""


def fuse_lora(pairs: dict[str, LoraPair], config: Qwen3Config, dtype: torch.dtype, device: str) -> LayerLora:
    """Stacks the A of projections that share an input; copies, so that later training cannot reach in.

    Args:
        pairs: one layer's projections that have an adapter.
    """
    fused_layers: LayerLora = {}
    for fused, projections in FUSED.items():
        stacked, parts, row, rank = [], [], 0, 0
        for name in projections:
            rows = config.linear_shapes[name][0]
            if name in pairs:
                pair = pairs[name]
                stacked.append(pair.a.to(device=device, dtype=dtype, copy=True))
                b = pair.b.to(device=device, dtype=dtype, copy=True)
                parts.append(LoraPart(row, row + rows, rank, rank + b.shape[1], b, pair.scale))
                rank += b.shape[1]
            row += rows
        if stacked:
            fused_layers[fused] = FusedLora(torch.cat(stacked), tuple(parts))
    return fused_layers


class AdapterSlots:
    """Versions a stage can serve; one is active. The base model is version 0 and always there.

    A new version is staged (checked and copied in) while the old one serves, then committed. Going back is a
    commit of a version that is still resident, and exact: its tensors were never changed.

    Args:
        layers: the stage's own layers; of an update only these are kept, but all of it is checked.
        keep: how many adapters stay resident; the oldest leave, never the active one.
    """

    def __init__(self, config: Qwen3Config, layers: range, dtype: torch.dtype, device: str, keep: int = 8) -> None:
        self._config, self._layers, self._dtype, self._device, self._keep = config, layers, dtype, device, keep
        self._resident: dict[int, dict[int, LayerLora]] = {BASE_VERSION: {}}
        self._staged: dict[int, dict[int, LayerLora]] = {}
        self._highest = BASE_VERSION
        self.version = BASE_VERSION

    @property
    def active(self) -> dict[int, LayerLora]:
        """Layer index -> fused layer name -> adapter, of the active version."""
        return self._resident[self.version]

    @property
    def resident_versions(self) -> list[int]:
        return sorted(self._resident)

    def stage(self, update: AdapterUpdate) -> None:
        """Checks an update and holds it; the active version is untouched.

        Raises:
            AdapterError: the update is refused, or its version was used before.
        """
        if update.version <= self._highest:
            raise AdapterError(
                f"adapter version {update.version} was used before (highest so far {self._highest}); "
                "versions are never reused"
            )
        checked = check_adapter(update, self._config.linear_shapes, self._config.num_hidden_layers, self._dtype)
        self._staged = {
            update.version: {
                index: fuse_lora(checked[index], self._config, self._dtype, self._device)
                for index in self._layers
                if index in checked
            }
        }

    def commit(self, version: int) -> None:
        """Switches to a staged or resident version.

        Raises:
            AdapterError: the version is neither.
        """
        if version in self._staged:
            self._resident[version] = self._staged.pop(version)
            self._highest = version
        elif version not in self._resident:
            known = ", ".join(str(number) for number in self.resident_versions)
            raise AdapterError(f"policy version {version} is not resident (resident: {known})")
        self.version = version
        adapters = [number for number in self.resident_versions if number not in (BASE_VERSION, version)]
        for number in adapters[: max(0, len(adapters) + 1 - self._keep)]:
            del self._resident[number]

    def discard(self, version: int) -> None:
        """Forgets a staged version; no error when there is none."""
        self._staged.pop(version, None)
