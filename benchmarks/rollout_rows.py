"""The rows of the rollout benchmark: what is done, what it must cost by arithmetic, and the floor of the hardware."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ember_ray.model.qwen3_config import Qwen3Config

TERA = 1e12


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: how ``--rows`` calls it.
        prompts, n: prompts of a batch, candidates of each.
        prompt, gen: tokens of a prompt, tokens to generate per candidate.
        common_prefix: first tokens that all prompts of a batch share.
        lora_rank, lora_mode: a random adapter on all linear layers; 0 and None for none.
        top_k, top_p: filters of sampling.
        target_seconds: what the project wants of one H200; None where it wants nothing.
        engines: who can do it.
        attention_only: only the group decode attention of one layer, every suffix of ``gen`` tokens.
    """

    name: str
    prompts: int
    n: int
    prompt: int
    gen: int
    common_prefix: int = 0
    lora_rank: int = 0
    lora_mode: str | None = None
    top_k: int = 0
    top_p: float = 1.0
    target_seconds: float | None = None
    engines: tuple[str, ...] = ("ember", "vllm")
    attention_only: bool = False

    def shrunk(self) -> Row:
        """The row at a size for a CPU: it does all that the large one does."""
        return replace(
            self,
            prompts=min(self.prompts, 3),
            n=min(self.n, 4),
            prompt=self.prompt // 32,
            gen=-(-self.gen // 16),
            common_prefix=self.common_prefix // 32,
            lora_rank=min(self.lora_rank, 4),
            target_seconds=None,
        )

    @property
    def candidates(self) -> int:
        return self.prompts * self.n


ALL = ("ember", "transformers", "vllm")
MIXED = Row("100x8_2048_128", 100, 8, 2048, 128, target_seconds=5.5)

ROWS = (
    Row("1x1_2048_128", 1, 1, 2048, 128, target_seconds=0.36, engines=ALL),
    Row("1x8_2048_128", 1, 8, 2048, 128, target_seconds=0.42, engines=ALL),
    Row("8x8_2048_128", 8, 8, 2048, 128, engines=ALL),
    Row("100x8_512_256", 100, 8, 512, 256, target_seconds=5.5),
    MIXED,
    Row("100x8_4096_64", 100, 8, 4096, 64, target_seconds=7.5),
    Row("100x16_2048_128", 100, 16, 2048, 128, target_seconds=7.5),
    Row("prefill_100x2048", 100, 1, 2048, 1, target_seconds=2.7),
    replace(MIXED, name="100x8_2048_128_topk50_topp95", top_k=50, top_p=0.95, target_seconds=1.03 * 5.5),
    replace(MIXED, name="100x8_2048_128_common1024", common_prefix=1024, target_seconds=4.3),
    replace(MIXED, name="100x8_2048_128_merged", lora_rank=16, lora_mode="merged", target_seconds=5.6),
    replace(MIXED, name="100x8_2048_128_slots", lora_rank=16, lora_mode="slots", target_seconds=6.2),
    replace(MIXED, name="100x8_2048_128_slots_r64", lora_rank=64, lora_mode="slots", target_seconds=1.12 * 5.5),
    Row("group_attention_100x8_2048_64", 100, 8, 2048, 64, target_seconds=0.28e-3, attention_only=True,
        engines=("ember", "flash_attn_two_part", "flash_attn_unshared")),
)  # fmt: skip
"""In the order of the table; rows with the same adapter mode stand together, so that they share an engine."""


def expected_tokens(row: Row, block_size: int) -> tuple[int, int]:
    """(prefill_tokens, prefix_hit_tokens) of an engine that reads each prompt once, and a common prefix once.

    A prefix is shared in whole KV blocks. Hits are counted per candidate: all of its prompt for those after the
    first of a group, the common blocks for the first candidate of the prompts after the first.
    """
    common = row.common_prefix // block_size * block_size
    later = (row.prompts - 1) * common
    return row.prompts * row.prompt - later, row.prompts * (row.n - 1) * row.prompt + later


@dataclass(frozen=True)
class Hardware:
    """What the device can do, as measured on it.

    Attributes:
        copy_tb_s: bandwidth of a large copy on the device, 10^12 bytes a second, read plus written.
        gemm_tflop_s: rate of large bf16 matrix products, 10^12 operations a second.
    """

    copy_tb_s: float = 4.3
    gemm_tflop_s: float = 660.0

    def seconds(self, bytes_moved: float, flops: float) -> float:
        """The longer of the two times: neither can be had for less, and at best they overlap."""
        return max(bytes_moved / (self.copy_tb_s * TERA), flops / (self.gemm_tflop_s * TERA))


@dataclass(frozen=True)
class Work:
    """The least a row must do: matrix operations, bytes that decoding must move, and the time that both take."""

    flops: float
    decode_bytes: float
    prefill_seconds: float
    decode_seconds: float

    @property
    def seconds(self) -> float:
        return self.prefill_seconds + self.decode_seconds


def least_work(row: Row, config: Qwen3Config, hardware: Hardware, element: int = 2) -> Work:
    """Counts a row's work and its floor.

    Linear layers take 2 operations a weight and token, and their weights are read once a pass; prefill is taken as one
    pass, decoding as gen - 1 passes over all candidates. Causal attention over T positions takes 2 T^2 operations a
    head dimension and query head; in decoding, 4 a context position, and K and V of every group's prompt are read
    once a step (a prefix common to all prompts once altogether), of every candidate's own tokens once. The LM head
    runs for one row a prompt after prefill. Matrix products and attention do not overlap; inside each, bytes and
    operations do. Logits, activations and the writing of K and V are left out: a perfect engine could keep them on
    the chip, or they are too small to see.

    Args:
        element: bytes of a weight and of a KV entry.
    """
    layers, heads, dim = config.num_hidden_layers, config.num_attention_heads, config.head_dim
    rank = row.lora_rank if row.lora_mode == "slots" else 0
    linear = layers * sum(out * into + rank * (out + into) for out, into in config.linear_shapes.values())
    head = config.vocab_size * config.hidden_size
    kv = layers * 2 * config.num_key_value_heads * dim * element
    common = row.common_prefix
    if row.attention_only:
        read = (row.prompts * row.prompt + row.candidates * row.gen) * kv / layers
        flops = 4.0 * heads * dim * row.candidates * (row.prompt + row.gen)
        return Work(flops, read, 0.0, hardware.seconds(read, flops))

    new_tokens = row.prompts * row.prompt - (row.prompts - 1) * common
    prefill_linear = 2.0 * linear * new_tokens
    squares = row.prompts * (row.prompt**2 - common**2) + common**2
    prefill_attention = 2.0 * layers * heads * dim * squares
    first_head = 2.0 * head * row.prompts
    prefill = (
        hardware.seconds(linear * element, prefill_linear)
        + hardware.seconds(new_tokens * kv, prefill_attention)
        + hardware.seconds(head * element, first_head)
    )

    steps = row.gen - 1
    own_tokens = row.candidates * steps * (steps + 1) // 2  # a candidate's step i attends to i tokens of its own
    prompt_tokens = steps * (common + row.prompts * (row.prompt - common))
    attended = own_tokens + steps * row.candidates * row.prompt
    attention_bytes, attention_flops = (own_tokens + prompt_tokens) * kv, 4.0 * layers * heads * dim * attended
    weights, per_step = (linear + head) * element, 2.0 * row.candidates
    decode = (
        steps * (hardware.seconds(linear * element, per_step * linear)
                 + hardware.seconds(head * element, per_step * head))
        + hardware.seconds(attention_bytes, attention_flops)
    )  # fmt: skip
    flops = prefill_linear + prefill_attention + first_head + steps * per_step * (linear + head) + attention_flops
    return Work(flops, steps * weights + attention_bytes, prefill, decode)
