"""What an engine is built with."""

from __future__ import annotations

from dataclasses import dataclass

CPU_KV_BLOCKS = 2048
"""KV blocks of a stage on a CPU where the options name no number."""

_CHOICES = {
    "dtype": ("float32", "bfloat16", "float16"),
    "load_format": ("auto", "dummy"),
    "lora_mode": ("slots", "merged", "auto"),
}


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine; every stage gets the same ones.

    Attributes:
        model: Hugging Face folder of a dense Qwen3.
        dtype: ``float32``, ``bfloat16`` or ``float16``; weights, KV and matrix products.
        device: a torch device.
        layer_split: layers a stage holds, in order; empty means one stage with all of them.
        block_size: token positions in a KV block.
        num_kv_blocks: KV blocks on each stage; None takes as many as fit on a GPU, and 2048 on a CPU.
        gpu_memory_utilization: share of a GPU's memory that the stage may fill with weights, activations and KV blocks;
            of a GPU that several processes use, each stage's own share. What is free bounds it too.
        max_num_seqs: most candidates decoding at once.
        max_num_batched_tokens: most tokens in one forward pass.
        max_model_len: longest prompt plus answer in tokens; None takes the model's own limit.
        prefix_sharing: False computes every candidate's prompt on its own (for comparison).
        micro_batches: batches in flight; None takes the number of stages.
        seed: where requests without a seed get theirs from.
        load_format: "auto" reads the model folder's weights, "dummy" makes random ones (for benchmarks).
        lora_mode: "slots" computes adapters beside the base weights, "merged" rebuilds the weights at each switch from
            a second copy of the base; "auto" merges on a GPU where that copy leaves half of the free memory.
        enforce_eager: run decode steps on a GPU one kernel at a time instead of as captured CUDA graphs.
        num_scheduler_steps: decode steps planned at once on a GPU. Results are looked at one plan late, so a candidate
            runs on for fewer than twice as many steps behind its end; they are not returned.
        prefill_attention: implementation of attention over prompts on a GPU, see cuda_ext.prefill_attention.
    """

    model: str
    dtype: str = "float32"
    device: str = "cpu"
    layer_split: tuple[int, ...] = ()
    block_size: int = 16
    num_kv_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    prefix_sharing: bool = True
    micro_batches: int | None = None
    seed: int = 0
    load_format: str = "auto"
    lora_mode: str = "slots"
    enforce_eager: bool = False
    num_scheduler_steps: int = 4
    prefill_attention: str = "auto"

    def __post_init__(self) -> None:
        numbers = ("block_size", "num_kv_blocks", "max_num_seqs", "max_num_batched_tokens", "num_scheduler_steps")
        for name in (*numbers, "max_model_len", "micro_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"engine: {name} must be at least 1, not {value}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                known = f"{', '.join(choices[:-1])} or {choices[-1]}"
                raise ValueError(f"engine: {name} must be {known}, not {getattr(self, name)!r}")
        if not 0.0 < self.gpu_memory_utilization <= 1.0:
            raise ValueError(
                f"engine: gpu_memory_utilization must be above 0 and at most 1, not {self.gpu_memory_utilization}"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"engine: max_num_batched_tokens {self.max_num_batched_tokens} must be at least "
                f"max_num_seqs {self.max_num_seqs}, a decode step has one token a candidate"
            )
