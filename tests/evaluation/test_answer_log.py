"""Answers on disk: read back as they were, and no longer used once their prompt is another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from ember_ray.config.errors import UserError
from ember_ray.engine.request import Candidate
from ember_ray.evaluation.answer_log import AnswerLog
from ember_ray.evaluation.endpoint import Answered, ChatPrompt

PROMPT = ChatPrompt("a", [{"role": "user", "content": "say a"}])
ANSWERED = Answered("a", [Candidate("a", 0, [], [-0.5, float("-inf")], [], "a\n\ud800", "stop", 0)], 2, 10, None)


def test_answers_are_read_back_and_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path, [PROMPT])
    log.append("sampled", PROMPT, ANSWERED)
    assert path.read_text().endswith("}\n"), "not on disk"
    log.append("greedy", PROMPT, ANSWERED)
    log.close()
    path.write_text(path.read_text() + path.read_text()[:50])
    again = AnswerLog(path, [PROMPT])
    assert again.earlier == {"sampled": [ANSWERED], "greedy": [ANSWERED]}
    assert (again.requests, again.seconds) == (2, log.seconds)
    again.append("greedy", PROMPT, ANSWERED)
    assert again.seconds > log.seconds > 0
    again.close()
    assert AnswerLog(path, [PROMPT]).earlier["greedy"] == [ANSWERED] * 2


def test_answers_to_other_rows_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path, [PROMPT])
    log.append("sampled", PROMPT, ANSWERED)
    log.close()
    kept = path.read_text()
    for other in (ChatPrompt("a", [{"role": "user", "content": "say b"}]), ChatPrompt("b", PROMPT.messages)):
        with pytest.raises(UserError, match="row 'a' is not the one"):
            AnswerLog(path, [other])
    assert path.read_text() == kept
    path.write_text(kept.replace('"retries"', '"tries"'))
    with pytest.raises(UserError, match="was changed .KeyError: 'retries'"):
        AnswerLog(path, [PROMPT])
