"""Prompt and answers of a row in any of TRL's dataset formats, standard (texts) and conversational (messages).

The formats are those of https://huggingface.co/docs/trl/dataset_formats: prompt-only, prompt-completion, preference
with explicit or implicit prompt, and conversations (``messages``), whose last turn is the answer if it is the
assistant's.
"""

from __future__ import annotations

from dataclasses import dataclass
from os.path import commonprefix

from ember_ray.data.faults import kind_of

ROLES = ("system", "user", "assistant")
ANSWERS = ("completion", "chosen", "rejected")

Chat = list[dict[str, str]]


@dataclass
class Turns:
    """The part of a row that a language model reads and writes; fields as in ``Example``.

    Attributes:
        form: the TRL format that the row was found in, e.g. ``preference, conversational, implicit prompt``.
    """

    messages: Chat
    is_text: bool
    form: str
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None


def read_turns(row: dict, wrong: list[str]) -> Turns | None:
    """Prompt and answers of a row, whose null values were taken out; None if that fails, ``wrong`` then says why."""
    before = len(wrong)
    if ("chosen" in row) != ("rejected" in row):
        there, missing = ("chosen", "rejected") if "chosen" in row else ("rejected", "chosen")
        wrong.append(f"'{there}' needs '{missing}' beside it")
    if "prompt" in row and "messages" in row:
        wrong.append("a row needs either 'prompt' or 'messages', not both")
    if len(wrong) > before:
        return None
    answers = {name: _read_answer(row[name], name, wrong) for name in ANSWERS if name in row}
    if len(wrong) > before:
        return None
    implicit = "chosen" in row and "messages" not in row and _is_implicit(row)
    turns = _read_implicit(answers, wrong) if implicit else _read_prompt(row, wrong)
    if turns is None or len(wrong) > before:
        return None
    for name, answer in answers.items():
        _add_answer(turns, name, answer, wrong)
    if len(wrong) == before:
        _check_last(turns.messages, wrong)
    turns.is_text = turns.is_text and not any(isinstance(row.get(name), list) for name in ANSWERS)
    turns.form = _form(turns, implicit)
    return turns if len(wrong) == before else None


def _form(turns: Turns, implicit: bool) -> str:
    if turns.chosen is not None:
        kind = "preference"
    else:
        kind = "prompt-only" if turns.completion is None else "prompt-completion"
    style = "standard" if turns.is_text else "conversational"
    return f"{kind}, {style}" + (", implicit prompt" if implicit else "")


def _is_implicit(row: dict) -> bool:
    """Whether the prompt is what ``chosen`` and ``rejected`` begin with.

    Also beside a ``prompt``, where that is a text and the answers are whole chats: it says the same once more.
    """
    if "prompt" not in row:
        return True
    return isinstance(row["prompt"], str) and isinstance(row["chosen"], list) and len(row["chosen"]) > 1


def _read_implicit(answers: dict[str, str | Chat], wrong: list[str]) -> Turns | None:
    """Takes the common beginning out of ``chosen`` and ``rejected``, which change in place, and makes it the prompt.

    The rule is that of TRL's ``extract_prompt``: whole turns of chats; characters of texts, less a space at the end.
    """
    chosen, rejected = answers["chosen"], answers["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = commonprefix([chosen, rejected])
        prompt = prompt[:-1] if prompt.endswith(" ") else prompt
        if not prompt.strip():
            wrong.append("without 'prompt', 'chosen' and 'rejected' must begin with the same text, the prompt")
            return None
        answers["chosen"], answers["rejected"] = chosen[len(prompt) :], rejected[len(prompt) :]
        return Turns([{"role": "user", "content": prompt}], True, "")
    if isinstance(chosen, str) or isinstance(rejected, str):
        wrong.append("'chosen' and 'rejected' must both be texts or both be lists of messages")
        return None
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        wrong.append("without 'prompt', 'chosen' and 'rejected' must begin with the same messages, the prompt")
        return None
    answers["chosen"], answers["rejected"] = chosen[shared:], rejected[shared:]
    return Turns(chosen[:shared], False, "")


def _read_prompt(row: dict, wrong: list[str]) -> Turns | None:
    """The prompt of ``prompt`` or ``messages``; a last turn of the assistant's in ``messages`` is the completion."""
    if "prompt" not in row and "messages" not in row:
        hint = "; name the text to answer 'prompt', not 'text'" if "text" in row else ""
        wrong.append(f"a row needs either 'prompt' or 'messages'{hint}")
        return None
    if isinstance(row.get("prompt"), list):
        messages = _read_chat(row["prompt"], "prompt", wrong)
        return Turns(messages, False, "")
    if "prompt" in row:
        prompt = row["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            wrong.append(f"'prompt' must be a text that is not empty, not {kind_of(prompt)}")
            return None
        return Turns([{"role": "user", "content": prompt}], True, "")
    before = len(wrong)
    messages = _read_chat(row["messages"], "messages", wrong)
    if len(wrong) > before:
        return None
    turns = Turns(messages, False, "")
    if len(messages) > 1 and messages[-1]["role"] == "assistant" and not any(name in row for name in ANSWERS):
        _add_answer(turns, "completion", [turns.messages.pop()], wrong)
    return turns


def _read_answer(value: object, name: str, wrong: list[str]) -> str | Chat:
    """A text, or a checked list of messages."""
    if isinstance(value, list):
        return _read_chat(value, name, wrong)
    if not isinstance(value, str):
        wrong.append(f"'{name}' must be a text or a list of messages, not {kind_of(value)}")
        return ""
    return value


def _add_answer(turns: Turns, name: str, answer: str | Chat, wrong: list[str]) -> None:
    """Sets an answer; turns before the last one of a conversational completion join the prompt."""
    if not isinstance(answer, str):
        if answer[-1]["role"] != "assistant":
            wrong.append(f"the last message of '{name}' must be the assistant's, not the {answer[-1]['role']}'s")
            return
        if name != "completion" and len(answer) > 1:
            wrong.append(
                f"behind the prompt '{name}' must be one message of the assistant's, not {len(answer)} messages"
            )
            return
        turns.messages = [*turns.messages, *answer[:-1]]
        answer = answer[-1]["content"]
    if not answer.strip():
        wrong.append(f"'{name}' must be a text that is not empty")
    setattr(turns, name, answer)


def _check_last(messages: Chat, wrong: list[str]) -> None:
    if messages[-1]["role"] != "user":
        wrong.append(f"the last message must be the user's, not the {messages[-1]['role']}'s")


def _read_chat(value: object, name: str, wrong: list[str]) -> Chat:
    """A list of messages, keys without a value left out; what is wrong with it goes to ``wrong``."""
    if not isinstance(value, list) or not value:
        wrong.append(f"'{name}' must be a list that is not empty, not {kind_of(value)}")
        return []
    messages: Chat = []
    for place, message in enumerate(value):
        if isinstance(message, dict):  # Arrow has one set of keys for all messages and fills up with nulls
            message = {key: part for key, part in message.items() if part is not None or key in ("role", "content")}
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            wrong.append(f"{name}[{place}] must be an object with 'role' and 'content' only")
        elif message["role"] not in ROLES:
            wrong.append(f"{name}[{place}].role must be one of {', '.join(ROLES)}")
        elif not isinstance(message["content"], str):
            wrong.append(f"{name}[{place}].content must be a string, not {kind_of(message['content'])}")
        messages.append(message)
    return messages
