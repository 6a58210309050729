"""Every setting of a run, with its type, default, limits and meaning: the only place where they are declared."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ember_ray.engine.options import CPU_KV_BLOCKS

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LossType = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
PositiveInt = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A group of settings. Unknown keys are refused, values are not coerced (``"3"`` is not a number)."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class RunConfig(Section):
    """What every recipe has. Recipes derive their own configuration from it."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        "run", description="Name of the run; its folder is <output_dir>/<name>_<timestamp>."
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of everything random: data, sampling, initial adapter, order of pairs."
    )
    output_dir: str = Field("runs", min_length=1, description="Folder in which the folder of the run is made.")
    resume: str | None = Field(
        None,
        description="Folder of an unfinished run to go on with; give its own settings: --config FOLDER/config.yaml.",
    )
    tracker: Literal["auto", "none", "wandb", "tensorboard"] = Field(
        "auto", description="Where metrics go beside metrics.jsonl; auto = wandb, offline when there is no key."
    )


class ModelSection(Section):
    """``model.*``"""

    path: str | None = Field(None, description="Hugging Face folder of a dense Qwen3; null = the shipped tiny model.")
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
    lora_mode: Literal["slots", "merged"] = Field(
        "slots", description="Adapters beside the base weights, or merged into a second copy of them."
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


class RolloutSection(Section):
    """``rollout.*``"""

    prompts_per_round: PositiveInt = Field(64, description="Training prompts of one round.")
    num_candidates: PositiveInt = Field(8, description="Candidates of each prompt.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of rollouts and of sampled evaluation.")
    top_k: int = Field(0, ge=0, description="Draw from the k most likely tokens only; 0 = off.")
    top_p: float = Field(1.0, gt=0, le=1, description="Draw from the smallest set of tokens with this mass; 1 = off.")
    min_p: float = Field(
        0.0, ge=0, le=1, description="Leave out tokens less than min_p times as likely as the likeliest; 0 = off."
    )
    max_tokens: PositiveInt = Field(96, description="Most tokens of one candidate.")
    verifier_workers: PositiveInt = Field(1, description="Verifier actors that judge while others still generate.")
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


class DpoSection(Section):
    """``dpo.*``"""

    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = Field(
        "constant", description="Learning-rate schedule over the steps of the whole run."
    )
    warmup_steps: float = Field(
        0.0, ge=0, description="Optimizer steps of linear warm-up; a value below 1 is a share of all steps."
    )
    beta: float = Field(0.1, gt=0, description="Strength of the pull towards the base model.")
    loss_type: Annotated[list[LossType], Field(min_length=1)] = Field(
        ["sigmoid", "sft"], description="Losses that are added up, by TRL's names."
    )
    loss_weights: list[Weight] | None = Field(None, description="Weight of each loss of dpo.loss_type; null = 1 each.")
    per_device_train_batch_size: PositiveInt = Field(16, description="Pairs in one forward and backward.")
    gradient_accumulation_steps: PositiveInt = Field(1, description="Forwards and backwards in one optimizer step.")
    epochs_per_round: PositiveInt = Field(1, description="Passes over the pairs of a round.")
    max_grad_norm: float = Field(1.0, gt=0, description="Norm to which the gradient is clipped.")
    max_length: PositiveInt | None = Field(None, description="Longest prompt plus answer, in tokens; null = no limit.")
    min_margin: float = Field(
        0.05, ge=0, description="Least difference in reward between the chosen and the rejected candidate of a pair."
    )
    pairs_per_prompt: PositiveInt = Field(
        1, description="Most pairs of one prompt: best with worst, and so on inwards."
    )

    @model_validator(mode="after")
    def _weights_match(self) -> DpoSection:
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"dpo.loss_weights has {len(self.loss_weights)} values and dpo.loss_type has {len(self.loss_type)}; "
                "give one weight for each loss, or null"
            )
        if self.loss_weights is not None and not any(self.loss_weights):
            raise ValueError("dpo.loss_weights are all 0, so nothing would be learnt; make one positive")
        return self


