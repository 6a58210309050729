"""The tokenizer of a model folder: text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ember_ray.model.qwen3_config import ModelError


class Tokenizer:
    """``tokenizer.json`` for encoding and decoding; transformers is loaded only to render a chat template.

    Attributes:
        special_ids: tokens that :meth:`decode` leaves out.

    Raises:
        ModelError: the folder has no tokenizer.json or it cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        self.folder = Path(folder)
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"model folder '{self.folder}' has no tokenizer.json")
        try:
            self._fast = FastTokenizer.from_file(str(path))
        except Exception as fault:
            raise ModelError(f"'{path}' cannot be read: {fault}") from fault
        added = self._fast.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self._template: Any = None

    def encode(self, text: str) -> list[int]:
        """Token ids of the text as it is, special tokens recognized, none added."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._fast.decode(list(token_ids), skip_special_tokens=True)

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The chat template over the messages, ending where the assistant is to answer.

        Raises:
            ModelError: the tokenizer has no chat template.
        """
        if self._template is None:
            from transformers import AutoTokenizer

            self._template = AutoTokenizer.from_pretrained(self.folder)
        if not self._template.chat_template:
            raise ModelError(f"the tokenizer of '{self.folder}' has no chat template; give prompts as text")
        return self._template.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of :meth:`render_chat`."""
        return self.encode(self.render_chat(messages))
