"""What sharing a group's prompt is worth on a CPU: this engine with and without it, and transformers.

    python -m benchmarks.prefix_sharing [--prompts 16] [--candidates 8] [--prompt-tokens 512] [--new-tokens 64]

Prints one JSON line a model and engine: the median of the repetitions, and ratios against the engine with sharing
in the same run, with the same threads and dtype. Every repetition uses prompts that no engine has seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ember_ray.assets import tiny_model_path
from ember_ray.engine.llm import LLM
from ember_ray.engine.options import EngineOptions
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.model.plan import stage_bytes
from ember_ray.tracking.summary import git_state

Generate = Callable[[list[list[int]]], int]
"""Prompts -> number of tokens generated."""


def random_model(folder: Path) -> Path:
    """A Qwen3 of 5 million random parameters in Hugging Face format; timing does not depend on their values."""
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    shape = Qwen3Config(
        vocab_size=1024, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ember(model: Path, sharing: bool, candidates: int, new_tokens: int, blocks: int) -> tuple[Generate, LLM]:
    llm = LLM(
        EngineOptions(str(model), prefix_sharing=sharing, num_kv_blocks=blocks, max_num_seqs=1024,
                      max_num_batched_tokens=4096)
    )  # fmt: skip
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, seed=1)

    def generate(prompts: list[list[int]]) -> int:
        outputs = llm.generate(prompts, candidates, params)
        return sum(len(c.token_ids) for output in outputs for c in output.candidates)

    return generate, llm


def transformers_repeated(model: Path, candidates: int, new_tokens: int) -> Generate:
    """``generate`` with num_return_sequences: every candidate's prompt is computed."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]]) -> int:
        tokens = torch.tensor(prompts)
        with torch.inference_mode():
            out = network.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=True, top_k=0,
                num_return_sequences=candidates, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0,
            )  # fmt: skip
        return out.shape[0] * (out.shape[1] - tokens.shape[1])

    return generate


def transformers_expanded(model: Path, candidates: int, new_tokens: int) -> Generate:
    """Each prompt computed once, its cache repeated for the candidates, then ``generate`` from there."""
    from transformers import AutoModelForCausalLM, DynamicCache

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]]) -> int:
        tokens = torch.tensor(prompts)
        with torch.inference_mode():
            cache = DynamicCache(config=network.config)
            network(tokens[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache.batch_repeat_interleave(candidates)
            repeated = tokens.repeat_interleave(candidates, 0)
            out = network.generate(
                repeated, attention_mask=torch.ones_like(repeated), past_key_values=cache, do_sample=True, top_k=0,
                min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0,
            )  # fmt: skip
        return out.shape[0] * (out.shape[1] - tokens.shape[1])

    return generate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count, new = options.candidates, options.new_tokens
    commit = git_state()[0]
    work = {"prompts": options.prompts, "n": count, "prompt": options.prompt_tokens, "gen": new}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in (("shipped", tiny_model_path()), ("random-5M", random_model(Path(folder)))):
            blocks = options.prompts * count * (-(-options.prompt_tokens // 16) + -(-new // 16)) + 16
            shared, shared_llm = ember(model, True, count, new, blocks)
            unshared, unshared_llm = ember(model, False, count, new, blocks)
            engines: dict[str, tuple[Generate, LLM | None]] = {
                "ember": (shared, shared_llm),
                "ember, no sharing": (unshared, unshared_llm),
                "transformers, num_return_sequences": (transformers_repeated(model, count, new), None),
                "transformers, cache expanded": (transformers_expanded(model, count, new), None),
            }
            seconds: dict[str, list[float]] = {engine: [] for engine in engines}
            prefill: dict[str, float] = {}
            for repetition in range(options.repetitions + 1):
                generator = torch.Generator().manual_seed(repetition)
                size = (options.prompts, options.prompt_tokens)
                prompts = torch.randint(10, 500, size, generator=generator).tolist()
                for engine, (generate, llm) in engines.items():
                    before = llm.engine.counters()["prefill_tokens"] if llm else 0.0
                    start = time.perf_counter()
                    generated = generate(prompts)
                    took = time.perf_counter() - start
                    assert generated == options.prompts * count * new, f"{engine} made {generated} tokens"
                    if llm:
                        prefill[engine] = llm.engine.counters()["prefill_tokens"] - before
                    if repetition:  # the first one warms up
                        seconds[engine].append(took)
            base = statistics.median(seconds["ember"])
            parameters = stage_bytes(shape := shared_llm.engine.config, (shape.num_hidden_layers,), "float32")[0] // 4
            for engine, times in seconds.items():
                median = statistics.median(times)
                row = {"model": name, "parameters": parameters, "engine": engine, **work, "threads": options.threads,
                       "dtype": "float32", "seconds": round(median, 3), "seconds_min": round(min(times), 3),
                       "seconds_max": round(max(times), 3), "gen_tok_s": round(options.prompts * count * new / median),
                       "prefill_tokens": prefill.get(engine), "ratio_to_ember": round(median / base, 3),
                       "ember_ratio": round(base / median, 3), "git_commit": commit}  # fmt: skip
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