class DataSection(Section):
    """``data.*``"""

    difficulty: Literal["easy", "hard", "hard_rule"] = Field(
        "easy", description="Which documents the generator makes (not used with own files)."
    )
    train_examples: PositiveInt = Field(2048, description="Training documents that the generator makes.")
    train_path: str | None = Field(
        None, description="Own training rows (JSONL: prompt or messages, gold); null = generated."
    )
    eval_path: str | None = Field(None, description="Own held-out rows (JSONL); given together with data.train_path.")
    eval_prompts: PositiveInt = Field(256, description="Held-out prompts on which before and after are measured.")
    eval_samples: PositiveInt = Field(
        4, description="Sampled candidates of each held-out prompt (one greedy comes on top)."
    )

    @model_validator(mode="after")
    def _both_files(self) -> DataSection:
        if (self.train_path is None) != (self.eval_path is None):
            given, absent = ("train_path", "eval_path") if self.eval_path is None else ("eval_path", "train_path")
            raise ValueError(
                f"data.{given} is set but data.{absent} is not, so training and held-out prompts would be of "
                "different tasks; set both or neither"
            )
        return self


class RewardSection(Section):
    """``reward.*``"""

    design: Literal["binary", "weighted", "decomposed"] = Field(
        "decomposed", description="binary: exact or not; weighted: fields by weight; decomposed: parse, schema, fields."
    )
    weights: dict[str, Weight] = Field(
        {}, description="Weights of fields by dotted path (weighted), or of parse, schema, fields, clean (decomposed)."
    )

    @model_validator(mode="after")
    def _weights_fit(self) -> RewardSection:
        if self.weights and self.design == "binary":
            raise ValueError(
                "reward.weights has no use with reward.design=binary; leave it out or choose another design"
            )
        shares = ("parse", "schema", "fields", "clean")
        unknown = set(self.weights) - set(shares)
        if self.design == "decomposed" and unknown:
            raise ValueError(
                f"reward.weights names '{min(unknown)}'; with reward.design=decomposed it takes {', '.join(shares)}"
            )
        complete = self.design == "weighted" or len(self.weights) == len(shares)  # shares left out keep their defaults
        if self.weights and complete and not any(self.weights.values()):
            raise ValueError("reward.weights are all 0, so every reward would be 0; make one positive")
        return self


class DpoExtractConfig(RunConfig):
    """DPO on JSON extraction: candidates from the engine, pairs by the verifier, a LoRA adapter that is swapped in."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(
        "dpo_extract", description="Name of the run; its folder is <output_dir>/<name>_<timestamp>."
    )
    rounds: PositiveInt = Field(6, description="Rounds of rollout, learning and publication.")
    model: ModelSection = Field(default_factory=ModelSection, description="The policy's base model.")
    ray: RaySection = Field(default_factory=RaySection, description="The cluster.")
    engine: EngineSection = Field(default_factory=EngineSection, description="The rollout engine.")
    rollout: RolloutSection = Field(default_factory=RolloutSection, description="How candidates are drawn and judged.")
    lora: LoraSection = Field(default_factory=LoraSection, description="The adapter that is learnt (PEFT's names).")
    dpo: DpoSection = Field(default_factory=DpoSection, description="Learning from pairs (TRL's names).")
    data: DataSection = Field(default_factory=DataSection, description="Training and held-out prompts.")
    reward: RewardSection = Field(
        default_factory=RewardSection, description="How a candidate's JSON becomes one number."
    )

    @model_validator(mode="after")
    def _sections_agree(self) -> DpoExtractConfig:
        if self.rollout.num_candidates < 2:
            raise ValueError("rollout.num_candidates is 1, but a pair needs two candidates of a prompt; set at least 2")
        if self.engine.max_model_len is not None and self.rollout.max_tokens >= self.engine.max_model_len:
            raise ValueError(
                f"rollout.max_tokens={self.rollout.max_tokens} leaves no room for a prompt in "
                f"engine.max_model_len={self.engine.max_model_len}; lower it"
            )
        if self.data.train_path is None and self.rollout.prompts_per_round > self.data.train_examples:
            raise ValueError(
                f"rollout.prompts_per_round={self.rollout.prompts_per_round} is more than "
                f"data.train_examples={self.data.train_examples}, so prompts would repeat in a round; raise it"
            )
        if self.ray.address is not None and self.ray.num_cpus is not None:
            raise ValueError("ray.num_cpus is for a local Ray only; leave it null when ray.address names a cluster")
        several = self.engine.stages > 1 if isinstance(self.engine.stages, int) else len(self.engine.stages) > 1
        if self.ray.address is None and self.ray.placement_strategy == "STRICT_SPREAD" and several:
            raise ValueError(
                "ray.placement_strategy=STRICT_SPREAD wants every stage on its own node, but a local Ray has one node; "
                "use PACK or set ray.address"
            )
        return self
