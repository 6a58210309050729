import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

from ember_ray.assets import TINY_MODELS, tiny_model_path
from ember_ray.config.load import load_config
from ember_ray.data.extraction import generate_examples
from ember_ray.data.sql_examples import generate_sql_examples
from ember_ray.train.pretrain import batches
from recipes.pretrain_tiny import PretrainTinyConfig, command, new_task

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
CONFIG, SQL_CONFIG = CONFIGS / "pretrain_tiny.yaml", CONFIGS / "pretrain_tiny_sql.yaml"
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
both_tasks = pytest.mark.parametrize("task", sorted(TINY_MODELS))


def _record(task: str = "extract") -> dict:
    return json.loads((tiny_model_path(task) / "training.json").read_text())


@both_tasks
def test_the_shipped_files_are_small_and_complete(task):
    files = list(tiny_model_path(task).iterdir())
    assert {path.name for path in files} == FILES | {"training.json"}
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert 500_000 <= _record(task)["parameters"] <= 3_000_000


@both_tasks
def test_the_shipped_model_is_what_the_shipped_configuration_makes(task):
    record, path = _record(task), {"extract": CONFIG, "sql": SQL_CONFIG}[task]
    shipped = load_config(PretrainTinyConfig, path)
    assert record["config"] == shipped.recorded()
    assert f"configs/{path.name}" in record["recipe"] and shipped.task == task
    assert task == "sql" or shipped == PretrainTinyConfig(), "the file shows the defaults"
    assert record["clean"]["steps"] == -(-shipped.clean.samples // shipped.batch_size)


def test_only_what_a_shipped_configuration_makes_is_told_to_be_made_by_it():
    for task, path in (("extract", CONFIG), ("sql", SQL_CONFIG)):
        shipped = load_config(PretrainTinyConfig, path)
        assert command(shipped) == _record(task)["recipe"]
        assert "configs/" not in command(shipped.model_copy(update={"seed": 1}))


def test_the_base_models_of_the_full_comparison_have_50_to_200_million_parameters():
    import torch
    from transformers import AutoTokenizer

    from ember_ray.train.tiny_model import new_model

    config = load_config(PretrainTinyConfig, CONFIGS / "compare_pretrain.yaml")
    shape = config.model.model_dump()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path(), local_files_only=True)
    with torch.device("meta"):
        model = new_model(shape, shape.pop("rope_theta"), 0, tokenizer)
    assert 50e6 < model.num_parameters() < 200e6


@both_tasks
def test_the_shipped_model_leaves_reinforcement_something_to_do(task):
    record = _record(task)
    assert record["clean"]["exact_match_greedy"] >= 0.85
    assert 0.35 <= record["mixed"]["exact_match_sampled"] <= 0.55
    assert record["mixed"]["exact_match_greedy"] >= record["mixed"]["exact_match_sampled"] + 0.2
    assert 0.4 <= record["mixed"]["faultless_share"] <= 0.6


@both_tasks
def test_the_shipped_model_and_tokenizer_load(task):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path(task), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(task), local_files_only=True)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.num_parameters() == _record(task)["parameters"]
    assert len(tokenizer) == model.config.vocab_size == _record(task)["vocabulary"]
    assert model.config.num_key_value_heads < model.config.num_attention_heads, "grouped-query attention"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id

    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße, 世界 <|im_start|>!"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGrüße, 世界 <|im_start|>!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == text
    assert "<|im_" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_easy_samples_are_short_for_the_shipped_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path(), local_files_only=True)
    lengths = []
    for example in generate_examples("test", "easy", 200, 0):
        chat = [*example.messages, {"role": "assistant", "content": json.dumps(example.gold)}]
        lengths.append(len(tokenizer.apply_chat_template(chat, return_dict=False)))
    assert 75 < sum(lengths) / len(lengths) < 110
    assert max(lengths) < 140


def test_sql_samples_are_short_for_the_shipped_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path("sql"), local_files_only=True)
    lengths = []
    for example in generate_sql_examples("test", 200, 0, tmp_path):
        chat = [*example.messages, {"role": "assistant", "content": example.gold}]
        lengths.append(len(tokenizer.apply_chat_template(chat, return_dict=False)))
    assert 55 < sum(lengths) / len(lengths) < 100
    assert max(lengths) < 130


