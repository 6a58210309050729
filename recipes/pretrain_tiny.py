"""Trains the tiny Qwen3 of the CPU demo from scratch.

A byte-level BPE tokenizer first, then next-token learning on answers only, in two phases: clean demonstrations until
the model can do the task, then demonstrations of mixed quality, so that its samples differ in ways that a verifier
can tell apart and reinforcement has something to do. The default configuration makes the shipped model.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from ember_ray.config.cli import run_cli
from ember_ray.config.errors import UserError
from ember_ray.config.schema import Section
from ember_ray.data.demonstrations import CLEAN, DemonstrationMix, demonstrate
from ember_ray.data.example import Example
from ember_ray.data.extraction import generate_examples
from verifiers.json_extraction import verify

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (  # the one that Qwen3 has, without tools and thinking
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# Digits in pairs, words with the space before them, JSON punctuation such as '": "' in one piece: short and few
# different pieces are what two layers need to learn copying.
PIECES = r"\d{1,2}| ?[\p{L}_]+| ?[^\s\p{L}\d_]+ ?[^\s\p{L}\d_]*|\s"
IGNORED = -100


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

    output: str = Field("runs/qwen3-tiny-extract", min_length=1, description="Folder of the model; replaced whole.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of documents, faults, first weights and order.")
    threads: int = Field(1, ge=1, description="CPU threads; with another number sums round differently.")
    difficulty: Literal["easy", "hard", "hard_rule"] = Field("easy", description="Documents to learn from.")
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
    eval_prompts: int = Field(256, ge=0, description="Held-out prompts, evaluated after each phase; 0 = none.")
    eval_samples: int = Field(4, ge=1, description="Answers a prompt at temperature 1.")


def train_tokenizer(texts: list[str], config: PretrainTinyConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens and chat template (without the thinking parts)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=config.model.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(config: PretrainTinyConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights and tied embeddings."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(config.seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            **config.model.model_dump(exclude={"rope_theta"}),
            rope_parameters={"rope_type": "default", "rope_theta": config.model.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )


def render(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    """The chat as text, up to where the answer begins."""
    return tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)


Encoded = tuple[list[int], int]
"""Token ids of prompt and answer, and how many of them are the prompt."""


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example], answers: list[str]) -> list[Encoded]:
    """Renders the chat, with the end of turn as the last token of the answer."""
    if not examples:
        return []  # tokenizers refuse an empty batch
    prompts = [render(tokenizer, example) for example in examples]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer([answer + TURN_END for answer in answers], add_special_tokens=False)["input_ids"]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompt_ids, answer_ids, strict=True)]


def batches(encoded: list[Encoded], batch_size: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """Every sample once, those of like length together, so that little is padded."""
    window = 16 * batch_size
    for start in range(0, len(encoded), window):
        part = sorted(encoded[start : start + window], key=lambda sample: len(sample[0]))
        groups = [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        rng.shuffle(groups)
        yield from groups


def answer_loss(model: Qwen3ForCausalLM, batch: list[Encoded], pad_id: int) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens.

    Padding is on the right, so causal attention never sees it and needs no mask. The head runs on those positions
    only that predict an answer's token.
    """
    import torch
    import torch.nn.functional as F

    length = max(len(ids) for ids, _ in batch)
    inputs = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids, _ in batch])
    labels = torch.full((len(batch), length), IGNORED)
    for row, (ids, prompt_length) in enumerate(batch):
        labels[row, prompt_length - 1 : len(ids) - 1] = torch.tensor(ids[prompt_length:])
    wanted = labels != IGNORED
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[wanted]), labels[wanted])


