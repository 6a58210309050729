"""The settings of a model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ember_ray.config.sections import PositiveInt, Section


class EndpointSection(Section):
    """``endpoint.*``"""

    base_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s@?#]+$",
        description="Address of an OpenAI-compatible server, e.g. http://127.0.0.1:8000/v1; null = our own engine.",
    )
    model: str | None = Field(None, min_length=1, description="Name under which the server knows the model.")
    api_key_env: str | None = Field(
        "OPENAI_API_KEY",
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="Environment variable that holds the key; the key itself is written nowhere. null = no key.",
    )
    concurrency: PositiveInt = Field(8, description="Requests in flight at the same time.")
    max_retries: int = Field(
        5, ge=0, description="Further attempts at a request after 408, 409, 429, 5xx or a lost connection."
    )
    timeout_s: float = Field(120.0, gt=0, description="Seconds that one attempt may take.")
    logprobs: bool = Field(
        True, description="Ask for log-probabilities of the tokens; false for servers that refuse to give them."
    )
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="What the server calls the limit on the tokens of an answer."
    )
    input_price: float | None = Field(None, ge=0, description="Dollars per million prompt tokens; null = unknown.")
    output_price: float | None = Field(None, ge=0, description="Dollars per million generated tokens; null = unknown.")

    @model_validator(mode="after")
    def _complete(self) -> EndpointSection:
        if (self.base_url is None) != (self.model is None):
            given, absent = ("base_url", "model") if self.model is None else ("model", "base_url")
            raise ValueError(f"endpoint.{given} is set but endpoint.{absent} is not; set both or neither")
        if (self.input_price is None) != (self.output_price is None):
            raise ValueError("endpoint.input_price and endpoint.output_price must be given together")
        return self
