"""Trains the tiny Qwen3 of the CPU demo from scratch, one for each task.

A byte-level BPE tokenizer first, then next-token learning on answers only, in two phases: clean demonstrations until
the model can do the task, then demonstrations of mixed quality, so that its samples differ in ways that a verifier
can tell apart and reinforcement has something to do. The default configuration makes the shipped model of JSON
extraction, configs/pretrain_tiny_sql.yaml that of text-to-SQL.
"""

from __future__ import annotations

import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ember_ray.config.cli import find_config, run_cli
from ember_ray.config.errors import UserError
from ember_ray.config.load import load_config
from ember_ray.config.sections import Section
from ember_ray.data.demonstrations import DemonstrationMix
from ember_ray.data.sql_demonstrations import SqlDemonstrationMix
from ember_ray.train.pretrain import Phase, encode, learn, learn_captured
from ember_ray.train.tiny_model import generate_texts, new_model, save, train_tokenizer
from recipes.pretrain_tasks import ExtractTask, PretrainTask, SqlTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

DEFAULT_CONFIGS = {"extract": "pretrain_tiny", "sql": "pretrain_tiny_sql"}


class CleanPhase(Section):
    """``clean.*``"""

    samples: int = Field(30000, ge=1, description="Demonstrations to learn from, each seen once.")
    muon_learning_rate: float = Field(0.01, gt=0, description="Peak rate of Muon, for the matrices of the layers.")
    adamw_learning_rate: float = Field(4e-3, gt=0, description="Peak rate of AdamW, for embeddings and norms.")


class MixedPhase(Section):
    """``mixed.*``"""

    samples: int = Field(7000, ge=0, description="Demonstrations to learn from, each seen once; 0 = no phase 2.")
    muon_learning_rate: float = Field(0.005, gt=0, description="Peak rate of Muon, for the matrices of the layers.")
    adamw_learning_rate: float = Field(2e-3, gt=0, description="Peak rate of AdamW, for embeddings and norms.")


class MixSection(Section):
    """``mix.*``"""

    raw_date: float = Field(0.15, ge=0, le=1, description="Share of answers with a date as the document writes it.")
    wrong_key: float = Field(0.12, ge=0, le=1, description="Share of answers with one key spelled otherwise.")
    dropped_field: float = Field(0.11, ge=0, le=1, description="Share of answers with one field missing.")
    text_number: float = Field(0.12, ge=0, le=1, description="Share of answers with a number as text with a unit.")
    extra_field: float = Field(0.11, ge=0, le=1, description="Share of answers with a field that nobody asked for.")
    broken_json: float = Field(0.10, ge=0, le=1, description="Share of answers whose JSON does not parse.")
    chatter: float = Field(0.15, ge=0, le=1, description="Share of answers with a sentence around the JSON.")


class SqlMixSection(Section):
    """``sql_mix.*``"""

    wrong_column: float = Field(0.17, ge=0, le=1, description="Share of queries with another column in place of one.")
    missing_filter: float = Field(0.15, ge=0, le=1, description="Share of queries with one condition missing.")
    wrong_operator: float = Field(0.15, ge=0, le=1, description="Share of queries with another comparison.")
    wrong_aggregate: float = Field(0.15, ge=0, le=1, description="Share of aggregates that are of another kind.")
    missing_order: float = Field(0.18, ge=0, le=1, description="Share of orders that are missing or turned round.")
    broken_syntax: float = Field(0.12, ge=0, le=1, description="Share of queries that do not run.")
    chatter: float = Field(0.13, ge=0, le=1, description="Share of queries with a sentence around them.")


class ModelShape(Section):
    """``model.*``"""

    hidden_size: int = Field(128, ge=8, description="Width of the residual stream.")
    intermediate_size: int = Field(384, ge=8, description="Width of the MLP.")
    num_hidden_layers: int = Field(2, ge=1, description="Decoder layers.")
    num_attention_heads: int = Field(8, ge=1, description="Query heads.")
    num_key_value_heads: int = Field(4, ge=1, description="Key and value heads; must divide the query heads.")
    head_dim: int = Field(16, ge=2, multiple_of=2, description="Width of one head.")
    max_position_embeddings: int = Field(2048, ge=128, description="Longest context, in tokens.")
    rope_theta: float = Field(10000.0, gt=1, description="Base of the rotary frequencies.")

    @model_validator(mode="after")
    def _heads_agree(self) -> ModelShape:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        return self