def new_optimizers(
    model: Qwen3ForCausalLM, phase: CleanPhase | MixedPhase, config: PretrainTinyConfig
) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for the rest.

    With AdamW alone the same model needs over five times as many samples to copy reliably.
    """
    import torch

    matrices: list[torch.nn.Parameter] = []
    embeddings: list[torch.nn.Parameter] = []
    norms: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        (norms if weight.dim() < 2 else embeddings if "embed_tokens" in name else matrices).append(weight)
    return [
        torch.optim.Muon(matrices, lr=phase.muon_learning_rate, weight_decay=config.weight_decay, momentum=0.95),
        torch.optim.AdamW(
            [{"params": embeddings, "weight_decay": config.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=phase.adamw_learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]


def learn(
    model: Qwen3ForCausalLM,
    encoded: list[Encoded],
    phase: CleanPhase | MixedPhase,
    config: PretrainTinyConfig,
    name: str,
    pad_id: int,
) -> int:
    """One phase: every sample once, linear warm-up, then a cosine to a tenth of the peak; returns the steps made."""
    import torch

    steps = math.ceil(len(encoded) / config.batch_size)
    warmup = int(config.warmup_share * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    optimizers = new_optimizers(model, phase, config)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    model.train()
    started, tokens = time.perf_counter(), 0
    losses: list[float] = []
    for batch in batches(encoded, config.batch_size, random.Random(f"{name}/{config.seed}")):
        loss = answer_loss(model, batch, pad_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        tokens += sum(len(ids) for ids, _ in batch)
        losses.append(loss.item())
        if len(losses) % 50 == 0 or len(losses) == steps:
            seconds, recent = time.perf_counter() - started, losses[-50:]
            print(
                f"{name:>6}  step {len(losses):>5}/{steps}  loss {sum(recent) / len(recent):.4f}  "
                f"{tokens / seconds:6.0f} tokens/s  {seconds:4.0f} s",
                flush=True,
            )
    return steps


def generate_texts(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: list[Example],
    samples: int,
    temperature: float,
) -> list[list[str]]:
    """``samples`` answers to each example; greedy at temperature 0."""
    import torch

    model.eval()
    tokenizer.padding_side = "left"
    answers: list[list[str]] = []
    for start in range(0, len(examples), 64):
        prompts = [render(tokenizer, example) for example in examples[start : start + 64]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        how: dict[str, Any] = {"do_sample": False}
        if temperature:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with torch.no_grad():
            out = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                num_return_sequences=samples,
                max_new_tokens=96,
                **how,
            )
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [texts[at : at + samples] for at in range(0, len(texts), samples)]
    return answers


def evaluate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, config: PretrainTinyConfig
) -> dict[str, float]:
    """Exact match on held-out prompts, of the greedy answer and of samples at temperature 1."""
    import torch

    if config.eval_prompts == 0:
        return {}
    torch.manual_seed(config.seed)
    examples = generate_examples("validation", config.difficulty, config.eval_prompts, config.seed)
    result = {}
    for name, samples, temperature in (("greedy", 1, 0.0), ("sampled", config.eval_samples, 1.0)):
        answers = generate_texts(model, tokenizer, examples, samples, temperature)
        right = [
            verify(text, example.gold, example.schema).components["exact_match"]
            for group, example in zip(answers, examples, strict=True)
            for text in group
        ]
        result[f"exact_match_{name}"] = round(sum(right) / len(right), 4)
    return result


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any], output: Path) -> None:
    """Writes the whole Hugging Face folder under another name first, then puts it in place of the old one."""
    from transformers import GenerationConfig

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial, save_jinja_files=False)
    described = json.loads((partial / "tokenizer_config.json").read_text())
    described["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    (partial / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    (partial / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    for path in partial.iterdir():
        path.chmod(0o644)
    if output.exists():
        shutil.rmtree(output)
    os.replace(partial, output)


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

    mix = DemonstrationMix(**config.mix.model_dump())
    rng = random.Random(f"demonstrations/{config.seed}")
    examples = generate_examples("train", config.difficulty, config.clean.samples + config.mixed.samples, config.seed)
    seen = examples[: config.tokenizer_samples]
    # The tokenizer reads both kinds of answers, so that faults cost no more tokens than what is right.
    texts = [text for e in seen for text in (e.messages[-1]["content"], demonstrate(e, rng), demonstrate(e, rng, mix))]
    tokenizer = train_tokenizer(texts, config)
    model = new_model(config, tokenizer)
    rows = {"clean": examples[: config.clean.samples], "mixed": examples[config.clean.samples :]}
    answers = {
        "clean": [demonstrate(example, rng, CLEAN) for example in rows["clean"]],
        "mixed": [demonstrate(example, rng, mix) for example in rows["mixed"]],
    }
    encoded = {name: encode(tokenizer, rows[name], answers[name]) for name in rows}
    lengths = [len(ids) for ids, _ in encoded["clean"]]
    record: dict[str, Any] = {
        "recipe": "python -m recipes.pretrain_tiny --config configs/pretrain_tiny.yaml",
        "config": config.model_dump(exclude={"output"}),
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
    phases: tuple[tuple[str, CleanPhase | MixedPhase], ...] = (("clean", config.clean), ("mixed", config.mixed))
    for name, phase in phases:
        if not encoded[name]:
            continue
        at = time.perf_counter()
        steps = learn(model, encoded[name], phase, config, name, tokenizer.pad_token_id)
        seconds = round(time.perf_counter() - at, 1)
        faultless = [answer == demonstrate(row, rng) for answer, row in zip(answers[name], rows[name], strict=True)]
        record[name] = {
            "steps": steps,
            "seconds": seconds,
            "faultless_share": round(sum(faultless) / len(faultless), 4),
            **evaluate(model, tokenizer, config),
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
