"""TRL's trainers, watched: numbers that are not finite end a round before they reach the weights.

Importing this module imports torch and transformers (seconds): do so late.
"""

from __future__ import annotations

import logging as python_logging
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import huggingface_hub.constants as hub_constants
import numpy
import torch
from transformers import TrainerCallback

from ember_ray.train.errors import LearnerError


class FiniteLoss:
    """Goes before a TRL trainer and refuses a loss that is NaN or infinite; see `watched`."""

    state: Any

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        loss = result[0] if return_outputs else result
        if not bool(torch.isfinite(loss).all()):
            raise LearnerError(
                f"the loss became {float(loss.detach())} in step {self.state.global_step + 1} of the round, so "
                "learning stopped; lower the learning rate or look at the base model and what was learnt from"
            )
        return result


def watched(trainer: type) -> Any:
    """A class of the TRL trainer that refuses losses which are not finite."""
    return type(f"Watched{trainer.__name__}", (FiniteLoss, trainer), {})


class StepWatch(TrainerCallback):
    """Keeps what TRL logs of each optimizer step, and refuses gradients that are not finite before they are applied."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = [(name, one.grad) for name, one in kwargs["model"].named_parameters() if one.grad is not None]
        # one number to wait for, where there is a GPU; which gradient it was is asked only then
        if bool(torch.isfinite(torch.nn.utils.get_total_norm(grad for _, grad in named))):
            return
        for name, grad in named:
            if not bool(torch.isfinite(grad).all()):
                raise LearnerError(
                    f"the gradient of '{name}' became NaN or infinite in step {state.global_step + 1} of the round, "
                    "so learning stopped before it was applied; lower the learning rate"
                )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:  # the other log of a round is the Trainer's summary of its speed
            self.steps.append(dict(logs))


@contextmanager
def own_random_numbers(seed: int) -> Iterator[None]:
    """Seeds Python, numpy and torch for a while and puts back what the process had."""
    python_state, numpy_state = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        numpy.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, no advice on the console, no telemetry over the network; the process's settings come back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    dataset_bars = not datasets.are_progress_bars_disabled()
    trl_logger = python_logging.getLogger("trl")  # it has advice on the placeholder data set, too
    trl_level = trl_logger.level
    trl_logger.setLevel(python_logging.ERROR)
    telemetry_off = hub_constants.HF_HUB_DISABLE_TELEMETRY
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    hub_constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        with warnings.catch_warnings():
            # transformers warns of names to come, which the oldest version that we take does not know.
            warnings.simplefilter("ignore", FutureWarning)
            # PEFT's word on a pattern that fits nothing; the learner refuses it.
            warnings.filterwarnings("ignore", message="The following .*_pattern keys", category=RuntimeWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        trl_logger.setLevel(trl_level)
        if bars:
            logging.enable_progress_bar()
        if dataset_bars:
            datasets.enable_progress_bars()
        hub_constants.HF_HUB_DISABLE_TELEMETRY = telemetry_off
