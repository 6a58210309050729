"""The adapters a stage holds beside its base weights, by policy version."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cuda_ext.checked_copy import checked_copy, copy_table, on_host
from cuda_ext.library import DTYPES
from cuda_ext.rebuild import rebuild_weight
from ember_ray.model.adapter_layout import (
    AdapterLayout,
    FlatAdapter,
    Gathered,
    adapter_layout,
    module_path,
    refuse_not_finite,
)
from ember_ray.model.lora import AdapterError, AdapterUpdate, check_adapter, check_scale
from ember_ray.model.qwen3 import DecoderLayer, LayerLora
from ember_ray.model.qwen3_config import Qwen3Config

BASE_VERSION = 0
"""The version of the model without an adapter."""

VERSIONS_KEPT = 8
"""Adapters that stay resident."""

SHAPES_KEPT = 2
"""Shapes of adapters whose places stay: with and without an adapter is two."""

SHAPES_KNOWN = 16
"""Shapes of adapters of which is remembered that they fit the model."""


@dataclass(frozen=True, eq=False)
class _Shape:
    """Everything of an adapter but the values of A and B; found fit for the model.

    Attributes:
        layout, scaling: of the whole adapter.
        own, own_scaling: of this stage's layers.
        first, first_piece: where those begin in the whole adapter.
        tables: bytes of an element to the table that copies this stage's pieces out of a whole flat adapter.
    """

    layout: AdapterLayout
    scaling: tuple[float, ...]
    own: AdapterLayout
    own_scaling: tuple[float, ...]
    first: int
    first_piece: int
    tables: dict[int, Tensor] = field(default_factory=dict)

    def table(self, dtype: torch.dtype, device: str) -> Tensor:
        size = dtype.itemsize
        if size not in self.tables:
            pieces = [(size * (self.first + p.first), p.first, math.prod(p.shape)) for p in self.own.pieces]
            self.tables[size] = copy_table(pieces, device)
        return self.tables[size]


@dataclass(frozen=True)
class _Held:
    """A version that a stage can switch to: its own part of the adapter; None where it has none."""

    shape: _Shape | None = None
    flat: Tensor | None = None


@dataclass(frozen=True)
class _Places:
    """Where an active adapter lies.

    Attributes:
        layers: layer index -> fused layer name -> views of flat.
    """

    signature: int
    flat: Tensor | None
    layers: dict[int, LayerLora]


class MergedWeights:
    """Live weights rebuilt from golden ones at each switch: ``W = golden + s B A``, never subtracted from.

    Args:
        indices: of the layers in the model.
        layers: whose weights are live; they become copies now, and those that were loaded the golden ones.
    """

    def __init__(self, indices: range, layers: Sequence[DecoderLayer]) -> None:
        self._layers = dict(zip(indices, layers, strict=True))
        self._golden = {index: layer.weights for index, layer in self._layers.items()}
        for layer in layers:
            layer.weights = {name: weight.clone() for name, weight in layer.weights.items()}
        self._changed: dict[int, set[str]] = {index: set() for index in self._layers}

    def switch(self, adapter: dict[int, LayerLora]) -> None:
        """Puts an adapter in the place of the one before; an empty one restores the base to the bit.

        Where it fails in the middle, another switch makes all weights good.
        """
        for index, after in adapter.items():
            self._changed[index] |= after.keys()
        places = [(index, name) for index, names in self._changed.items() for name in sorted(names)]
        for place, (index, name) in enumerate(places):
            lora = adapter.get(index, {}).get(name)
            live, golden = self._layers[index].weights[name], self._golden[index][name]
            rebuild_weight(live, golden, lora, more=place + 1 < len(places), after=place > 0)
        self._changed = {index: set(adapter.get(index, {})) for index in self._layers}


class AdapterSlots:
    """Versions a stage can serve; one is active. The base model is version 0 and always there.

    A new version is staged (checked and copied in) while the old one serves, then committed. Going back is a
    commit of a version that is still resident, and exact: its tensors were never changed. Versions are held as flat
    tensors in the order of :class:`~ember_ray.model.adapter_layout.AdapterLayout`.

    The active version's A and B are copied into places that stay, one set for each of the shapes in use, so that a
    CUDA graph that reads them goes on to serve the next version of that shape. Staging and switching work on the
    current stream; staging waits for what it has seen of the values, switching waits for nothing.

    Args:
        layers: the stage's own layers; of an update only these are kept. Names, shapes and scales of all of it are
            checked.
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
        keep: int = VERSIONS_KEPT,
        merged: MergedWeights | None = None,
    ) -> None:
        self._config, self._layers, self._dtype, self._device, self._keep = config, layers, dtype, device, keep
        self._resident: dict[int, _Held] = {BASE_VERSION: _Held()}
        self._staged: dict[int, _Held] = {}
        self._highest = BASE_VERSION
        self._merged = merged
        self._shapes: list[_Shape] = []
        self.version = BASE_VERSION
        self._signatures_given = 0
        self._active = _Places(0, None, {})
        self._places: dict[_Shape | None, _Places] = {None: self._active}

    @property
    def active(self) -> dict[int, LayerLora]:
        return {} if self._merged is not None else self._active.layers

    @property
    def signature(self) -> int:
        return 0 if self._merged is not None else self._active.signature

    @property
    def signatures_kept(self) -> set[int]:
        """Signatures that can become active again; the places of all others are gone."""
        return {places.signature for places in self._places.values()}

    @property
    def resident_versions(self) -> list[int]:
        return sorted(self._resident)

    @torch.inference_mode()
    def stage(self, update: AdapterUpdate | FlatAdapter) -> None:
        """Checks an update and holds it; the active version is untouched.

        Raises:
            AdapterError: the update is refused, or its version was used before.
        """
        if update.version <= self._highest:
            raise AdapterError(
                f"adapter version {update.version} was used before (highest so far {self._highest}); "
                "versions are never reused"
            )
        self._staged = {}
        held = self._take_flat(update) if isinstance(update, FlatAdapter) else self._take_named(update)
        self._staged = {update.version: held}

    def commit(self, version: int) -> None:
        """Switches to a staged or resident version; where that fails, the one before stays active.

        Raises:
            AdapterError: the version is neither.
        """
        held = self._staged.get(version, self._resident.get(version))
        if held is None:
            known = ", ".join(str(number) for number in self.resident_versions)
            raise AdapterError(f"policy version {version} is not resident (resident: {known})")
        try:
            self._activate(held)
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

    # -- taking over -----------------------------------------------------------------------------------------------

    def _take_named(self, update: AdapterUpdate) -> _Held:
        config = self._config
        checked = check_adapter(update, config.linear_shapes, config.num_hidden_layers, self._dtype, self._layers)
        layout, scaling, tensors = adapter_layout(checked, config.linear_shapes)
        shape = self._shape(layout, scaling)
        pieces = shape.own.pieces
        if not pieces:
            return _Held()
        own = tensors[shape.first_piece : shape.first_piece + len(pieces)]
        flat = torch.empty(shape.own.numel, dtype=self._dtype, device=self._device)
        refuse_not_finite(on_host(Gathered.of(own, shape.own, self._device).copy_to(flat)), pieces, self._dtype)
        return _Held(shape, flat)

    def _take_flat(self, update: FlatAdapter) -> _Held:
        shape, whole = self._shape(update.layout, update.scaling), update.flat
        if whole.shape != (update.layout.numel,) or whole.dtype not in DTYPES or not whole.is_contiguous():
            raise AdapterError(
                f"adapter version {update.version}: its flat tensor must be [{update.layout.numel}], contiguous, in "
                f"float32, bfloat16 or float16, not {tuple(whole.shape)} {whole.dtype}"
            )
        if update.checksums is not None and update.checksums.shape != (len(update.layout.pieces),):
            raise AdapterError(
                f"adapter version {update.version}: it has {update.checksums.numel()} checksums for "
                f"{len(update.layout.pieces)} tensors; publish it again"
            )
        pieces = shape.own.pieces
        if not pieces:
            return _Held()
        base, table = whole.to(self._device, non_blocking=True), shape.table(whole.dtype, self._device)
        flat = torch.empty(shape.own.numel, dtype=self._dtype, device=self._device)
        seen = on_host(checked_copy(flat, base, table, whole.dtype))
        refuse_not_finite(seen, pieces, self._dtype)
        if update.checksums is not None:
            if whole.dtype != self._dtype:  # what was published has other bits
                same = torch.empty(shape.own.numel, dtype=whole.dtype, device=self._device)
                seen = on_host(checked_copy(same, base, table, whole.dtype))
            published = update.checksums.numpy()[shape.first_piece : shape.first_piece + len(pieces)]
            if not np.array_equal(seen[:, 1], published):
                name = pieces[int((seen[:, 1] != published).nonzero()[0][0])].name
                raise AdapterError(
                    f"adapter version {update.version}: the checksum of '{name}' is not the published one; publish it "
                    "again"
                )
        return _Held(shape, flat)

    def _shape(self, layout: AdapterLayout, scaling: tuple[float, ...]) -> _Shape:
        """The shape with its tables, from those that are known or, found fit for the model, anew."""
        for known in self._shapes:
            if known.layout == layout and known.scaling == scaling:
                return known
        config = self._config
        ranks = {(layer, name): rank for layer, name, rank in layout.modules}
        bad = [
            module for module in layout.modules
            if module[1] not in config.linear_shapes or not 0 <= module[0] < config.num_hidden_layers or module[2] < 1
        ]  # fmt: skip
        if bad or not ranks or layout != AdapterLayout.of(ranks, config.linear_shapes):
            what = f"{bad[0]} is no (layer, projection, rank)" if bad else "its modules are not those"
            raise AdapterError(f"the adapter's layout does not fit the model: {what} of this model's linear layers")
        if len(scaling) != len(layout.modules):
            raise AdapterError(f"the adapter has {len(layout.modules)} modules, but {len(scaling)} scales")
        for (layer, name, _), scale in zip(layout.modules, scaling, strict=True):
            check_scale(module_path(layer, name), scale)
        own, first, first_piece = layout.part(self._layers)
        mine = tuple(s for module, s in zip(layout.modules, scaling, strict=True) if module[0] in self._layers)
        shape = _Shape(layout, scaling, own, mine, first, first_piece)
        self._shapes = [*self._shapes[1 - SHAPES_KNOWN :], shape]
        return shape

    # -- switching -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _activate(self, held: _Held) -> None:
        places = self._places.pop(held.shape, None) or self._new_places(held.shape)
        self._places[held.shape] = places  # behind the others: it was in use last
        if held.flat is not None:
            _copy_over(places.flat, held.flat)
        if self._merged is not None:
            self._merged.switch(places.layers)
        self._active = places
        for old in list(self._places)[:-SHAPES_KEPT]:
            del self._places[old]

    def _new_places(self, shape: _Shape | None) -> _Places:
        self._signatures_given += 1
        if shape is None:
            return _Places(self._signatures_given, None, {})
        flat = torch.empty(shape.own.numel, dtype=self._dtype, device=self._device)
        return _Places(self._signatures_given, flat, shape.own.fused(flat, shape.own_scaling))


def _copy_over(place: Tensor | None, flat: Tensor) -> None:
    assert place is not None
    place.copy_(flat)
    if flat.is_cuda:  # it may have been staged on another stream
        flat.record_stream(torch.cuda.current_stream())
