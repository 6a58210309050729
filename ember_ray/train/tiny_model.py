"""Tiny Qwen3 models from nothing: their tokenizer, their first weights, their answers, their folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ember_ray.data.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (  # the one that Qwen3 has, without tools and thinking
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def train_tokenizer(texts: list[str], pieces: str, vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's special tokens and chat template (without the thinking parts).

    Args:
        texts: what it is trained on.
        pieces: regular expression of what texts are cut into; no token reaches over the border of a piece.
        vocab_size: most tokens, special ones included.
        max_length: the longest context that the model reads, in tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(
    shape: Mapping[str, int], rope_theta: float, seed: int, tokenizer: PreTrainedTokenizerFast
) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights and tied embeddings.

    Args:
        shape: sizes by their names in ``Qwen3Config``, e.g. ``hidden_size``.
        rope_theta: base of the rotary frequencies.
        seed: of the weights.
        tokenizer: gives the size of the vocabulary and the special tokens.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            **shape,
            rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
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
    at_once = 64 if model.device.type == "cpu" else 1024 // samples
    for start in range(0, len(examples), at_once):
        prompts = [render(tokenizer, example) for example in examples[start : start + at_once]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
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
