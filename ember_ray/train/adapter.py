"""The adapter inside a learner: made as the options say, read from a PEFT folder and written to one."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ember_ray.train.errors import LearnerError
from ember_ray.train.options import LoraOptions


def peft_config(lora: LoraOptions) -> Any:
    """The options as a ``peft.LoraConfig``."""
    from peft import LoraConfig

    layers = lora.layers_to_transform
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=list(lora.target_modules),
        use_rslora=lora.use_rslora,
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        layers_to_transform=None if layers is None else list(layers),
        lora_dropout=lora.lora_dropout,
    )


def with_adapter(model: Any, config: Any, folder: str | Path) -> Any:
    """The model wrapped by PEFT, with the adapter of a folder in it.

    Args:
        config: the ``peft.LoraConfig`` that says which shape the adapter must have.

    Raises:
        LearnerError: there is no LoRA adapter in the folder, or it has another shape or another scale.
    """
    import torch
    from peft import get_peft_model

    from ember_ray.model.lora import AdapterError, load_peft_adapter

    try:
        found = load_peft_adapter(folder, 0)
    except AdapterError as fault:
        raise LearnerError(str(fault)) from fault
    wrapped = get_peft_model(model, config)
    mine = adapter_tensors(wrapped)
    for name in sorted(mine.keys() | found.tensors.keys()):
        want, have = (tuple(side[name].shape) if name in side else None for side in (mine, found.tensors))
        if want != have:
            raise LearnerError(
                f"adapter '{folder}' does not fit the lora options: '{name}' is {have or 'missing'} there and "
                f"{want or 'missing'} here; give the options that the adapter was made with"
            )
    for path, scale in adapter_scaling(wrapped).items():
        if abs(scale - found.scaling[path]) > 1e-6 * abs(scale):
            raise LearnerError(
                f"adapter '{folder}' does not fit the lora options: the scale of '{path}' is "
                f"{found.scaling[path]:g} there and {scale:g} here; give lora_alpha as the adapter was made with"
            )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(found.tensors[name])
    return wrapped


def check_patterns(lora: LoraOptions, adapted: Iterable[str]) -> None:
    """PEFT passes over a pattern that fits no module; here that is a spelling mistake.

    Args:
        adapted: paths of the adapted modules.

    Raises:
        LearnerError: see above.
    """
    paths = list(adapted)
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, name):
            if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in paths):
                raise LearnerError(
                    f"lora.{name} has '{pattern}', which fits no adapted module; they are named like '{paths[0]}', and "
                    "the end of the name is enough"
                )


def adapter_tensors(model: Any) -> dict[str, Any]:
    """The learning adapter's own tensors (not copies) by PEFT's names."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def adapter_scaling(model: Any) -> dict[str, float]:
    """PEFT's scale of each adapted module, by its path without PEFT's prefix."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): float(module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def save_peft_folder(model: Any, folder: Path) -> None:
    """Writes the learning adapter as a PEFT folder, whole or not at all.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        # a reference adapter that TRL keeps beside it stays out
        model.save_pretrained(str(fresh), save_embedding_layers=False, selected_adapters=["default"])
        fresh.chmod(0o755)  # mkdtemp's is for the owner alone
        _swap_folder(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def weights_digest(folder: str | Path) -> str | None:
    """Tells one adapter from another; None where there is none, which is told when it is read."""
    weights = Path(folder) / "adapter_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None


def _swap_folder(fresh: Path, folder: Path) -> None:
    """Puts a finished folder in place. A folder cannot replace a full one in one call, so the old one steps aside."""
    if folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, aside / folder.name)
        os.replace(fresh, folder)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(fresh, folder)
