"""Where answers end, on the byte tokenizer: every letter beyond ASCII spans tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.engine.sequence import FINISH_REASONS, PromptGroup, Sequence
from ember_ray.engine.stop_check import StopCheck
from ember_ray.model.tokenizer import Tokenizer
from tests.support.qwen3 import EOS, PAD, save_byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return Tokenizer(folder)


def feed(tokenizer: Tokenizer, token_ids: list[int], params: SamplingParams) -> tuple[str | None, str, int]:
    """Feeds tokens until one ends the answer; gives the reason, the text and the number of tokens."""
    check = StopCheck(tokenizer, (EOS,))
    group = PromptGroup((5,), 0, 16, 0, False)
    sequence = Sequence(group, 0, "r", 0, 0, params, 0, params.max_tokens)
    for token in token_ids:
        _, sequence.finish_code = check.end(sequence, [token])
        sequence.token_ids.append(token)
        if sequence.finish_code:
            break
    # all at once come to the same end
    together = Sequence(group, 0, "r", 0, 0, params, 0, params.max_tokens)
    assert check.end(together, token_ids) == (len(sequence.token_ids), sequence.finish_code)
    return FINISH_REASONS[sequence.finish_code], check.text(sequence), len(sequence.token_ids)


ALPHABET = st.sampled_from("ab é漢🙂")


@given(
    pieces=st.lists(ALPHABET | st.just("<pad>"), max_size=40), stops=st.lists(st.text(ALPHABET, min_size=1), max_size=3)
)
def test_a_stop_string_ends_the_answer_with_the_token_that_completes_it(
    tokenizer: Tokenizer, pieces: list[str], stops: list[str]
) -> None:
    token_ids = [PAD if piece == "<pad>" else token for piece in pieces for token in tokenizer.encode(piece)]
    reason, text, count = feed(tokenizer, token_ids, SamplingParams(max_tokens=1000, stop=tuple(stops)))
    whole = "".join(piece for piece in pieces if piece != "<pad>")
    found = [whole.find(stop) for stop in stops if stop in whole]
    if not found:
        assert reason is None and text == whole and count == len(token_ids)
        return
    # the first match to be complete ends it; what the text loses begins at the first match in it
    end = min(whole.find(stop) + len(stop) for stop in stops if stop in whole)
    made = whole[:end]
    assert reason == "stop_sequence"
    assert text == made[: min(made.find(stop) for stop in stops if stop in made)]
    assert tokenizer.decode(token_ids[:count]) == made


def test_special_tokens_between_the_letters_of_a_stop_string_do_not_hide_it(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert feed(tokenizer, [b, a, *[PAD] * 50, b], SamplingParams(max_tokens=100, stop=("ab",))) == (
        "stop_sequence", "b", 53
    )  # fmt: skip


def test_what_wins_where_several_ends_meet(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    assert feed(tokenizer, [a, b], SamplingParams(max_tokens=2, stop=("ab",), stop_token_ids=(b,)))[:2] == ("stop", "a")
    assert feed(tokenizer, [a, b], SamplingParams(max_tokens=2, stop=("ab",)))[:2] == ("stop_sequence", "")
    assert feed(tokenizer, [a, b], SamplingParams(max_tokens=2))[:2] == ("length", "ab")
    assert feed(tokenizer, [a, EOS], SamplingParams(max_tokens=5))[:2] == ("stop", "a")
    assert feed(tokenizer, [a, EOS], SamplingParams(max_tokens=5, ignore_eos=True))[:2] == (None, "a")
