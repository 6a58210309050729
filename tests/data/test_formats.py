import json
import re
import sqlite3
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_ray.data import formats_arrow
from ember_ray.data.example import Example
from ember_ray.data.faults import DataError
from ember_ray.data.formats import load_dataset_rows
from ember_ray.data.jsonl import save_jsonl, to_row

ASK = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "It is blue."}
GREEN = {"role": "assistant", "content": "It is green."}
BRIEF = {"role": "system", "content": "Be brief."}

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SOME = TEXT.filter(bool)
SAID = TEXT.filter(str.strip)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
TURNS = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT})
CHATS = st.tuples(st.lists(TURNS, max_size=2), TEXT).map(
    lambda parts: [*parts[0], {"role": "user", "content": parts[1]}]
)


@st.composite
def examples(draw) -> Example:
    """Rows of every format: prompts as texts and as chats, with and without each kind of answer."""
    is_text = draw(st.booleans())
    preference = draw(st.none() | st.tuples(SAID, SAID)) or (None, None)
    return Example(
        id=draw(SOME),
        messages=[{"role": "user", "content": draw(SAID)}] if is_text else draw(CHATS),
        gold=draw(JSON),
        schema=draw(st.none() | st.dictionaries(TEXT, JSON, max_size=3)),
        template=draw(st.none() | SOME),
        difficulty=draw(st.none() | SOME),
        columns=draw(st.dictionaries(st.sampled_from(["answer", "level", "Größe"]), JSON, max_size=2)),
        completion=draw(st.none() | SAID),
        chosen=preference[0],
        rejected=preference[1],
        is_text=is_text,
    )


ROWS = st.lists(examples(), min_size=1, max_size=4, unique_by=lambda example: example.id)


def _table(rows: list[dict]) -> pa.Table:
    """Rows as the columns that users' Parquet files have; what may be any JSON value as a JSON column or as text."""
    columns = {}
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        if name == "messages":
            columns[name] = pa.array(values, pa.list_(message))
        elif name == "schema":
            columns[name] = pa.array([None if value is None else json.dumps(value) for value in values])
        elif name in ("gold", "answer", "level", "Größe"):
            texts = [json.dumps(row[name]) if name in row else None for row in rows]
            columns[name] = pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string()))
        else:
            columns[name] = pa.array(values, pa.string())
    return pa.table(columns)


def _parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(_table(rows), path)


def _saved(path: Path, rows: list[dict]) -> None:
    import datasets

    datasets.Dataset(_table(rows)).save_to_disk(str(path))


def _without_empty_columns(example: Example) -> Example:
    """A table has all columns in all rows, so a column that a row does not have is null there."""
    return replace(example, columns={key: value for key, value in example.columns.items() if value is not None})


@settings(max_examples=40)
@given(ROWS)
def test_what_is_saved_as_jsonl_is_loaded_again(rows):
    with TemporaryDirectory() as folder:
        save_jsonl(Path(folder) / "rows.jsonl", rows)
        assert load_dataset_rows(Path(folder) / "rows.jsonl") == rows


@settings(max_examples=40)
@given(ROWS)
def test_what_is_saved_as_parquet_is_loaded_again(rows):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        _parquet(path, [to_row(row, path.parent) for row in rows])
        assert [_without_empty_columns(row) for row in load_dataset_rows(path)] == [
            _without_empty_columns(row) for row in rows
        ]


@settings(max_examples=10)
@given(ROWS)
def test_what_is_saved_as_a_dataset_folder_is_loaded_again(rows):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        _saved(path, [to_row(row, path) for row in rows])
        assert [_without_empty_columns(row) for row in load_dataset_rows(path)] == [
            _without_empty_columns(row) for row in rows
        ]


def _write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _load(tmp_path: Path, *rows: dict, write=_write, **options) -> list[Example]:
    write(tmp_path / "rows", *rows)
    return load_dataset_rows(tmp_path / "rows", **options)


