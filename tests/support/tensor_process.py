"""A process with tensors of its own, asked over a pipe; it can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TENSORS: dict[str, Any] = {}


def make(name: str, values: list[float], dtype: str, device: str) -> Any:
    """A shared tensor; gives its handle."""
    import torch

    from ember_ray.model.tensor_handles import empty_shared, export_tensor

    TENSORS[name] = empty_shared([len(values)], getattr(torch, dtype), device)
    write(name, values)
    return export_tensor(TENSORS[name])


def take(name: str, handle: Any) -> None:
    """Opens a handle."""
    from ember_ray.model.tensor_handles import open_tensor

    TENSORS[name] = open_tensor(handle)


def copy_from_peer(handle: Any, device: str) -> list[float]:
    """Copies from a GPU that this process need not see."""
    import torch

    from ember_ray.model.tensor_handles import PeerTensor

    out = torch.empty(handle.shape, dtype=handle.dtype, device=device)
    PeerTensor(handle, device).copy_to(out)
    return [float(value) for value in out.cpu()]


def read(name: str) -> list[float]:
    return [float(value) for value in TENSORS[name].cpu()]


def write(name: str, values: list[float]) -> None:
    import torch

    TENSORS[name].copy_(torch.tensor(values))
    if TENSORS[name].is_cuda:
        torch.cuda.synchronize()


def place(name: str) -> tuple[str, str]:
    """The tensor's device as this process knows it, and the GPUs that it sees."""
    return str(TENSORS[name].device), os.environ.get("CUDA_VISIBLE_DEVICES", "")


def drop(name: str) -> None:
    del TENSORS[name]


def write_adapter(folder: str, version: int, seed: int, device: str = "cpu") -> Any:
    """What a learner does to publish: its tensors take new values, and the next buffer of its outbox gets them."""
    import torch

    from ember_ray.model.adapter_outbox import AdapterOutbox
    from ember_ray.model.qwen3_config import read_model_config
    from tests.support.adapters import random_adapter

    made, config = random_adapter(Path(folder), version, seed), read_model_config(folder)
    if "outbox" not in TENSORS:
        TENSORS["adapter"] = replace(made, tensors={name: tensor.to(device) for name, tensor in made.tensors.items()})
        TENSORS["outbox"] = AdapterOutbox(
            TENSORS["adapter"], config.linear_shapes, config.num_hidden_layers, torch.float32, device
        )
    for name, tensor in TENSORS["adapter"].tensors.items():
        tensor.copy_(made.tensors[name])
    return TENSORS["outbox"].write(version)


def _serve(pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, globals()[name](*arguments)))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))


class TensorProcess:
    """Calls the functions of this module in a fresh process; use as a context manager.

    Raises:
        RuntimeError: with the type and the text of what was raised there.
    """

    def __init__(self, **environment: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, environment), daemon=True)
        self.process.start()
        theirs.close()

    def __call__(self, function: Any, *arguments: Any) -> Any:
        self._pipe.send((function.__name__, arguments))
        well, answer = self._pipe.recv()
        if not well:
            raise RuntimeError(answer)
        return answer

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()

    def __enter__(self) -> TensorProcess:
        return self

    def __exit__(self, *fault: object) -> None:
        self._pipe.close()
        self.process.join(20)
        if self.process.is_alive():
            self.kill()
