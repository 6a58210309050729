"""Groups of settings that every recipe has: model, cluster, engine, rollout, adapter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ember_ray.engine.options import CPU_KV_BLOCKS

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PositiveInt = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A group of settings. Unknown keys are refused, values are not coerced (``"3"`` is not a number)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class ModelSection(Section):
    """``model.*``"""

    path: str | None = Field(None, description="Hugging Face folder of a dense Qwen3; null = the shipped tiny model.")
    adapter: str | None = Field(
        None,
        description="PEFT adapter folder to start from, e.g. RUN/adapter; its shape must be that of lora.*.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Number format of the engine's weights and KV cache."
    )
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where the stages and the learner compute.")


class RaySection(Section):
    """``ray.*``"""

    address: str | None = Field(
        None, description="Cluster to attach to (host:port or auto); null starts a local Ray that ends with the run."
    )
    num_cpus: PositiveInt | None = Field(None, description="CPUs that a local Ray offers; null = all of the machine.")
    dashboard: bool = Field(True, description="Start Ray's dashboard with a local Ray.")
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="How the stages are spread over the nodes (Ray placement group strategy)."
    )
    stage_timeout_s: float = Field(
        120.0, gt=0, description="Seconds after which a silent stage counts as dead and is started again."
    )


class EngineSection(Section):
    """``engine.*``"""

    stages: PositiveInt | Annotated[list[PositiveInt], Field(min_length=1)] = Field(
        1, description="Pipeline stages: a number (split evenly by cost) or the layers of each, e.g. [9, 27]."
    )
    block_size: PositiveInt = Field(16, description="Tokens in one KV block.")
    num_kv_blocks: PositiveInt | None = Field(
        None,
        description="KV blocks of each stage; when they run out, work is preempted. "
        f"null = {CPU_KV_BLOCKS} on a CPU, and on a GPU as many as fit.",
    )
    gpu_memory_utilization: float = Field(
        0.6,
        gt=0,
        le=1,
        description="Share of a GPU's memory that a stage may fill with weights, activations and KV blocks; "
        "the learner needs the rest of one GPU.",
    )
    max_num_seqs: PositiveInt = Field(128, description="Most candidates that generate at the same time.")
    max_num_batched_tokens: PositiveInt = Field(2048, description="Most tokens in one forward, prefill included.")
    max_model_len: PositiveInt | None = Field(
        None, description="Longest prompt plus answer, in tokens; null = what the model allows."
    )
    prefix_sharing: bool = Field(True, description="Read a prefix common to several candidates once.")
    micro_batches: PositiveInt | None = Field(
        None, description="Batches in flight through the pipeline; null = as many as there are stages."
    )
    lora_mode: Literal["slots", "merged", "auto"] = Field(
        "slots",
        description="Adapters beside the base weights, or merged into a second copy of them; "
        "auto = merged on a GPU where that copy leaves half of the free memory.",
    )
    enforce_eager: bool = Field(False, description="Decode on a GPU without captured CUDA graphs (for debugging).")
    num_scheduler_steps: PositiveInt = Field(
        4, description="Decode steps planned at once on a GPU; results are looked at one plan late."
    )
    prefill_attention: Literal["auto", "kernel", "cudnn", "torch_flash", "sdpa", "flash_attn"] = Field(
        "auto", description="Attention over prompts on a GPU; auto takes the fastest that is there."
    )

    @model_validator(mode="after")
    def _fits(self) -> EngineSection:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"engine.max_num_batched_tokens={self.max_num_batched_tokens} is less than "
                f"engine.max_num_seqs={self.max_num_seqs}, but a decode step has one token a candidate; raise it"
            )
        if (
            self.max_model_len is not None
            and self.num_kv_blocks is not None
            and self.max_model_len > self.num_kv_blocks * self.block_size
        ):
            raise ValueError(
                f"engine.num_kv_blocks={self.num_kv_blocks} x engine.block_size={self.block_size} holds "
                f"{self.num_kv_blocks * self.block_size} tokens, less than one sequence of "
                f"engine.max_model_len={self.max_model_len}; raise num_kv_blocks"
            )
        return self


class SamplingSection(Section):
    """``rollout.*``, whatever candidates are drawn for."""

    temperature: float = Field(1.0, gt=0, description="Sampling temperature of rollouts and of sampled evaluation.")
    top_k: int = Field(0, ge=0, description="Draw from the k most likely tokens only; 0 = off.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the smallest set of tokens with this mass; 1 = off.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Leave out tokens less than min_p times as likely as the likeliest; 0 = off."
    )
    max_tokens: PositiveInt = Field(96, description="Most tokens of one candidate.")
    verifier_workers: PositiveInt = Field(1, description="Verifier actors that judge while others still generate.")


class RolloutSection(SamplingSection):
    """``rollout.*``"""

    prompts_per_round: PositiveInt = Field(64, description="Training prompts of one round.")
    num_candidates: PositiveInt = Field(8, description="Candidates of each prompt.")
    token_budget: PositiveInt | None = Field(
        None,
        description="Generated tokens after which no further round begins; the last one is cut to fit. null = none.",
    )
    publish: bool = Field(
        True, description="Publish each new adapter to the engine; false is the control experiment (no policy update)."
    )


class LoraSection(Section):
    """``lora.*``"""

    r: PositiveInt = Field(16, description="Rank of the adapter.")
    lora_alpha: float = Field(32.0, gt=0, description="Scale of the adapter: lora_alpha / r.")
    target_modules: Annotated[list[Projection], Field(min_length=1)] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="Linear layers that get an adapter.",
    )
    use_rslora: bool = Field(False, description="Scale by lora_alpha / sqrt(r) instead of lora_alpha / r.")
    rank_pattern: dict[str, PositiveInt] = Field({}, description="Rank of single modules, e.g. {q_proj: 8}.")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="lora_alpha of single modules, e.g. {layers.0.self_attn.q_proj: 64}."
    )
    layers_to_transform: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = Field(
        None, description="Layers that get an adapter, counted from 0; null = all."
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the adapter while learning.")