def _from_list(path: Path, *rows: dict, save) -> None:
    import datasets

    save(datasets.Dataset.from_list(list(rows)), str(path))


WRITERS = {
    "jsonl": _write,
    "parquet": partial(_from_list, save=lambda dataset, path: dataset.to_parquet(path)),
    "saved": partial(_from_list, save=lambda dataset, path: dataset.save_to_disk(path)),
}

ASKED = Example("", [ASK])
FORMS = {
    "prompt, standard": ({"prompt": ASK["content"]}, replace(ASKED, is_text=True)),
    "prompt, conversational": ({"prompt": [BRIEF, ASK]}, replace(ASKED, messages=[BRIEF, ASK])),
    "messages without an answer": ({"messages": [ASK, BLUE, ASK]}, replace(ASKED, messages=[ASK, BLUE, ASK])),
    "messages with an answer": (
        {"messages": [ASK, GREEN, ASK, BLUE]},
        replace(ASKED, messages=[ASK, GREEN, ASK], completion="It is blue."),
    ),
    "prompt-completion, standard": (
        {"prompt": "The sky is", "completion": " blue."},
        Example("", [{"role": "user", "content": "The sky is"}], completion=" blue.", is_text=True),
    ),
    "prompt-completion, conversational": (
        {"prompt": [ASK], "completion": [BLUE]},
        replace(ASKED, completion="It is blue."),
    ),
    "earlier turns of a completion are prompt": (
        {"prompt": [ASK], "completion": [GREEN, ASK, BLUE]},
        replace(ASKED, messages=[ASK, GREEN, ASK], completion="It is blue."),
    ),
    "text prompt, chat completion": (
        {"prompt": ASK["content"], "completion": [BLUE]},
        replace(ASKED, completion="It is blue."),
    ),
    "preference, standard": (
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        Example("", [{"role": "user", "content": "The sky is"}], chosen=" blue.", rejected=" green.", is_text=True),
    ),
    "preference, text prompt and chat answers": (
        {"prompt": ASK["content"], "chosen": [BLUE], "rejected": [GREEN]},
        replace(ASKED, chosen="It is blue.", rejected="It is green."),
    ),
    "preference, conversational": (
        {"prompt": [ASK], "chosen": [BLUE], "rejected": [GREEN]},
        replace(ASKED, chosen="It is blue.", rejected="It is green."),
    ),
    "implicit prompt, standard": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        Example("", [{"role": "user", "content": "The sky is"}], chosen=" blue.", rejected=" green.", is_text=True),
    ),
    "implicit prompt, conversational": (
        {"chosen": [BRIEF, ASK, BLUE], "rejected": [BRIEF, ASK, GREEN]},
        replace(ASKED, messages=[BRIEF, ASK], chosen="It is blue.", rejected="It is green."),
    ),
    "implicit prompt, the same answer twice": (
        {"chosen": [ASK, BLUE], "rejected": [ASK, BLUE]},
        replace(ASKED, chosen="It is blue.", rejected="It is blue."),
    ),
    "implicit prompt, told once more as a text": (
        {"prompt": ASK["content"], "chosen": [ASK, BLUE], "rejected": [ASK, GREEN]},
        replace(ASKED, chosen="It is blue.", rejected="It is green."),
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("form", FORMS)
def test_each_format_of_trl(tmp_path, form, writer):
    row, expected = FORMS[form]
    (found,) = _load(tmp_path, {**row, "level": 3}, write=WRITERS[writer])
    assert found == replace(expected, id="rows:1", columns={"level": 3})


@pytest.fixture(autouse=True)
def _no_progress_bars(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


STANDARD = st.text("ab ", max_size=8)


@pytest.mark.slow
@given(STANDARD, STANDARD, STANDARD)
def test_implicit_prompts_are_those_of_trl(prompt, chosen, rejected):
    from trl.data_utils import extract_prompt

    row = {"chosen": prompt + chosen, "rejected": prompt + rejected}
    with TemporaryDirectory() as folder:
        _write(Path(folder) / "rows", row)
        try:
            (found,) = load_dataset_rows(Path(folder) / "rows")
        except DataError:  # no common beginning, or nothing behind it: TRL gives an empty prompt or answer, or cuts one
            return
    told = {"prompt": found.messages[0]["content"], "chosen": found.chosen, "rejected": found.rejected}
    assert told == extract_prompt(row)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "chosen": "b"}, "'chosen' needs 'rejected' beside it"),
        ({"rejected": "b"}, "'rejected' needs 'chosen' beside it"),
        ({"chosen": "a", "rejected": "b"}, "must begin with the same text"),
        ({"chosen": "a", "rejected": [BLUE]}, "must both be texts or both be lists"),
        ({"chosen": [ASK, BLUE], "rejected": [BRIEF, ASK, GREEN]}, "must begin with the same messages"),
        ({"chosen": [ASK, BLUE, ASK, BLUE], "rejected": [ASK, GREEN]}, "'chosen' must be one message .*, not 3"),
        ({"chosen": [ASK, BLUE], "rejected": [ASK, ASK]}, "last message of 'rejected' must be the assistant's"),
        ({"prompt": [ASK], "completion": [ASK]}, "last message of 'completion' must be the assistant's, not the user"),
        ({"prompt": [ASK], "completion": [BLUE, BLUE]}, "last message must be the user's, not the assistant's"),
        ({"prompt": [ASK], "completion": " "}, "'completion' must be a text that is not empty"),
        ({"prompt": [ASK], "completion": 4}, "'completion' must be a text or a list of messages, not a number"),
        ({"prompt": [ASK], "completion": [4]}, r"completion\[0\] must be an object"),
        ({"prompt": [], "gold": 1}, "'prompt' must be a list that is not empty"),
        ({"messages": [BLUE]}, "last message must be the user's, not the assistant's"),
        ({"messages": [BRIEF, BLUE]}, "last message must be the user's, not the system's"),
        ({"text": "a"}, "name the text to answer 'prompt', not 'text'"),
    ],
)
def test_faults_of_prompts_and_answers(tmp_path, row, what):
    with pytest.raises(DataError, match=what) as caught:
        _load(tmp_path, {"prompt": "fine"}, row)
    assert len(caught.value.faults) == 1 and caught.value.faults[0].startswith(f"{tmp_path}/rows:2: ")


