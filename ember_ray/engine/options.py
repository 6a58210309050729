"""What an engine is built with."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine; every stage gets the same ones.

    Attributes:
        model: Hugging Face folder of a dense Qwen3.
        dtype: ``float32``, ``bfloat16`` or ``float16``; weights, KV and matrix products.
        device: a torch device.
        layer_split: layers a stage holds, in order; empty means one stage with all of them.
        block_size: token positions in a KV block.
        num_kv_blocks: KV blocks on each stage.
        max_num_seqs: most candidates decoding at once.
        max_num_batched_tokens: most tokens in one forward pass.
        max_model_len: longest prompt plus answer in tokens; None takes the model's own limit.
        prefix_sharing: False computes every candidate's prompt on its own (for comparison).
        micro_batches: batches in flight; None takes the number of stages.
        seed: where requests without a seed get theirs from.
    """

    model: str
    dtype: str = "float32"
    device: str = "cpu"
    layer_split: tuple[int, ...] = ()
    block_size: int = 16
    num_kv_blocks: int = 2048
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    prefix_sharing: bool = True
    micro_batches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("block_size", "num_kv_blocks", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"engine: {name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"engine: dtype must be float32, bfloat16 or float16, not {self.dtype!r}")
        if self.micro_batches is not None and self.micro_batches < 1:
            raise ValueError(f"engine: micro_batches must be at least 1, not {self.micro_batches}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"engine: max_num_batched_tokens {self.max_num_batched_tokens} must be at least "
                f"max_num_seqs {self.max_num_seqs}, a decode step has one token a candidate"
            )