class PretrainTinyConfig(Section):
    """Everything that decides what the tiny model becomes."""

    task: Literal["extract", "sql"] = Field("extract", description="What the model learns: JSON extraction or SQL.")
    output: str = Field("runs/qwen3-tiny-extract", min_length=1, description="Folder of the model; replaced whole.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of documents, faults, first weights and order.")
    threads: int = Field(1, ge=1, description="CPU threads; with another number sums round differently.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where it learns; on a GPU in bfloat16.")
    enforce_eager: bool = Field(False, description="Steps on a GPU without a captured CUDA graph (for debugging).")
    difficulty: Literal["easy", "hard", "hard_rule"] = Field("easy", description="Documents to learn from.")
    levels: Annotated[list[Literal[1, 2, 3, 4]], Field(min_length=1)] = Field(
        [1, 2, 3, 4], description="Levels of the SQL questions to learn from."
    )
    databases: str = Field("runs/databases", min_length=1, description="Folder of the SQL questions' databases.")
    vocab_size: int = Field(1024, ge=300, le=8192, description="Most tokens of the BPE, special ones included.")
    tokenizer_samples: int = Field(8000, ge=1, description="Documents that the tokenizer is trained on.")
    model: ModelShape = Field(default_factory=ModelShape, description="The shape of the Qwen3.")
    batch_size: int = Field(32, ge=1, description="Samples an optimizer step.")
    warmup_share: float = Field(0.1, ge=0, lt=1, description="Share of a phase's steps with a rising learning rate.")
    weight_decay: float = Field(0.05, ge=0, description="Decoupled weight decay, of all but the norms.")
    grad_clip: float = Field(1.0, gt=0, description="Gradients are scaled down to this norm.")
    clean: CleanPhase = Field(default_factory=CleanPhase, description="Phase 1, clean demonstrations.")
    mixed: MixedPhase = Field(default_factory=MixedPhase, description="Phase 2, demonstrations of mixed quality.")
    mix: MixSection = Field(default_factory=MixSection, description="Faults of phase 2, drawn one by one an answer.")
    sql_mix: SqlMixSection = Field(default_factory=SqlMixSection, description="The same for SQL queries.")
    eval_prompts: int = Field(256, ge=0, description="Held-out prompts, evaluated after each phase; 0 = none.")
    eval_samples: int = Field(4, ge=1, description="Answers a prompt at temperature 1.")

    def recorded(self) -> dict[str, Any]:
        """The settings that decide what the model becomes, for its ``training.json``."""
        other = {"difficulty", "mix"} if self.task == "sql" else {"levels", "sql_mix"}
        return self.model_dump(exclude={"output", "databases", "enforce_eager", *other})


def command(config: PretrainTinyConfig) -> str:
    """How the model is made again, as far as a shipped configuration says it; else by the settings recorded beside."""
    name = DEFAULT_CONFIGS[config.task]
    shipped = load_config(PretrainTinyConfig, find_config(name))
    return "python -m recipes.pretrain_tiny" + (
        f" --config configs/{name}.yaml" if shipped.recorded() == config.recorded() else ", with the settings in config"
    )


def new_task(config: PretrainTinyConfig) -> PretrainTask:
    """The task by its name."""
    if config.task == "sql":
        mix = SqlDemonstrationMix(**config.sql_mix.model_dump())
        return SqlTask(config.levels, config.databases, mix, config.seed)
    return ExtractTask(config.difficulty, DemonstrationMix(**config.mix.model_dump()), config.seed)


def phase_options(name: str, phase: CleanPhase | MixedPhase, config: PretrainTinyConfig) -> Phase:
    """What the phase's own and the common settings say together."""
    return Phase(
        name=name,
        seed=config.seed,
        batch_size=config.batch_size,
        muon_learning_rate=phase.muon_learning_rate,
        adamw_learning_rate=phase.adamw_learning_rate,
        warmup_share=config.warmup_share,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
    )