def test_columns_go_to_reward_functions(tmp_path):
    row = {"messages": [ASK], "gold": 1, "golds": 2, "prompt_id": "x", "tools": None, "difficulty": 3, "template": "t"}
    (found,) = _load(tmp_path, {**row, "id": 7})
    assert found.reward_columns() == {
        "gold": 1,
        "schema": None,
        "id": "7",
        "template": "t",
        "golds": 2,
        "prompt_id": "x",
        "tools": None,
        "difficulty": 3,
    }
    assert found.difficulty is None


@pytest.mark.parametrize(
    ("task", "row", "gold", "what"),
    [
        ("extract", {"gold": "x"}, "x", None),
        ("extract", {"completion": '{"a": [1]}'}, {"a": [1]}, None),
        ("extract", {"completion": '{"a": [1]} Done.'}, None, "'gold' is missing"),
        ("extract", {"completion": '{"a": NaN}'}, None, "'gold' is missing"),
        ("extract", {"completion": "7"}, None, "'gold' is missing"),
        ("sft", {"gold": 1}, None, "'completion' is missing"),
        ("sft", {"completion": "x"}, None, None),
        ("preference", {"completion": "x"}, None, "'chosen' and 'rejected' are missing"),
        ("sql", {"gold": "SELECT 1"}, None, "'databases' is missing"),
        ("sql", {"databases": "one.db"}, None, "'gold' is missing"),
        ("sql", {"databases": "one.db", "gold": " "}, None, "'gold' must be a SQL query, not an empty string"),
        ("sql", {"databases": "one.db", "gold": {}}, None, "'gold' must be a SQL query, not an object"),
        ("sql", {"databases": "one.db", "completion": "SELECT 1"}, "SELECT 1", None),
    ],
)
def test_each_task_asks_for_its_fields(tmp_path, task, row, gold, what):
    (tmp_path / "one.db").touch()
    if what is None:
        assert _load(tmp_path, {"prompt": "a", **row}, task=task)[0].gold == gold
    else:
        with pytest.raises(DataError, match=f"rows:1: {what}"):
            _load(tmp_path, {"prompt": "a", **row}, task=task)