@both_tasks
def test_the_recorded_greedy_accuracy_holds_here(task, tmp_path):
    """The first prompts of the recorded evaluation: other processors round differently, so with room."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ember_ray.train.tiny_model import generate_texts

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path(task), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(task), local_files_only=True)
    judge = new_task(PretrainTinyConfig(task=task, databases=str(tmp_path)))
    rows = judge.rows("validation", 64)
    matches = judge.exact_matches(rows, generate_texts(model, tokenizer, rows, 1, 0.0))
    assert sum(right for [right] in matches) / 64 >= _record(task)["mixed"]["exact_match_greedy"] - 0.1


def test_batches_hold_every_sample_once_with_its_like():
    import random

    encoded = [([0] * length, 1) for length in random.Random(0).choices(range(50, 120), k=999)]
    made = list(batches(encoded, 32, random.Random(1)))
    assert sorted(len(ids) for batch in made for ids, _ in batch) == sorted(len(ids) for ids, _ in encoded)
    padded = sum(max(len(ids) for ids, _ in batch) * len(batch) for batch in made)
    assert padded < 1.06 * sum(len(ids) for ids, _ in encoded)


def test_answers_only_are_learned():
    """The loss is the mean over the answers' tokens, the end of turn included, and none of the prompts'."""
    import torch
    from transformers import AutoModelForCausalLM

    from ember_ray.train.pretrain import answer_loss

    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), local_files_only=True).eval()
    rows = [([5, 9, 40, 41, 42, 2], 3), ([7, 8, 50, 2], 2)]
    want = []
    with torch.no_grad():
        for ids, prompt_length in rows:
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            want += [-logprobs[at - 1, ids[at]].item() for at in range(prompt_length, len(ids))]
        got = answer_loss(model, rows, pad_id=0).item()
    assert len(want) == 5 and got == pytest.approx(sum(want) / 5, abs=1e-4)


def test_heads_that_do_not_fit_are_refused():
    from ember_ray.config.errors import ConfigError

    with pytest.raises(ConfigError, match="num_key_value_heads=3 does not divide num_attention_heads=8"):
        load_config(PretrainTinyConfig, CONFIG, ["model.num_key_value_heads=3"])


@pytest.mark.slow
@both_tasks
def test_a_small_run_end_to_end_is_the_same_twice(task, tmp_path, capsys):
    from ember_ray.config.cli import run_cli
    from recipes.pretrain_tiny import main

    small = ["tokenizer_samples=200", "clean.samples=256", "mixed.samples=64", "eval_prompts=4", "eval_samples=1",
             "model.hidden_size=32", "model.intermediate_size=64", "vocab_size=400"]  # fmt: skip

    config = {"extract": CONFIG, "sql": SQL_CONFIG}[task]

    def run(name: str, seed: int) -> dict[str, str]:
        folder = tmp_path / "deep" / name
        status = run_cli(PretrainTinyConfig, prog="pretrain", description="", main=main,
                         argv=["--config", str(config), f"output={folder}", f"seed={seed}",
                               f"databases={tmp_path / 'databases'}", *small])  # fmt: skip
        assert status == 0
        assert {path.name for path in folder.iterdir()} == FILES | {"training.json"}
        return {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in FILES}

    first = run("one", 3)
    assert run("two", 3) == first
    if task == "extract":
        assert run("two", 4)["model.safetensors"] != first["model.safetensors"], "and a folder is replaced"
    assert [path.name for path in (tmp_path / "deep").iterdir() if "partial" in path.name] == []
    out = capsys.readouterr().out
    losses = [float(loss) for loss in re.findall(r"clean  step .* loss ([\d.]+)", out)]
    assert losses and "exact match on held-out prompts" in out
    record = json.loads((tmp_path / "deep" / "one" / "training.json").read_text())
    assert record["clean"]["faultless_share"] == 1.0 and 0.2 < record["mixed"]["faultless_share"] < 0.8
    assert record["config"]["seed"] == 3 and yaml.safe_load(config.read_text())["seed"] == 0


@pytest.mark.slow
def test_clean_learning_lowers_the_loss(tmp_path):
    from recipes.pretrain_tiny import pretrain

    small = ["tokenizer_samples=500", "clean.samples=640", "mixed.samples=0", "eval_prompts=0", "model.hidden_size=64"]
    record = pretrain(load_config(PretrainTinyConfig, CONFIG, [f"output={tmp_path / 'm'}", *small]))
    assert "mixed" not in record and record["clean"]["steps"] == 20

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ember_ray.train.pretrain import answer_loss, encode

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m", local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", local_files_only=True)
    held_out = generate_examples("validation", "easy", 32, 0)
    encoded = encode(tokenizer, held_out, [json.dumps(example.gold) for example in held_out])
    with torch.no_grad():
        assert answer_loss(model, encoded, tokenizer.pad_token_id).item() < 0.85 * torch.tensor(len(tokenizer)).log()
