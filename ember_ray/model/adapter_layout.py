"""An adapter in one flat tensor: the order of its A and B, and how named tensors get there.

Learners write their tensors into this order, so that an adapter travels as one tensor, and stages keep it so: taking it
over is one launch. Layer after layer, in each the fused linear layers in the order of ``FUSED``, in each of them all A,
one behind the other as [sum of r, in], and then every B [out, r]. The A of a fused layer and every B begin at multiples
of :data:`ALIGNMENT` elements; what lies between is not part of the adapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from cuda_ext.checked_copy import checked_copy, copy_table, on_host
from cuda_ext.library import DTYPES
from cuda_ext.lora import FusedLora, LoraPart
from ember_ray.model.lora import AdapterError, AdapterUpdate, LoraLayers
from ember_ray.model.qwen3 import FUSED, LayerLora

ALIGNMENT = 64
"""Elements; 128 bytes in 16-bit types."""

Module = tuple[int, str, int]
"""(layer, projection, rank)."""


@dataclass(frozen=True)
class Piece:
    """An A or a B: its module path with ``.lora_A.weight`` or ``.lora_B.weight``, its first element, its shape."""

    name: str
    layer: int
    first: int
    shape: tuple[int, int]


def module_path(layer: int, projection: str) -> str:
    """``model.layers.0.self_attn.q_proj``."""
    block = "mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "self_attn"
    return f"model.layers.{layer}.{block}.{projection}"


@dataclass(frozen=True)
class AdapterLayout:
    """Which linear layers are adapted at which rank; where everything lies follows from it.

    Attributes:
        modules: in the order of the flat tensor.
        shapes: projection to (out, in) of the model's linear layers, as sorted pairs.
    """

    modules: tuple[Module, ...]
    shapes: tuple[tuple[str, tuple[int, int]], ...]

    @classmethod
    def of(cls, ranks: Mapping[tuple[int, str], int], shapes: Mapping[str, tuple[int, int]]) -> AdapterLayout:
        """The layout of modules in any order.

        Args:
            ranks: (layer, projection) to rank.
            shapes: projection to (out, in).
        """
        order = {name: place for place, names in enumerate(FUSED.values()) for name in names}
        place = {name: place for names in FUSED.values() for place, name in enumerate(names)}
        keys = sorted(ranks, key=lambda key: (key[0], order[key[1]], place[key[1]]))
        return cls(tuple((*key, ranks[key]) for key in keys), tuple(sorted(shapes.items())))

    @cached_property
    def _placed(self) -> tuple[tuple[Piece, ...], int]:
        shapes, pieces, end = dict(self.shapes), [], 0
        for layer in dict.fromkeys(layer for layer, _, _ in self.modules):
            ranks = {name: rank for index, name, rank in self.modules if index == layer}
            for names in FUSED.values():
                adapted = [(module_path(layer, name), *shapes[name], ranks[name]) for name in names if name in ranks]
                end = _aligned(end)
                for path, _, columns, rank in adapted:
                    pieces.append(Piece(f"{path}.lora_A.weight", layer, end, (rank, columns)))
                    end += rank * columns
                for path, rows, _, rank in adapted:
                    end = _aligned(end)
                    pieces.append(Piece(f"{path}.lora_B.weight", layer, end, (rows, rank)))
                    end += rows * rank
        return tuple(pieces), _aligned(end)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """In the order of the flat tensor."""
        return self._placed[0]

    @property
    def numel(self) -> int:
        """Elements of the flat tensor."""
        return self._placed[1]

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """PEFT's names (without its prefix) to views of a flat tensor."""
        return {piece.name: _view(flat, piece) for piece in self.pieces}

    def part(self, layers: range) -> tuple[AdapterLayout, int, int]:
        """The layout of some layers alone, the place of their first element here, and that of their first piece."""
        modules = tuple(module for module in self.modules if module[0] in layers)
        mine = [place for place, piece in enumerate(self.pieces) if piece.layer in layers]
        begin = mine[0] if mine else 0
        return AdapterLayout(modules, self.shapes), self.pieces[begin].first if mine else 0, begin

    def fused(self, flat: Tensor, scaling: Sequence[float]) -> dict[int, LayerLora]:
        """What is computed beside the weights of each layer; its tensors are views of a flat tensor.

        Args:
            scaling: s of each module.
        """
        shapes, views, layers = dict(self.shapes), self.views(flat), {}
        scales = {module[:2]: (module[2], scale) for module, scale in zip(self.modules, scaling, strict=True)}
        for layer in dict.fromkeys(layer for layer, _, _ in self.modules):
            fused_layers: LayerLora = {}
            for fused, names in FUSED.items():
                parts, row, ranks = [], 0, 0
                for name in names:
                    rows = shapes[name][0]
                    if (layer, name) in scales:
                        rank, scale = scales[layer, name]
                        b = views[f"{module_path(layer, name)}.lora_B.weight"]
                        parts.append(LoraPart(row, row + rows, ranks, ranks + rank, b, scale))
                        ranks += rank
                    row += rows
                if parts:
                    first = next(name for name in names if (layer, name) in scales)
                    a = views[f"{module_path(layer, first)}.lora_A.weight"]
                    stacked = a.as_strided((ranks, a.shape[1]), (a.shape[1], 1))
                    fused_layers[fused] = FusedLora(stacked, tuple(parts))
            layers[layer] = fused_layers
        return layers


