import hashlib
import json
import re

import jsonschema
import pytest

from ember_ray.data.easy_documents import KINDS
from ember_ray.data.extraction import DIFFICULTIES, generate_examples
from ember_ray.data.rule_documents import apply_rule
from ember_ray.data.splits import SPLITS, split_of
from ember_ray.data.values import DATE_FORMS
from verifiers.json_extraction import check_gold, verify

DIGESTS = {"easy": "1e4ef96622e13013", "hard": "7688daa098466e9b", "hard_rule": "d05dfcb871618eed"}
KIND_NAMES = {"invoice", "order", "event", "person"}


GENERATED = ("id", "messages", "gold", "schema", "template", "difficulty")


def _digest(examples) -> str:
    rows = [{name: getattr(example, name) for name in GENERATED} for example in examples]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_same_seed_same_examples_and_a_longer_call_begins_with_them(difficulty):
    first = generate_examples("train", difficulty, 40, 7)
    assert first == generate_examples("train", difficulty, 60, 7)[:40]
    assert first != generate_examples("train", difficulty, 40, 8)
    assert len({example.id for example in first}) == 40


def test_examples_are_those_that_the_shipped_model_was_trained_on():
    """Golden digests: other machines, other hash seeds and later versions make the same documents."""
    made = {name: _digest(generate_examples("train", name, 50, 0)) for name in DIFFICULTIES}
    assert made == DIGESTS


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_splits_share_no_document_and_no_subject(difficulty):
    documents, subjects = {}, {}
    for split in SPLITS:
        examples = [e for seed in (0, 1) for e in generate_examples(split, difficulty, 600, seed)]
        documents[split] = {example.messages[-1]["content"] for example in examples}
        subjects[split] = {_subject(example) for example in examples}
        assert len(subjects[split]) > 100
    for one in SPLITS:
        for other in SPLITS:
            if one != other:
                assert not documents[one] & documents[other]
                assert not subjects[one] & subjects[other]


def _subject(example) -> tuple:
    """What names the document's subject, read from the gold answer or, with a rule, from the head of the text."""
    kind, gold = example.template.split("/")[0], example.gold
    if isinstance(gold, list):
        head = re.split("[:\n]", example.messages[-1]["content"].split("\n\n")[1])[0]
        return (kind, re.sub(" (of|for) .*", "", head) if kind in ("invoice", "order") else head)
    city = gold.get("city") or gold.get("place", {}).get("city")
    return (kind, *(gold[field] if field != "city" else city for field in KINDS[kind].identity))


def test_splits_are_dealt_eight_to_one_to_one():
    dealt = [split_of(f"order|A{number}") for number in range(5000)]
    assert 0.77 < dealt.count("train") / 5000 < 0.83
    assert 0.08 < dealt.count("validation") / 5000 < 0.12


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_gold_satisfies_its_schema_and_is_an_exact_match(difficulty):
    examples = generate_examples("test", difficulty, 300, 0)
    assert {example.template.split("/")[0] for example in examples} == KIND_NAMES
    for example in examples:
        check_gold(example.gold, example.schema)
        assert verify(json.dumps(example.gold), example.gold, example.schema).components["exact_match"] == 1.0


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_schemas_are_closed_and_know_dates(difficulty):
    by_kind = {e.template.split("/")[0]: e for e in generate_examples("train", difficulty, 100, 0)}
    assert set(by_kind) == KIND_NAMES
    assert '"format": "date"' in json.dumps([example.schema for example in by_kind.values()])
    for example in by_kind.values():
        jsonschema.Draft202012Validator.check_schema(example.schema)
        row = example.schema["items"] if difficulty == "hard_rule" else example.schema
        good = example.gold[0] if difficulty == "hard_rule" else example.gold
        with pytest.raises(jsonschema.ValidationError, match="dditional"):
            jsonschema.validate({**good, "extra": 1}, row)
        required = row["required"][0]
        with pytest.raises(jsonschema.ValidationError, match="required"):
            jsonschema.validate({key: value for key, value in good.items() if key != required}, row)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_prompts_hold_the_values_but_never_the_answer(difficulty):
    for example in generate_examples("train", difficulty, 200, 3):
        prompt = example.messages[-1]["content"]
        assert json.dumps(example.gold) not in prompt and "{" + '"' not in prompt
        for text in _strings(example.gold):
            if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
                assert text in prompt
        assert "{noise}" not in prompt and "[" not in prompt.split("\n\n", 1)[1]


def _strings(value) -> list[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for part in value for text in _strings(part)]
    return [value] if isinstance(value, str) else []


def test_easy_documents_vary():
    examples = generate_examples("train", "easy", 3000, 0)
    assert {e.template for e in examples} == {f"{name}/{t}" for name, kind in KINDS.items() for t in kind.templates}
    text = "\n".join(example.messages[-1]["content"] for example in examples)
    written = (r"\d+ March \d{4}", r"March \d+, \d{4}", r"\d+ Mar \d{4}", r"\d\d\.\d\d\.\d{4}", r"\d{4}-\d\d-\d\d")
    assert len(written) == len(DATE_FORMS) and all(re.search(form, text) for form in written)
    for name, kind in KINDS.items():
        golds = [example.gold for example in examples if example.template.startswith(name)]
        share = sum(kind.optional in gold for gold in golds) / len(golds)
        assert 0.5 < share < 0.7, "the optional field is there in 60 %"
    assert "Printed" in text and "Parking" in text, "distractors"


def test_the_rule_filters_sorts_and_breaks_ties_by_name():
    rows = [{"name": name, "level": level} for name, level in (("C", 3), ("A", 3), ("B", 5), ("D", 1))]
    names = lambda *rule: [row["name"] for row in apply_rule(rows, "level", *rule)]  # noqa: E731
    assert names(2, "level", True, "name", 9) == ["B", "A", "C"]
    assert names(2, "level", False, "name", 9) == ["A", "C", "B"]
    assert names(2, "level", True, "name", 2) == ["B", "A"]
    assert names(6, "level", True, "name", 9) == []


def test_rule_documents_have_ties_and_rows_that_are_left_out():
    examples = generate_examples("train", "hard_rule", 300, 0)
    ties = [
        e
        for e in examples
        if (field := re.search(r"sorted by (\w+)", e.messages[0]["content"])[1])
        and len({str(row[field]) for row in e.gold}) < len(e.gold)
    ]
    assert len(ties) > 60
    assert all(1 <= len(example.gold) <= 4 for example in examples)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown split 'dev'.*validation"):
        generate_examples("dev", "easy", 1, 0)
    with pytest.raises(ValueError, match="unknown difficulty 'medium'.*hard_rule"):
        generate_examples("train", "medium", 1, 0)
    with pytest.raises(ValueError, match="count must be at least 0"):
        generate_examples("train", "easy", -1, 0)
