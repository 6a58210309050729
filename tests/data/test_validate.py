import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_ray.data.example import Example
from ember_ray.data.extraction import generate_examples
from ember_ray.data.findings import MAX_SHOWN, Survey
from ember_ray.data.formats_row import Row
from ember_ray.data.jsonl import save_jsonl
from ember_ray.data.validate import main


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _write(name: str, *rows: dict) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def _row(prompt: str, gold: object = 1, **more) -> dict:
    return {"prompt": prompt, "gold": gold, **more}


def _manifest(path: str = "data_manifest.json") -> dict:
    return json.loads(Path(path).read_text())


def test_good_data_have_no_faults(capsys):
    save_jsonl("train.jsonl", generate_examples("train", "hard", 200, 0))
    save_jsonl("eval.jsonl", generate_examples("test", "hard", 50, 0))
    assert main(["train.jsonl", "eval.jsonl", "--task", "extract", "--manifest", "out/m.json"]) == 0
    told = capsys.readouterr().out
    assert "train: train.jsonl, 200 rows, 200 usable" in told and "no faults; manifest in out/m.json" in told
    assert "prompt-only, conversational: 200" in told and "FAULT" not in told
    found = _manifest("out/m.json")
    assert found["faults"] == 0 and [found["datasets"][name]["rows"] for name in ("train", "eval")] == [200, 50]
    (entry,) = found["datasets"]["train"]["files"]
    content = Path("train.jsonl").read_bytes()
    assert entry == {
        "path": "train.jsonl",
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "rows": 200,
    }
    before = Path("out/m.json").read_bytes()
    assert main(["train.jsonl", "eval.jsonl", "--task", "extract", "--manifest", "out/m.json"]) == 0
    assert Path("out/m.json").read_bytes() == before


