"""The CUDA library: found, loaded and called from here.

It is a plain C library (``csrc/``), so one build serves every version of Python and torch, and it loads on a machine
without a GPU.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).with_name("libember_cuda.so")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Number formats as the kernels name them (``csrc/common.cuh``)."""


class KernelError(RuntimeError):
    """A kernel refused its arguments or could not be launched."""


@cache
def load() -> ctypes.CDLL:
    """The library; raises OSError where it was not built."""
    library = ctypes.CDLL(str(PATH))
    library.ember_error_text.restype = ctypes.c_char_p
    library.ember_cuda_error_text.restype = ctypes.c_char_p
    return library


def launch(name: str, *arguments: Tensor | int | float | torch.dtype | None) -> None:
    """Calls ``ember_<name>`` on the current stream of the current device.

    Tensors go as pointers (None as a null pointer), integers as int64_t, floats as float, dtypes as their code; the
    stream is added last. Shapes, strides and devices are the caller's to check.

    Raises:
        KernelError: the library's own words.
    """
    values: list[ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            values.append(ctypes.c_void_p(argument.data_ptr()))
        elif isinstance(argument, float):
            values.append(ctypes.c_float(argument))
        elif argument is None:
            values.append(ctypes.c_void_p(None))
        elif isinstance(argument, torch.dtype):
            values.append(ctypes.c_int64(DTYPES[argument]))
        else:
            values.append(ctypes.c_int64(argument))
    library = load()
    status = getattr(library, f"ember_{name}")(*values, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    if status:
        text = library.ember_error_text() if status < 0 else library.ember_cuda_error_text(status)
        raise KernelError(f"ember_{name}: {text.decode()}")