def _aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT


def _view(flat: Tensor, piece: Piece) -> Tensor:
    return flat[piece.first : piece.first + prod(piece.shape)].view(piece.shape)


@dataclass(frozen=True)
class FlatAdapter:
    """A policy as one tensor, from the learner to the stages; :class:`~ember_ray.model.lora.AdapterUpdate` is the other
    form of the same.

    Attributes:
        version: its number; never reused.
        flat: [layout.numel], contiguous, of any of the dtypes that engines serve in, on any device.
        scaling: s of each module of the layout.
        checksums: [pieces] int64 on the CPU, see :func:`cuda_ext.checked_copy.checked_copy`, of the bits in ``flat``;
            None leaves them unchecked.
    """

    version: int
    layout: AdapterLayout
    flat: Tensor
    scaling: tuple[float, ...]
    checksums: Tensor | None = None


class AdapterPacker:
    """Writes one learner's tensors into a flat tensor, again and again; on a GPU each time in one launch.

    Args:
        checked: the learner's tensors, which are updated in place (from ``check_adapter``).
        shapes: projection to (out, in) of the model's linear layers.
        dtype: of the flat tensor; the one that the engine serves in saves half of the bytes of float32.
    """

    def __init__(self, checked: LoraLayers, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype) -> None:
        self.layout, self.scaling, self._sources = adapter_layout(checked, shapes)
        self._dtype, tensors = dtype, self._sources
        one_gpu = tensors[0].is_cuda and len({tensor.device for tensor in tensors}) == 1
        gathered = Gathered.of(tensors, self.layout, tensors[0].device) if one_gpu else None
        self._gathered = gathered if gathered is not None and gathered.reads(tensors) else None

    @torch.no_grad()
    def pack(self, version: int, out: Tensor | None = None) -> FlatAdapter:
        """The adapter as it is now, with its checksums.

        Args:
            out: [layout.numel] to write to; a new tensor where it is None.

        Raises:
            AdapterError: a value is NaN or infinite in the flat tensor's dtype.
        """
        here = self._sources[0].device
        if out is None or out.device != here:
            flat = torch.zeros(self.layout.numel, dtype=self._dtype, device=here)
        else:
            flat = out
        gathered = self._gathered or Gathered.of(self._sources, self.layout, here)
        seen = on_host(gathered.copy_to(flat))
        refuse_not_finite(seen, self.layout.pieces, self._dtype)
        if out is not None and out is not flat:
            out.copy_(flat)  # to the host
            flat = out
        return FlatAdapter(version, self.layout, flat, self.scaling, torch.from_numpy(seen[:, 1].copy()))