def test_databases_are_found_from_the_folder_of_the_file_also_after_a_move(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    (folder / "databases").mkdir(parents=True)
    paths = [folder / "databases" / "1.sqlite", folder / "2.sqlite", tmp_path / "far.sqlite"]
    for path in paths:
        sqlite3.connect(path).execute("CREATE TABLE t (a)").connection.close()
    rows = [Example("1", [ASK], "SELECT 1", columns={"databases": tuple(map(str, paths))})]
    save_jsonl(folder / "rows.jsonl", rows)
    assert load_dataset_rows(folder / "rows.jsonl") == rows
    folder.rename(tmp_path / "there")
    monkeypatch.chdir(tmp_path)  # other processes may have other working folders: paths are absolute
    (found,) = load_dataset_rows("there/rows.jsonl", "sql")
    there = tmp_path / "there"
    assert found.columns["databases"] == (
        str(there / "databases" / "1.sqlite"),
        str(there / "2.sqlite"),
        str(tmp_path / "far.sqlite"),
    )


def test_databases_of_a_folder_start_at_the_folder(tmp_path):
    import datasets

    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "one.sqlite").touch()
    rows = [{"prompt": "a", "gold": "SELECT 1", "databases": ["one.sqlite"]}]
    _write(tmp_path / "set" / "data" / "train.jsonl", *rows)
    datasets.DatasetDict(test=datasets.Dataset.from_list(rows)).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "one.sqlite").touch()
    for name in ("set", "saved", "saved/test"):
        (found,) = load_dataset_rows(tmp_path / name, "sql")
        assert found.columns["databases"] == (str(tmp_path / name.split("/")[0] / "one.sqlite"),)


def test_json_in_tables(tmp_path):
    """Structs lose the keys that only other rows have; texts that are JSON objects or lists are parsed."""
    structs = [{"prompt": "a", "gold": {"x": 1}}, {"prompt": "b", "gold": {"y": [{"z": 2}]}}]
    _from_list(tmp_path / "structs", *structs, save=lambda dataset, path: dataset.to_parquet(path))
    assert [row.gold for row in load_dataset_rows(tmp_path / "structs")] == [{"x": 1}, {"y": [{"z": 2}]}]
    texts = [{"prompt": "a", "gold": '{"x": null}', "schema": '{"type": "object"}'}, {"prompt": "b", "gold": "SELECT"}]
    _from_list(tmp_path / "texts", *texts, save=lambda dataset, path: dataset.to_parquet(path))
    first, second = load_dataset_rows(tmp_path / "texts")
    assert first.gold == {"x": None} and first.schema == {"type": "object"} and second.gold == "SELECT"
    parts = pa.array([['{"x": null}', "1"]], pa.list_(pa.string())).cast(pa.list_(pa.json_()))
    pairs = pa.StructArray.from_arrays([parts, pa.array(["y"])], ["some", "other"])
    pq.write_table(pa.table({"prompt": ["a"], "parts": parts, "pairs": pairs}), tmp_path / "nested")
    assert load_dataset_rows(tmp_path / "nested")[0].columns == {
        "parts": [{"x": None}, 1],
        "pairs": {"some": [{"x": None}, 1], "other": "y"},
    }
    import datetime

    odd = {"prompt": "a", "gold": datetime.date(2024, 1, 2)}
    _from_list(tmp_path / "odd", odd, save=lambda dataset, path: dataset.to_parquet(path))
    with pytest.raises(DataError, match="odd:1: 'gold' has a value of type date, which is not JSON"):
        load_dataset_rows(tmp_path / "odd")


