import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_ray.assets import tiny_model_path
from ember_ray.data.example import Example
from ember_ray.data.extraction import generate_examples
from ember_ray.data.tokenize import completion_tokens, prompt_tokens
from ember_ray.model.qwen3_config import ModelError
from ember_ray.model.tokenizer import Tokenizer

THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role + '\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Like that of Qwen3's thinking models: an empty thought before the last answer, also where it is only read."""

ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DIFFERENT = (
    "{% if add_generation_prompt %}Answer this! {% endif %}"
    "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda text: "<|" not in text)
TURNS = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT})
CHATS = st.tuples(st.lists(TURNS, max_size=3), TEXT).map(
    lambda parts: [*parts[0], {"role": "user", "content": parts[1]}]
)
ANSWERS = TEXT.filter(lambda text: text == text.strip() != "")
"""Where an answer begins or ends with white space, a whole chat has tokens that reach over its borders."""


def _with_template(folder, template: str | None, **settings) -> Tokenizer:
    shutil.copytree(tiny_model_path(), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template} | settings))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    thinking = _with_template(tmp_path_factory.mktemp("tokenizers") / "thinking", THINKING)
    return [Tokenizer(tiny_model_path()), thinking]


@pytest.fixture(scope="module")
def peers(tokenizers):
    from transformers import AutoTokenizer

    return [AutoTokenizer.from_pretrained(one.folder) for one in tokenizers]


@pytest.mark.slow
@settings(max_examples=60)
@given(CHATS, ANSWERS)
def test_prompt_and_answer_are_the_whole_chat_of_transformers(tokenizers, peers, messages, answer):
    for tokenizer, peer in zip(tokenizers, peers, strict=True):
        whole = peer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], return_dict=False)
        row = Example("1", messages)
        found = [*prompt_tokens(tokenizer, row), *completion_tokens(tokenizer, row, answer)]
        assert [*found, *tokenizer.encode("\n")] == whole  # the template writes a line break behind the turn
        assert found[-1] == tokenizer.eos_token_id


def test_a_thought_of_the_template_is_part_of_the_answer(tokenizers):
    row = Example("1", [{"role": "user", "content": "a"}])
    plain, thinking = (one.decode(completion_tokens(one, row, '{"a": 1}<|im_end|> and on')) for one in tokenizers)
    assert plain == '{"a": 1} and on' and thinking == '<think>\n\n</think>\n\n{"a": 1} and on'


@settings(max_examples=60)
@given(TEXT, TEXT)
def test_texts_are_raw_or_the_turn_of_a_user(tokenizers, prompt, answer):
    tokenizer = tokenizers[0]
    row = Example("1", [{"role": "user", "content": prompt}], is_text=True)
    assert prompt_tokens(tokenizer, row, chat_template=False) == tuple(tokenizer.encode(prompt))
    assert completion_tokens(tokenizer, row, answer, chat_template=False) == (
        *tokenizer.encode(answer),
        tokenizer.eos_token_id,
    )
    chat = Example("1", row.messages)
    for with_template in (True, False):
        assert prompt_tokens(tokenizer, row) == prompt_tokens(tokenizer, chat, with_template)
        assert completion_tokens(tokenizer, row, answer) == completion_tokens(tokenizer, chat, answer, with_template)


def test_answers_end_as_the_engine_ends_them(tokenizers):
    from ember_ray.model.qwen3_config import read_model_config

    ends = read_model_config(tiny_model_path()).eos_token_ids
    for row in generate_examples("train", "hard", 20, 0):
        tokens = completion_tokens(tokenizers[0], row, json.dumps(row.gold))
        assert tokens[-1] in ends and not set(tokens[:-1]) & set(ends)
        assert tokenizers[0].decode(tokens) == json.dumps(row.gold)


def test_other_templates(tmp_path):
    row = Example("1", [{"role": "user", "content": "a"}])
    endless = _with_template(tmp_path / "endless", ENDLESS)
    assert completion_tokens(endless, row, "b") == (*endless.encode("b\n"), endless.eos_token_id)
    different = _with_template(tmp_path / "different", DIFFERENT)
    with pytest.raises(ModelError, match="different' writes a prompt otherwise once its answer is there"):
        completion_tokens(different, row, "b")
    none = _with_template(tmp_path / "none", None, eos_token=None)
    with pytest.raises(ModelError, match="has no chat template; give prompts as text"):
        completion_tokens(none, row, "b")
    with pytest.raises(ModelError, match="none' has no eos_token"):
        completion_tokens(none, Example("1", row.messages, is_text=True), "b", chat_template=False)