CASES = {
    "rows that cannot be used": (
        [_row("a"), {"promt": "b", "gold": 1}, {"prompt": 4, "gold": 1}],
        [":2: unknown key 'promt'; did you mean 'prompt'?", ":3: 'prompt' must be a text that is not empty"],
    ),
    "missing fields": ([_row("a"), {"prompt": "b"}, _row("c")], [":2: 'gold' is missing"]),
    "type mismatches": (
        [_row("a", level=1), _row("b", level="1"), _row("c", level=None), _row("d", level=2.5)],
        ["column 'level' is number in 2 rows, but text in row 2"],
    ),
    "duplicates, same prompt and same answer": (
        [_row("a", [1, {"b": 2, "c": 3}]), _row("b"), _row("a", [1, {"c": 3, "b": 2}])],
        [":3 is as train.jsonl:1"],
    ),
    "duplicates, same prompt and another answer": (
        [_row("a", 1), _row("b"), {"messages": [{"role": "user", "content": "a"}], "gold": 2}],
        [":3 has the prompt of train.jsonl:1"],
    ),
    "answers without a preference": (
        [{"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "b", "chosen": "x", "rejected": "x"}],
        [":2: 'chosen' and 'rejected' are the same"],
    ),
}


@pytest.mark.parametrize("title", CASES)
def test_each_fault_is_told_with_its_row(title, capsys):
    rows, places = CASES[title]
    assert main([_write("train.jsonl", *rows)]) == 2
    told = capsys.readouterr().out
    assert f"FAULT: {title}: {len(places)}\n" in told and told.count("FAULT") == 1
    assert f"{len(places)} fault{'s' if len(places) > 1 else ''}; manifest" in told
    for place in places:
        assert f"    {place if place.startswith('column') else 'train.jsonl' + place}" in told
    assert _manifest()["faults"] == len(places)
    assert _manifest()["datasets"]["train"]["findings"][title] == len(places)


def test_overlap_is_found_between_formats_and_with_other_answers(capsys):
    import datasets

    save_jsonl("train.jsonl", [Example(str(n), [{"role": "user", "content": f"{n}"}], n) for n in range(10)])
    rows = [_row("x"), _row("7", 0), _row("y")]
    datasets.DatasetDict(test=datasets.Dataset.from_list(rows)).save_to_disk("held_out")
    assert main(["train.jsonl", "held_out"]) == 2
    told = capsys.readouterr().out
    assert "FAULT: overlap, prompts that are training prompts too: 1\n    held_out/test:2 has the prompt of" in told
    assert "has the prompt of train.jsonl:8\n" in told and "1 fault; manifest" in told
    entry = _manifest()["datasets"]["eval"]
    assert (entry["kind"], entry["path"], entry["rows"]) == ("saved", "held_out/test", 3)
    shard = entry["files"][0]
    assert shard["path"] == "held_out/test/data-00000-of-00001.arrow" and shard["rows"] == 3
    assert shard["sha256"] == hashlib.sha256(Path(shard["path"]).read_bytes()).hexdigest()
    assert [Path(file["path"]).name for file in entry["files"][1:]] == ["dataset_info.json", "state.json"]


def test_several_answers_to_a_prompt_are_no_fault_where_they_are_the_data(capsys):
    rows = [{"prompt": "a", "completion": "x"}, {"prompt": "a", "completion": "y"}]
    assert main([_write("train.jsonl", *rows), "--task", "sft"]) == 0
    assert "note: prompts with several answers: 1\n    train.jsonl:2 has the prompt of" in capsys.readouterr().out


def test_tasks_are_guessed_or_asked_for(capsys):
    Path("one.sqlite").touch()
    rows = {
        "preference": {"prompt": "a", "chosen": "x", "rejected": "y"},
        "sql": _row("a", "SELECT 1", databases="one.sqlite"),
        "extract": _row("a"),
        "sft": {"prompt": "a", "completion": "x"},
        "none, prompts only": {"prompt": "a"},
    }
    for task, row in rows.items():
        assert main([_write("train.jsonl", row)]) == 0
        assert f"task: {task}, guessed from the first row" in capsys.readouterr().out
    assert main([_write("train.jsonl", rows["sft"]), "--task", "sql"]) == 2
    assert "train.jsonl:1: 'databases' is missing" in capsys.readouterr().out


def test_databases_are_in_the_manifest():
    Path("one.sqlite").write_bytes(b"one")
    assert main([_write("train.jsonl", _row("a", "SELECT 1", databases=["one.sqlite"]))]) == 0
    assert _manifest()["datasets"]["train"]["databases"] == [
        {"path": f"{Path.cwd()}/one.sqlite", "sha256": hashlib.sha256(b"one").hexdigest(), "bytes": 3}
    ]


def test_files_of_a_folder_are_counted_each(capsys):
    Path("set").mkdir()
    _write("set/train_1.jsonl", _row("a"), _row("b"))
    _write("set/train_2.jsonl", _row("c"), _row("a", level="x"), _row("d", level=3))
    assert main(["set"]) == 2
    assert [(entry["path"], entry["rows"]) for entry in _manifest()["datasets"]["train"]["files"]] == [
        ("set/train_1.jsonl", 2),
        ("set/train_2.jsonl", 3),
    ]
    told = capsys.readouterr().out
    assert "set/train_2.jsonl:2 is as set/train_1.jsonl:1" in told
    assert "number in row set/train_2.jsonl:3" in told


def test_long_lists_are_cut_and_counted(capsys):
    assert main([_write("train.jsonl", *[_row("a")] * 101)]) == 2
    told = capsys.readouterr().out
    assert told.count(" is as train.jsonl:1\n") == MAX_SHOWN and "    and 80 more\n" in told and "100 faults" in told


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["none.jsonl"], "no data file 'none.jsonl'"),
        (["empty.jsonl"], "empty.jsonl: the file has no rows"),
        (["good.jsonl", "--manifest", "good.jsonl/m.json"], "cannot write 'good.jsonl/m.json'"),
    ],
)
def test_what_stops_the_command_is_told_in_a_line(arguments, what, capsys):
    Path("empty.jsonl").touch()
    _write("good.jsonl", _row("a"))
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {what}") and told.count("\n") == 1
    assert not Path("data_manifest.json").exists()


def test_as_a_command():
    _write("train.jsonl", _row("a", level="\ud800"), _row("a"))
    command = [sys.executable, "-m", "ember_ray.data.validate", "train.jsonl"]
    root = str(Path(__file__).parents[2])
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": root, "LC_ALL": "C"})
    assert done.returncode == 2 and "train.jsonl:2 is as train.jsonl:1" in done.stdout and not done.stderr


PROMPTS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([1, 2, "1", None])), max_size=12)


@settings(max_examples=200)
@given(PROMPTS, PROMPTS)
def test_counts_are_those_of_a_comparison_of_all_pairs(train, held_out):
    surveys: list[Survey] = []
    for rows in (train, held_out):
        surveys.append(Survey("data", None, seen=surveys[0] if surveys else None))
        for number, (prompt, gold) in enumerate(rows, start=1):
            example = Example(str(number), [{"role": "user", "content": prompt}], gold)
            surveys[-1].add(Row("f", number, str(number), {"prompt": prompt, "gold": gold}, example=example))
    found = {one.title: one.count for one in surveys[1].findings()}
    same = sum(row in held_out[:place] for place, row in enumerate(held_out))
    prompts = [prompt for prompt, _ in held_out]
    again = sum(prompt in prompts[:place] for place, prompt in enumerate(prompts))
    assert found.get("duplicates, same prompt and same answer", 0) == same
    assert found.get("duplicates, same prompt and another answer", 0) == again - same
    overlap = sum(prompt in {other for other, _ in train} for prompt in prompts)
    assert found.get("overlap, prompts that are training prompts too", 0) == overlap
