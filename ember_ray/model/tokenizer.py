"""The tokenizer of a model folder: text to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ember_ray.model.qwen3_config import ModelError


class Tokenizer:
    """``tokenizer.json`` for encoding and decoding; transformers is loaded only for the chat template and its end.

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
        self._loaded: Any = None

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
        return self._with_template().apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    def render_answer(self, messages: Sequence[dict[str, str]], answer: str) -> str:
        """What the chat template writes behind :meth:`render_chat` for the assistant's answer, its end included.

        Raises:
            ModelError: the tokenizer has no chat template, or one that writes the messages otherwise before an answer.
        """
        prompt, turn = self.render_chat(messages), {"role": "assistant", "content": answer}
        whole = self._with_template().apply_chat_template([*messages, turn], tokenize=False)
        if not whole.startswith(prompt):
            raise ModelError(
                f"the chat template of '{self.folder}' writes a prompt otherwise once its answer is there; change the "
                "template so that a chat with an answer begins with the prompt that asks for it"
            )
        return whole[len(prompt) :]

    @property
    def eos_token_id(self) -> int:
        """The token that ends a text.

        Raises:
            ModelError: the tokenizer names none.
        """
        number = self._from_transformers().eos_token_id
        if number is None:
            raise ModelError(f"the tokenizer of '{self.folder}' has no eos_token; name it in tokenizer_config.json")
        return int(number)

    def _from_transformers(self) -> Any:
        if self._loaded is None:
            from transformers import AutoTokenizer

            self._loaded = AutoTokenizer.from_pretrained(self.folder)
        return self._loaded

    def _with_template(self) -> Any:
        loaded = self._from_transformers()
        if not loaded.chat_template:
            raise ModelError(f"the tokenizer of '{self.folder}' has no chat template; give prompts as text")
        return loaded

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of :meth:`render_chat`."""
        return self.encode(self.render_chat(messages))
