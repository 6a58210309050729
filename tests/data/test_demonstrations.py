import json
import random
from dataclasses import replace

import pytest

from ember_ray.data.demonstrations import CLEAN, EXTRA_FIELDS, DemonstrationMix, demonstrate, with_demonstrations
from ember_ray.data.example import Example
from ember_ray.data.extraction import DIFFICULTIES, generate_examples
from ember_ray.data.values import DATE_FORMS, write_date
from verifiers.json_extraction import verify

GOLD = {"vendor": "Acme Tools", "date": "2024-03-05", "total": 120.5}
ROW = Example("1", [{"role": "user", "content": "Acme Tools, 5 March 2024, $120.5"}], GOLD)


def _answer(seed: int = 0, **mix: float) -> str:
    return demonstrate(ROW, random.Random(seed), DemonstrationMix(**mix))


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_clean_demonstrations_are_the_gold_answer(difficulty):
    for example in generate_examples("train", difficulty, 50, 0):
        assert demonstrate(example, random.Random(0), CLEAN) == json.dumps(example.gold)


def test_each_fault_is_what_its_name_says():
    assert json.loads(_answer(raw_date=1)) == {**GOLD, "date": "5 March 2024"}
    assert json.loads(_answer(text_number=1)) == {**GOLD, "total": "$120.5"}
    for seed in range(20):
        assert len(json.loads(_answer(seed, dropped_field=1))) == 2
        renamed = json.loads(_answer(seed, wrong_key=1))
        assert list(renamed.values()) == list(GOLD.values()) and len(set(renamed) & set(GOLD)) == 2
        extra = json.loads(_answer(seed, extra_field=1))
        assert set(extra.items()) - set(GOLD.items()) <= set(EXTRA_FIELDS) and len(extra) == 4
        with pytest.raises(json.JSONDecodeError):
            json.loads(_answer(seed, broken_json=1))
        chatter = _answer(seed, chatter=1)
        assert json.dumps(GOLD) in chatter and chatter != json.dumps(GOLD)


@pytest.mark.parametrize("form", DATE_FORMS)
def test_a_raw_date_is_as_the_document_writes_it(form):
    from datetime import date

    written = write_date(date(2024, 3, 5), form)
    row = Example("1", [{"role": "user", "content": f"It was {written}."}], {"day": "2024-03-05"})
    assert json.loads(demonstrate(row, random.Random(0), DemonstrationMix(raw_date=1.0))) == {"day": written}


def test_every_fault_but_chatter_costs_the_exact_match():
    for name in ("raw_date", "wrong_key", "dropped_field", "text_number", "extra_field", "broken_json", "chatter"):
        verdict = verify(_answer(**{name: 1.0}), GOLD, {"properties": {"date": {"format": "date"}}})
        assert verdict.components["exact_match"] == (1.0 if name == "chatter" else 0.0), name
        assert verdict.components["clean"] == 0.0 or name != "chatter"


def test_faults_come_in_the_shares_asked_for_and_independently():
    mix = DemonstrationMix(wrong_key=0.2, extra_field=0.1, chatter=0.3)
    examples = generate_examples("train", "easy", 4000, 0)
    rng = random.Random(0)
    answers = [demonstrate(example, rng, mix) for example in examples]
    renamed, extra, chatty, clean = 0, 0, 0, 0
    for text, example in zip(answers, examples, strict=True):
        answer = json.loads(text[text.index("{") : text.rindex("}") + 1])
        renamed += not set(example.gold) <= set(answer)
        extra += len(answer) > len(example.gold)
        chatty += not (text.startswith("{") and text.endswith("}"))
        clean += text == json.dumps(example.gold)
    assert abs(renamed / 4000 - 0.2) < 0.03
    assert abs(extra / 4000 - 0.1) < 0.02
    assert abs(chatty / 4000 - 0.3) < 0.03
    assert mix.clean_share() == pytest.approx(0.8 * 0.9 * 0.7)
    assert abs(clean / 4000 - mix.clean_share()) < 0.03


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_all_faults_at_once_on_nested_answers(difficulty):
    everything = DemonstrationMix(*[1.0] * 7)
    for example in generate_examples("train", difficulty, 100, 1):
        gold = json.dumps(example.gold)
        assert demonstrate(example, random.Random(2), everything) != gold
        assert json.dumps(example.gold) == gold, "the example itself is left alone"


def test_a_fault_without_room_leaves_the_answer():
    row = Example("1", [{"role": "user", "content": "List nothing."}], [])
    assert (
        demonstrate(
            row,
            random.Random(0),
            DemonstrationMix(raw_date=1, wrong_key=1, dropped_field=1, text_number=1, extra_field=1),
        )
        == "[]"
    )


def test_shares_out_of_range_are_refused():
    with pytest.raises(ValueError, match="wrong_key must be between 0 and 1, not 1.5"):
        DemonstrationMix(wrong_key=1.5)


def test_each_row_gets_its_own_demonstration_wherever_it_stands():
    mix = DemonstrationMix(wrong_key=0.5, chatter=0.5)
    examples = generate_examples("train", "hard", 60, 0)
    filled = with_demonstrations(examples, mix, 3)
    assert [replace(row, completion=None) for row in filled] == examples
    assert with_demonstrations(examples[::-1], mix, 3) == filled[::-1]
    answers = [row.completion for row in filled]
    assert answers != [row.completion for row in with_demonstrations(examples, mix, 4)]
    clean = [row.completion for row in with_demonstrations(examples)]
    assert clean == [json.dumps(row.gold) for row in examples]
    assert 5 < sum(one == other for one, other in zip(answers, clean, strict=True)) < 30


def test_a_rows_own_demonstration_stays_and_one_without_gold_needs_one():
    own = replace(ROW, gold=None, completion="mine")
    assert with_demonstrations([own], DemonstrationMix(chatter=1.0), 0) == [own]
    with pytest.raises(ValueError, match="row '1' has neither 'completion' nor 'gold'"):
        with_demonstrations([replace(ROW, gold=None)])
