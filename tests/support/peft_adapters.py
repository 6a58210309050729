"""Random PEFT adapters in folders, the size at which they matter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def make_adapter(network: Any, folder: Path, seed: int = 0, **settings: Any) -> Any:
    """Puts a LoRA with random A and B on a copy-on-write of the network, saves it, and returns the PEFT model.

    The network itself is changed by PEFT (layers are wrapped); use a fresh one a call.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings)
    model = get_peft_model(network, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.2, generator=generator)
    model.save_pretrained(folder)
    return model.eval()
