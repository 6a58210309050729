"""The CUDA library: found, loaded and called from here.

It is a plain C library (``csrc/``), so one build serves every version of Python and torch, and it loads on a machine
without a GPU.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PATH = Path(__file__).with_name("libember_cuda.so")

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Number formats as the kernels name them (``csrc/common.cuh``)."""

Argument = Tensor | ctypes.Array[Any] | int | float | torch.dtype | None
"""What can be handed to a kernel."""


class KernelError(RuntimeError):
    """A kernel refused its arguments or could not be launched.

    Attributes:
        status: a cudaError_t, or -1 where the library itself refused.
    """

    def __init__(self, text: str, status: int = -1) -> None:
        super().__init__(text)
        self.status = status


@cache
def load() -> ctypes.CDLL:
    """The library; raises OSError where it was not built."""
    library = ctypes.CDLL(str(PATH))
    library.ember_error_text.restype = ctypes.c_char_p
    library.ember_cuda_error_text.restype = ctypes.c_char_p
    library.ember_built_for.restype = ctypes.c_char_p
    return library


def launch(name: str, *arguments: Argument) -> None:
    """Calls ``ember_<name>`` on the current stream of the current device.

    Tensors go as pointers (None as a null pointer), integers as int64_t, floats as float, dtypes as their code, C
    arrays as pointers to host memory that is read before this returns; the stream is added last. A name takes the
    same kinds of arguments at every call. Shapes, strides and devices are the caller's to check.

    Raises:
        KernelError: the library's own words.
    """
    function = _functions.get(name) or _bind(name, arguments)
    status = function(*map(_c_value, arguments), torch.cuda.current_stream().cuda_stream)
    if status:
        library = load()
        text = library.ember_error_text() if status < 0 else library.ember_cuda_error_text(status)
        raise KernelError(f"ember_{name}: {text.decode()}", status)


_functions: dict[str, Any] = {}


def _c_value(argument: Argument) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, torch.dtype):
        if argument not in DTYPES:
            raise KernelError(f"no kernel computes in {argument}; there are {', '.join(map(str, DTYPES))}")
        return DTYPES[argument]
    return argument


def _bind(name: str, arguments: tuple[Argument, ...]) -> Any:
    """The C function with its types set, so that a call converts plain Python values."""
    function = getattr(load(), f"ember_{name}", None)
    if function is None:
        raise KernelError(f"'{PATH}' is older than this code and has no ember_{name}: run python tools/build_cuda.py")
    function.argtypes = [*map(_c_type, arguments), ctypes.c_void_p]
    _functions[name] = function
    return function


def _c_type(argument: Argument) -> type[ctypes.c_void_p] | type[ctypes.c_int64] | type[ctypes.c_float]:
    if isinstance(argument, float):
        return ctypes.c_float
    return ctypes.c_int64 if isinstance(argument, int | torch.dtype) else ctypes.c_void_p
