"""What work costs in dollars, so that runs on GPUs and models behind an endpoint can be compared at one budget."""

from __future__ import annotations


def gpu_dollars(seconds: float, dollars_per_hour: float, gpus: int = 1) -> float:
    """Dollars of GPU time: ``seconds`` of wall time on ``gpus`` GPUs, each at ``dollars_per_hour``.

    Raises:
        ValueError: a number is negative.
    """
    if seconds < 0 or dollars_per_hour < 0 or gpus < 0:
        raise ValueError(f"{seconds} s on {gpus} GPUs at {dollars_per_hour} dollars an hour: none may be negative")
    return seconds / 3600 * gpus * dollars_per_hour


def gpu_seconds(dollars: float, dollars_per_hour: float, gpus: int = 1) -> float:
    """Wall seconds that a budget buys on ``gpus`` GPUs: the inverse of ``gpu_dollars``.

    Raises:
        ValueError: the budget is negative, or the price or the number of GPUs is not positive.
    """
    if dollars < 0 or dollars_per_hour <= 0 or gpus <= 0:
        raise ValueError(f"{dollars} dollars for {gpus} GPUs at {dollars_per_hour} dollars an hour buy no time")
    return dollars / dollars_per_hour / gpus * 3600


def token_dollars(input_tokens: int, output_tokens: int, input_price: float, output_price: float) -> float:
    """Dollars of an endpoint's tokens; prices are in dollars per million tokens.

    Raises:
        ValueError: a number is negative.
    """
    if min(input_tokens, output_tokens, input_price, output_price) < 0:
        raise ValueError("numbers of tokens and their prices must not be negative")
    return (input_tokens * input_price + output_tokens * output_price) / 1e6