def evaluate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, task: PretrainTask, config: PretrainTinyConfig
) -> dict[str, Any]:
    """Exact match on held-out prompts, of the greedy answer and of samples at temperature 1."""
    import torch

    if config.eval_prompts == 0:
        return {}
    torch.manual_seed(config.seed)
    rows = task.rows("validation", config.eval_prompts)
    result: dict[str, Any] = {}
    for name, samples, temperature in (("greedy", 1, 0.0), ("sampled", config.eval_samples, 1.0)):
        matches = task.exact_matches(rows, generate_texts(model, tokenizer, rows, samples, temperature))
        by_difficulty: dict[str, list[float]] = {}
        for row, right in zip(rows, matches, strict=True):
            by_difficulty.setdefault(str(row.difficulty), []).extend(right)
        result[f"exact_match_{name}"] = _mean([one for right in matches for one in right])
        if len(by_difficulty) > 1:
            result[f"exact_match_{name}_by_level"] = {key: _mean(by_difficulty[key]) for key in sorted(by_difficulty)}
    return result


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def pretrain(config: PretrainTinyConfig) -> dict[str, Any]:
    """Trains, evaluates and writes the folder; returns what its ``training.json`` holds.

    Raises:
        UserError: this torch has no Muon.
    """
    import tokenizers
    import torch
    import transformers
    from transformers.utils import logging

    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"torch {torch.__version__} has no Muon optimizer; install torch 2.9 or newer")
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)  # an unwritable place is told now, not at the end
    logging.disable_progress_bar()
    torch.set_num_threads(config.threads)
    started = time.perf_counter()

    task = new_task(config)
    examples = task.rows("train", config.clean.samples + config.mixed.samples)
    seen = examples[: config.tokenizer_samples]
    # The tokenizer reads both kinds of answers, so that faults cost no more tokens than what is right.
    texts = [
        text
        for row in seen
        for text in (row.messages[-1]["content"], task.demonstrate(row, mixed=False), task.demonstrate(row, mixed=True))
    ]
    shape = config.model.model_dump()
    tokenizer = train_tokenizer(texts, task.pieces, config.vocab_size, config.model.max_position_embeddings)
    model = new_model(shape, shape.pop("rope_theta"), config.seed, tokenizer).to(config.device)
    rows = {"clean": examples[: config.clean.samples], "mixed": examples[config.clean.samples :]}
    answers = {name: [task.demonstrate(row, mixed=name == "mixed") for row in rows[name]] for name in rows}
    encoded = {name: encode(tokenizer, rows[name], answers[name]) for name in rows}
    lengths = [len(ids) for ids, _ in encoded["clean"]]
    record: dict[str, Any] = {
        "recipe": command(config),
        "config": config.recorded(),
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "tokens_per_sample": {"mean": round(sum(lengths) / len(lengths), 1), "max": max(lengths)},
    }
    print(
        f"{record['parameters']:,} parameters, {len(tokenizer)} tokens in the vocabulary, samples of "
        f"{record['tokens_per_sample']['mean']} tokens (at most {max(lengths)}); data made in "
        f"{time.perf_counter() - started:.0f} s",
        flush=True,
    )
    for name, phase in (("clean", config.clean), ("mixed", config.mixed)):
        if not encoded[name]:
            continue
        at = time.perf_counter()
        options = phase_options(name, phase, config)
        if config.device == "cuda":
            steps = learn_captured(model, encoded[name], options, capture=not config.enforce_eager)
        else:
            steps = learn(model, encoded[name], options, tokenizer.pad_token_id)
        seconds = round(time.perf_counter() - at, 1)
        faultless = [
            answer == task.demonstrate(row, mixed=False) for answer, row in zip(answers[name], rows[name], strict=True)
        ]
        record[name] = {
            "steps": steps,
            "seconds": seconds,
            "faultless_share": round(sum(faultless) / len(faultless), 4),
            **evaluate(model, tokenizer, task, config),
        }
    record["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    save(model, tokenizer, record, Path(config.output))
    return record


def main(config: PretrainTinyConfig) -> None:
    record = pretrain(config)
    print("\nexact match on held-out prompts:")
    print(f"{'phase':<8}{'steps':>7}{'seconds':>9}{'faultless':>11}{'greedy':>9}{'sampled':>9}")
    for name in ("clean", "mixed"):
        if name in record:
            row = record[name]
            print(
                f"{name:<8}{row['steps']:>7}{row['seconds']:>9.1f}{row['faultless_share']:>11.3f}"
                f"{row.get('exact_match_greedy', math.nan):>9.3f}{row.get('exact_match_sampled', math.nan):>9.3f}"
            )
    print(f"\nwritten to {config.output}")


if __name__ == "__main__":
    sys.exit(
        run_cli(
            PretrainTinyConfig,
            prog="python -m recipes.pretrain_tiny",
            description=__doc__.split("\n\n", 1)[1],
            main=main,
            default_config="pretrain_tiny",
        )
    )
