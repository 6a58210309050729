import json
import os

import pytest

from ember_ray.config.errors import UserError
from ember_ray.data.example import Example
from ember_ray.data.extraction import generate_examples
from ember_ray.data.faults import DataError
from ember_ray.data.formats import load_dataset_rows
from ember_ray.data.jsonl import save_jsonl


def _file(tmp_path, *lines) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return str(path)


def _row(**values) -> str:
    return json.dumps({"prompt": "What is it?", "gold": 1, **values})


def test_prompts_and_messages(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}]
    chatty = {"messages": chat, "gold": [None], "schema": {"type": "array"}, "id": "b"}
    path = _file(tmp_path, _row(), "", json.dumps(chatty))
    first, second = load_dataset_rows(path)
    assert first == Example("rows.jsonl:1", [{"role": "user", "content": "What is it?"}], 1, is_text=True)
    assert second == Example("b", chat, [None], {"type": "array"})


def test_a_row_ends_at_a_newline_only_and_a_byte_order_mark_is_fine(tmp_path):
    path = _file(tmp_path, b"\xef\xbb\xbf" + _row().encode() + b"\r", '{"prompt": "a\u2028b", "gold": "c\u0085"}')
    assert [example.gold for example in load_dataset_rows(path)] == [1, "c\u0085"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{nonsense", "not JSON: .*column 2"),
        (b'{"prompt": "\xff", "gold": 1}', "not UTF-8 at byte 13 of the line"),
        ('{"prompt": "a", "gold": NaN}', "NaN is no JSON number"),
        ('{"prompt": "a", "gold": [1e999]}', "beyond the range of a double"),
        ('{"prompt": "a", "gold": 1, "gold": 2}', "the key 'gold' is there twice"),
        ('{"a":' * 100_000, "nested too deeply|not JSON"),
        ("7", "a row must be an object, not a number"),
        ("[1]", "a row must be an object, not a list; a file has one object a line"),
        ("[", "a row must be an object, not a list; a file has one object a line"),
        ('{"prompt": "a"}', "'gold' is missing"),
        ('{"prompt": "a", "gold": null}', "'gold' is missing"),
        ('{"gold": 1}', "either 'prompt' or 'messages'$"),
        (_row(messages=[]), "either 'prompt' or 'messages', not both"),
        (_row(prompt=" "), "'prompt' must be a text that is not empty, not an empty string"),
        (_row(prompt=3), "'prompt' must be a text that is not empty, not a number"),
        ('{"messages": [], "gold": 1}', "'messages' must be a list that is not empty"),
        ('{"messages": ["a"], "gold": 1}', r"messages\[0\] must be an object with 'role' and 'content'"),
        ('{"messages": [{"role": "bot", "content": ""}], "gold": 1}', r"messages\[0\].role must be one of system"),
        ('{"messages": [{"role": "user", "content": null}], "gold": 1}', r"content must be a string, not null"),
        ('{"messages": [{"role": "assistant", "content": "x"}], "gold": 1}', "must be the user's, not the assistant's"),
        (_row(schema=[1]), "'schema' must be an object, not a list"),
        (_row(id=7.5), "'id' must be a string that is not empty, not a number"),
        (_row(id=True), "'id' must be a string that is not empty, not a boolean"),
        (_row(id=""), "'id' must be a string that is not empty, not an empty string"),
        ('{"promt": "a"}', "unknown key 'promt'; did you mean 'prompt'"),
        ('{"prompt": "a", "golds": 1}', "unknown key 'golds'; did you mean 'gold'"),
        (_row(shcema={}), "unknown key 'shcema'; did you mean 'schema'"),
        ('{"PROMPT": "a"}', "unknown key 'PROMPT'; did you mean 'prompt'"),
        (_row(completions=["a"]), "may not be called 'completions'"),
        (_row(tools=[{}]), "'tools' is not supported"),
        (_row(databases=[]), "'databases' must be a path or a list of paths of SQLite files, not an empty list"),
        (_row(databases="none.sqlite"), r"'databases': there is no file '/.*/none.sqlite'"),
    ],
)
def test_each_fault_names_file_and_line(tmp_path, line, what):
    path = _file(tmp_path, _row(), line)
    with pytest.raises(DataError, match=what) as caught:
        load_dataset_rows(path, "extract")
    assert len(caught.value.faults) == 1 and caught.value.faults[0].startswith(f"{path}:2: ")


def test_all_faults_are_told_at_once_the_first_twenty_in_words(tmp_path):
    path = _file(tmp_path, *['{"schema": 1}'] * 15, _row())
    with pytest.raises(DataError) as caught:
        load_dataset_rows(path)
    assert len(caught.value.faults) == 30  # no prompt and no good schema in each
    assert [f":{line}: " in str(caught.value) for line in (1, 10, 11)] == [True, True, False]
    assert str(caught.value).endswith("; and 10 more")
    assert isinstance(caught.value, UserError) and isinstance(caught.value, ValueError)


def test_an_id_is_used_once(tmp_path):
    path = _file(tmp_path, _row(id="a"), _row(id="b"), _row(id="a"))
    with pytest.raises(DataError, match=r":3: id 'a' is that of line 1 already"):
        load_dataset_rows(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_a_fault(tmp_path, content):
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=r"empty.jsonl: the file has no rows"):
        load_dataset_rows(path)


def test_a_missing_file_and_a_folder_are_faults(tmp_path):
    with pytest.raises(DataError, match="no data file .*none.jsonl"):
        load_dataset_rows(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        load_dataset_rows(tmp_path)


def test_generated_examples_survive_a_file(tmp_path):
    examples = [e for name in ("easy", "hard", "hard_rule") for e in generate_examples("train", name, 20, 0)]
    save_jsonl(tmp_path / "rows.jsonl", examples)
    assert load_dataset_rows(tmp_path / "rows.jsonl") == examples


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    save_jsonl(tmp_path / "rows.jsonl", generate_examples("train", "easy", 2, 0))
    before = (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        save_jsonl(tmp_path / "rows.jsonl", [Example("a", [], float("nan"))])
    assert (tmp_path / "rows.jsonl").read_bytes() == before and os.listdir(tmp_path) == ["rows.jsonl"]
