"""A safetensors file read whole, in one piece of memory, so that its tensors can travel to a GPU in one copy.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, the header with dtype,
shape and data_offsets of every tensor, then the values.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
READERS, _LEAST_PART = 8, 4 * 2**20
"""Threads that read a file, and bytes that one of them is worth."""

_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""


def read_float_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a file of float tensors, as views of one storage; it is pinned where this process uses a GPU.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no safetensors file, or holds something else than floats.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2) - 8
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size, _LONGEST_HEADER):
            raise ValueError(f"'{path}' is no safetensors file: its header would have {length} bytes")
        header = json.loads(file.read(length))
        values = torch.empty(size - length, dtype=torch.uint8, pin_memory=torch.cuda.is_initialized())
    if _read_into(path, 8 + length, values.numpy().data) != len(values):
        raise ValueError(f"'{path}' became shorter while it was read")
    if not isinstance(header, dict):
        raise ValueError(f"'{path}' is no safetensors file: its header is no object")
    return {name: _view(values, name, entry) for name, entry in header.items() if name != "__metadata__"}


def _read_into(path: str | Path, begin: int, values: memoryview) -> int:
    """Reads by several threads, since what the page cache holds is a copy by the host; returns how many bytes came."""
    part = max(_LEAST_PART, -(-len(values) // READERS))

    def read(first: int) -> int:
        with open(path, "rb") as file:
            file.seek(begin + first)
            return file.readinto(values[first : first + part])

    with ThreadPoolExecutor(READERS) as pool:
        return sum(pool.map(read, range(0, len(values), part)))


def _view(values: Tensor, name: str, entry: dict) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if dtype not in _DTYPES:
            raise ValueError(f"its dtype is {dtype}, only floats ({', '.join(_DTYPES)}) are read")
        if not 0 <= begin <= end <= len(values) or end - begin != prod(shape) * _DTYPES[dtype].itemsize:
            raise ValueError(f"bytes {begin} to {end} of {len(values)} do not hold {dtype} {shape}")
        if begin % _DTYPES[dtype].itemsize:  # legal, but no tensor can begin there
            return values[begin:end].clone().view(_DTYPES[dtype]).view(shape)
        return values[begin:end].view(_DTYPES[dtype]).view(shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as fault:
        raise ValueError(f"tensor '{name}': {fault}") from fault
