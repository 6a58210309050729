"""The adapters a stage holds beside its base weights, by policy version."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cuda_ext.lora import FusedLora, LoraPart
from cuda_ext.rebuild import rebuild_weight
from ember_ray.model.lora import AdapterError, AdapterUpdate, LoraPair, check_adapter
from ember_ray.model.qwen3 import FUSED, DecoderLayer, LayerLora
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


Shape = tuple[object, ...]
"""Everything of an adapter but the values of A and B."""

SHAPES_KEPT = 2
"""Shapes of adapters whose places stay: with and without an adapter is two."""


def _shape(adapter: dict[int, LayerLora]) -> Shape:
    return tuple(
        (index, name, tuple(lora.a.shape), tuple((p.first_row, p.b.shape[1], p.scale) for p in lora.parts))
        for index, layer in sorted(adapter.items())
        for name, lora in layer.items()
    )


def _copied(lora: FusedLora) -> FusedLora:
    parts = [LoraPart(p.first_row, p.last_row, p.first_rank, p.last_rank, p.b.clone(), p.scale) for p in lora.parts]
    return FusedLora(lora.a.clone(), tuple(parts))


class MergedWeights:
    """Live weights rebuilt from golden ones at each switch: ``W = golden + s B A``, never subtracted from.

    Args:
        indices: of the layers in the model.
        layers: whose weights are live; copies of them are taken now, when no adapter is in them.
    """

    def __init__(self, indices: range, layers: Sequence[DecoderLayer]) -> None:
        self._layers = dict(zip(indices, layers, strict=True))
        self._golden = {
            index: {name: weight.clone() for name, weight in layer.weights.items()}
            for index, layer in self._layers.items()
        }
        self._changed: dict[int, set[str]] = {index: set() for index in self._layers}

    def switch(self, adapter: dict[int, LayerLora]) -> None:
        """Puts an adapter in the place of the one before; an empty one restores the base to the bit.

        Where it fails in the middle, another switch makes all weights good.
        """
        for index, layer in self._layers.items():
            after = adapter.get(index, {})
            self._changed[index] |= after.keys()
            for name in self._changed[index]:
                rebuild_weight(layer.weights[name], self._golden[index][name], after.get(name))
            self._changed[index] = set(after)


class AdapterSlots:
    """Versions a stage can serve; one is active. The base model is version 0 and always there.

    A new version is staged (checked and copied in) while the old one serves, then committed. Going back is a
    commit of a version that is still resident, and exact: its tensors were never changed.

    The active version's A and B are copied into places that stay, one set for each of the shapes in use, so that a
    CUDA graph that reads them goes on to serve the next version of that shape.

    Args:
        layers: the stage's own layers; of an update only these are kept, but all of it is checked.
        keep: how many adapters stay resident; those leave that were in use the longest ago, never the active one. A
            reference that is scored with now and then stays.
        merged: where given, the active version is merged into these weights instead of computed beside them.

    Attributes:
        version: the active one.
        active: layer index -> fused layer name -> what is computed beside the weights.
        signature: number of the places that active lies in; a graph that was captured with it serves whatever is there.
    """

    def __init__(
        self,
        config: Qwen3Config,
        layers: range,
        dtype: torch.dtype,
        device: str,
        keep: int = 8,
        merged: MergedWeights | None = None,
    ) -> None:
        self._config, self._layers, self._dtype, self._device, self._keep = config, layers, dtype, device, keep
        self._resident: dict[int, dict[int, LayerLora]] = {BASE_VERSION: {}}
        self._staged: dict[int, dict[int, LayerLora]] = {}
        self._highest = BASE_VERSION
        self._merged = merged
        self.version = BASE_VERSION
        self.active: dict[int, LayerLora] = {}
        self.signature = 0
        self._signatures_given = 0
        self._places: dict[Shape, tuple[int, dict[int, LayerLora]]] = {(): (0, {})}

    @property
    def signatures_kept(self) -> set[int]:
        """Signatures that can become active again; the places of all others are gone."""
        return {signature for signature, _ in self._places.values()}

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
        """Switches to a staged or resident version; where that fails, the one before stays active.

        Raises:
            AdapterError: the version is neither.
        """
        adapter = self._staged.get(version, self._resident.get(version))
        if adapter is None:
            known = ", ".join(str(number) for number in self.resident_versions)
            raise AdapterError(f"policy version {version} is not resident (resident: {known})")
        try:
            self._activate(adapter)
        except BaseException:
            self._activate(self._resident[self.version])
            raise
        if version in self._staged:
            self._resident[version] = self._staged.pop(version)
            self._highest = version
        self._resident[version] = self._resident.pop(version)  # behind the others: it is in use now
        self.version = version
        others = [number for number in self._resident if number not in (BASE_VERSION, version)]
        kept = self._keep - (version != BASE_VERSION)
        for number in others[: max(0, len(others) - kept)]:
            del self._resident[number]

    def discard(self, version: int) -> None:
        """Forgets a staged version; no error when there is none."""
        self._staged.pop(version, None)

    @torch.inference_mode()
    def _activate(self, adapter: dict[int, LayerLora]) -> None:
        if self._merged is not None:
            return self._merged.switch(adapter)
        shape = _shape(adapter)
        if shape not in self._places:
            places = {index: {name: _copied(lora) for name, lora in layer.items()} for index, layer in adapter.items()}
            self._signatures_given += 1
            signature = self._signatures_given
        else:
            signature, places = self._places.pop(shape)
            for index, layer in adapter.items():
                for name, lora in layer.items():
                    place = places[index][name]
                    place.a.copy_(lora.a)
                    for part, new in zip(place.parts, lora.parts, strict=True):
                        part.b.copy_(new.b)
        self._places[shape] = signature, places  # behind the others: it was in use last
        self.signature, self.active = signature, places
        for old in list(self._places)[:-SHAPES_KEPT]:
            del self._places[old]