def test_splits_of_folders(tmp_path):
    import datasets

    one, two = {"prompt": "one"}, {"prompt": "two"}
    _parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", [two])
    for part in range(2):
        _parquet(tmp_path / "hub" / "data" / f"train-0000{part}-of-00002.parquet", [one])
    both = datasets.DatasetDict(train=datasets.Dataset.from_list([one]), test=datasets.Dataset.from_list([two]))
    both.save_to_disk(str(tmp_path / "saved"))
    for name in ("hub", "saved"):
        (found,) = load_dataset_rows(tmp_path / name / "test")
        assert found.messages[0]["content"] == "two"
        with pytest.raises(DataError, match=f"has 2 splits; name one as folder/split: .*{name}/train"):
            load_dataset_rows(tmp_path / name)
        with pytest.raises(DataError, match="no split 'valid'"):
            load_dataset_rows(tmp_path / name / "valid")
    ids = [row.id for row in load_dataset_rows(tmp_path / "hub" / "train")]
    assert ids == ["data/train-00000-of-00002.parquet:1", "data/train-00001-of-00002.parquet:1"]


def test_faults_of_tables_and_folders_name_file_and_row(tmp_path, monkeypatch):
    monkeypatch.setattr(formats_arrow, "BATCH_ROWS", 1)  # rows are counted over batches
    bad = [{"prompt": "a"}, {"prompt": None}, {"prompt": "b"}]
    for name, writer in WRITERS.items():
        writer(tmp_path / name, *bad)
        with pytest.raises(DataError, match="either 'prompt' or 'messages'") as caught:
            load_dataset_rows(tmp_path / name)
        assert [fault.split(": ")[0] for fault in caught.value.faults] == [f"{tmp_path / name}:2"]
    _write(tmp_path / "hub" / "train.jsonl", {"prompt": "a", "id": "x"}, {})
    _write(tmp_path / "hub" / "train_2.jsonl", {"prompt": "b", "id": "x"})
    with pytest.raises(DataError) as caught:
        load_dataset_rows(tmp_path / "hub")
    assert [fault.split(": ")[0] for fault in caught.value.faults] == [
        f"{tmp_path}/hub/train.jsonl:2",
        f"{tmp_path}/hub/train_2.jsonl:1",
    ]
    assert caught.value.faults[1].endswith(f"id 'x' is that of {tmp_path}/hub/train.jsonl:1 already")


def test_what_cannot_be_read_is_told(tmp_path):
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match="data file '.*cut.parquet' cannot be read"):
        load_dataset_rows(tmp_path / "cut.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="dataset folder '.*empty' cannot be read"):
        load_dataset_rows(tmp_path / "empty")
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "train.csv").write_text("prompt\na\n")
    with pytest.raises(DataError, match="train.csv' has none of the formats .jsonl"):
        load_dataset_rows(tmp_path / "csv")
    _from_list(tmp_path / "saved", {"prompt": "a"}, save=lambda dataset, path: dataset.save_to_disk(path))
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="dataset folder '.*saved' cannot be read"):
        load_dataset_rows(tmp_path / "saved")
    with pytest.raises(DataError, match="no data file '.*none'"):
        load_dataset_rows(tmp_path / "none")


def test_the_rows_of_the_documentation(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    blocks = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "databases").mkdir()
    for number in (1, 2):
        (tmp_path / "databases" / f"staff_{number}.sqlite").touch()
    for block, task in zip(blocks, (None, "sft", "preference", "extract"), strict=True):
        (tmp_path / "rows").write_text(block)
        assert len(load_dataset_rows(tmp_path / "rows", task)) == block.count("\n")