@dataclass(frozen=True)
class Gathered:
    """Tensors that are about to be copied into a flat one.

    Attributes:
        base, table, dtype: as ``checked_copy`` takes them.
        sources: what must live as long as the table, which may hold their addresses.
    """

    base: Tensor | None
    table: Tensor
    dtype: torch.dtype
    sources: tuple[Tensor, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], layout: AdapterLayout, device: torch.device | str) -> Gathered:
        """Sources of all pieces of a layout, brought to a device.

        Host tensors travel in one copy: those that lie in one storage as that storage, others gathered before.
        """
        device = torch.device(device)
        tensors = [tensor.detach() for tensor in tensors]
        if len({tensor.dtype for tensor in tensors}) > 1 or tensors[0].dtype not in DTYPES:
            tensors = [tensor.float() for tensor in tensors]
        if any(tensor.is_cuda for tensor in tensors):
            tensors = [tensor.to(device) for tensor in tensors]
        tensors, dtype = [tensor.contiguous() for tensor in tensors], tensors[0].dtype
        places = [(piece.first, prod(piece.shape)) for piece in layout.pieces]
        if tensors[0].is_cuda:
            begins, base = [tensor.data_ptr() for tensor in tensors], None
        elif len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1:
            begins = [int(tensor.storage_offset()) * tensor.element_size() for tensor in tensors]
            storage = tensors[0].untyped_storage()
            base = torch.empty(0, dtype=dtype).set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))
        else:
            base, begins = torch.cat([tensor.flatten() for tensor in tensors]), [0]
            for tensor in tensors[:-1]:
                begins.append(begins[-1] + tensor.numel() * dtype.itemsize)
        if base is not None:
            base = base.to(device, non_blocking=True)
        table = copy_table([(begin, *place) for begin, place in zip(begins, places, strict=True)], device)
        return cls(base, table, dtype, tuple(tensors))

    def reads(self, tensors: Sequence[Tensor]) -> bool:
        """Whether it copies out of these very tensors, and so what they will have become, and not out of casts."""
        return all(kept.data_ptr() == tensor.data_ptr() for kept, tensor in zip(self.sources, tensors, strict=True))

    def copy_to(self, flat: Tensor) -> Tensor:
        """Copies all pieces; returns what ``checked_copy`` has seen."""
        return checked_copy(flat, self.base, self.table, self.dtype)


def adapter_layout(
    checked: LoraLayers, shapes: Mapping[str, tuple[int, int]]
) -> tuple[AdapterLayout, tuple[float, ...], list[Tensor]]:
    """The layout of a checked update, its scales, and its tensors in the order of the layout's pieces."""
    ranks = {(layer, name): pair.a.shape[0] for layer, pairs in checked.items() for name, pair in pairs.items()}
    layout = AdapterLayout.of(ranks, shapes)
    tensors = {}
    for layer, pairs in checked.items():
        for name, pair in pairs.items():
            path = module_path(layer, name)
            tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = pair.a, pair.b
    scaling = tuple(checked[layer][name].scale for layer, name, _ in layout.modules)
    return layout, scaling, [tensors[piece.name] for piece in layout.pieces]


def refuse_not_finite(seen: np.ndarray, pieces: Sequence[Piece], dtype: torch.dtype) -> None:
    """Raises AdapterError where ``checked_copy`` has seen a value that is not finite."""
    if seen[:, 0].any():
        name = pieces[int(seen[:, 0].nonzero()[0][0])].name
        raise AdapterError(f"adapter tensor '{name}' has NaN or Inf in {str(dtype).removeprefix('torch.')}")


def update_of(adapter: FlatAdapter) -> AdapterUpdate:
    """The same policy as named tensors, views of the flat one."""
    scaling = {
        module_path(layer, name): scale
        for (layer, name, _), scale in zip(adapter.layout.modules, adapter.scaling, strict=True)
    }
    return AdapterUpdate(adapter.version, adapter.layout.views(adapter.flat), scaling)
