"""Rows as tokens, the same for rollouts and for every learner."""

from __future__ import annotations

from ember_ray.data.example import Example
from ember_ray.model.tokenizer import Tokenizer


def prompt_tokens(tokenizer: Tokenizer, example: Example, chat_template: bool = True) -> tuple[int, ...]:
    """Token ids after which the answer begins.

    Args:
        chat_template: whether a prompt that was given as text becomes the user's turn of a chat; without it the text
            is taken as it is (TRL's standard format). Chats always go through the template.

    Raises:
        ModelError: a chat, and the tokenizer has no template.
    """
    if _is_raw(example, chat_template):
        return tuple(tokenizer.encode(example.messages[0]["content"]))
    return tuple(tokenizer.encode_chat(example.messages))


def completion_tokens(
    tokenizer: Tokenizer, example: Example, answer: str, chat_template: bool = True
) -> tuple[int, ...]:
    """Token ids of an answer to the row, to stand behind :func:`prompt_tokens`; the last one ends the turn.

    In a chat they are what the template writes behind the generation prompt, up to the special token that ends the
    turn; a raw text ends with the tokenizer's EOS token. The answer is encoded apart from the prompt, as the engine
    generates it, so no token reaches over the border of the two.

    Raises:
        ModelError: a chat, and the tokenizer has no template or one that cannot be cut at the answer; no EOS token.
    """
    if _is_raw(example, chat_template):
        return (*tokenizer.encode(answer), tokenizer.eos_token_id)
    tokens = tokenizer.encode(tokenizer.render_answer(example.messages, answer))
    end = next((place for place in range(len(tokens), 0, -1) if tokens[place - 1] in tokenizer.special_ids), 0)
    if end and not tokenizer.decode(tokens[end:]).strip():  # templates write a line break behind the turn
        return tuple(tokens[:end])
    return (*tokens, tokenizer.eos_token_id)


def _is_raw(example: Example, chat_template: bool) -> bool:
    return example.is_text and not chat_template
