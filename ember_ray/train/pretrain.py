"""Next-token learning on answers from random weights: what the pretraining recipe is made of."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ember_ray.data.example import Example
from ember_ray.train.captured_step import IGNORED, CapturedStep
from ember_ray.train.tiny_model import TURN_END, render

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PRINT_EVERY = 50
"""Steps after which the console is told of."""


@dataclass(frozen=True)
class Phase:
    """How one phase learns.

    Attributes:
        name: for the console; the order of the batches depends on it and the seed.
        seed: of the order of the batches.
        batch_size: samples an optimizer step.
        muon_learning_rate: peak rate of Muon, for the matrices of the layers.
        adamw_learning_rate: peak rate of AdamW, for embeddings and norms.
        warmup_share: share of the steps with a rising learning rate.
        weight_decay: decoupled weight decay, of all but the norms.
        grad_clip: gradients are scaled down to this norm.
    """

    name: str
    seed: int
    batch_size: int
    muon_learning_rate: float
    adamw_learning_rate: float
    warmup_share: float
    weight_decay: float
    grad_clip: float


Encoded = tuple[list[int], int]
"""Token ids of prompt and answer, and how many of them are the prompt."""


def encode(tokenizer: PreTrainedTokenizerFast, examples: list[Example], answers: list[str]) -> list[Encoded]:
    """Renders the chat, with the end of turn as the last token of the answer."""
    if not examples:
        return []  # tokenizers refuse an empty batch
    prompts = [render(tokenizer, example) for example in examples]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer([answer + TURN_END for answer in answers], add_special_tokens=False)["input_ids"]
    return [(prompt + answer, len(prompt)) for prompt, answer in zip(prompt_ids, answer_ids, strict=True)]


def batches(encoded: list[Encoded], batch_size: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """Every sample once, those of like length together, so that little is padded."""
    window = 16 * batch_size
    for start in range(0, len(encoded), window):
        part = sorted(encoded[start : start + window], key=lambda sample: len(sample[0]))
        groups = [part[at : at + batch_size] for at in range(0, len(part), batch_size)]
        rng.shuffle(groups)
        yield from groups


def answer_loss(model: Qwen3ForCausalLM, batch: list[Encoded], pad_id: int) -> torch.Tensor:
    """Mean cross-entropy over the answers' tokens.

    Padding is on the right, so causal attention never sees it and needs no mask. The head runs on those positions
    only that predict an answer's token.
    """
    import torch
    import torch.nn.functional as F

    length = max(len(ids) for ids, _ in batch)
    inputs = torch.tensor([ids + [pad_id] * (length - len(ids)) for ids, _ in batch], device=model.device)
    labels = torch.full((len(batch), length), IGNORED, device=model.device)
    for row, (ids, prompt_length) in enumerate(batch):
        labels[row, prompt_length - 1 : len(ids) - 1] = torch.tensor(ids[prompt_length:], device=model.device)
    wanted = labels != IGNORED
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[wanted]), labels[wanted])


def new_optimizers(model: Qwen3ForCausalLM, phase: Phase, capturable: bool = False) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for the rest.

    With AdamW alone the same model needs over five times as many samples to copy reliably.
    """
    import torch

    matrices: list[torch.nn.Parameter] = []
    embeddings: list[torch.nn.Parameter] = []
    norms: list[torch.nn.Parameter] = []
    for name, weight in model.named_parameters():
        (norms if weight.dim() < 2 else embeddings if "embed_tokens" in name else matrices).append(weight)
    return [
        torch.optim.Muon(matrices, lr=phase.muon_learning_rate, weight_decay=phase.weight_decay, momentum=0.95),
        torch.optim.AdamW(
            [{"params": embeddings, "weight_decay": phase.weight_decay}, {"params": norms, "weight_decay": 0.0}],
            lr=phase.adamw_learning_rate,
            betas=(0.9, 0.98),
            fused=True,
            capturable=capturable,
        ),
    ]


def rate_factors(steps: int, warmup_share: float) -> Callable[[int], float]:
    """Of the peak learning rate at each step: a linear warm-up, then a cosine to a tenth of the peak."""
    warmup = int(warmup_share * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return factor


def learn(model: Qwen3ForCausalLM, encoded: list[Encoded], phase: Phase, pad_id: int) -> int:
    """One phase: every sample once, see `rate_factors`; returns the steps made."""
    import torch

    steps = math.ceil(len(encoded) / phase.batch_size)
    factor = rate_factors(steps, phase.warmup_share)
    optimizers = new_optimizers(model, phase)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    model.train()
    progress = Progress(phase.name, steps)
    for batch in batches(encoded, phase.batch_size, random.Random(f"{phase.name}/{phase.seed}")):
        loss = answer_loss(model, batch, pad_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), phase.grad_clip)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        progress.add(loss, sum(len(ids) for ids, _ in batch))
    return steps


def learn_captured(model: Qwen3ForCausalLM, encoded: list[Encoded], phase: Phase, capture: bool = True) -> int:
    """`learn` on a GPU, by replays of one captured step; the order of samples is not that of a CPU."""
    steps = math.ceil(len(encoded) / phase.batch_size)
    factor = rate_factors(steps, phase.warmup_share)
    model.train()
    optimizers = new_optimizers(model, phase, capturable=capture)
    step = CapturedStep(model, encoded, phase.batch_size, optimizers, phase.grad_clip, capture)
    order = list(range(len(encoded)))
    random.Random(f"{phase.name}/{phase.seed}").shuffle(order)
    progress = Progress(phase.name, steps)
    for number in range(steps):
        samples = order[number * phase.batch_size : (number + 1) * phase.batch_size]
        progress.add(step(samples, factor(number)), sum(len(encoded[sample][0]) for sample in samples))
    model.zero_grad(set_to_none=True)
    return steps


class Progress:
    """What a phase says on the console, every so many steps; between them no loss is waited for."""

    def __init__(self, name: str, steps: int) -> None:
        self._name, self._steps, self._made, self._tokens = name, steps, 0, 0
        self._started = time.perf_counter()
        self._recent: list[torch.Tensor] = []

    def add(self, loss: torch.Tensor, tokens: int) -> None:
        """One step more, with its loss and the tokens of its samples."""
        self._recent.append(loss.detach())
        self._made, self._tokens = self._made + 1, self._tokens + tokens
        if self._made % PRINT_EVERY == 0 or self._made == self._steps:
            recent = [float(one) for one in self._recent]
            seconds = time.perf_counter() - self._started
            print(
                f"{self._name:>6}  step {self._made:>5}/{self._steps}  loss {sum(recent) / len(recent):.4f}  "
                f"{self._tokens / seconds:6.0f} tokens/s  {seconds:4.0f} s",
                flush=True,
            )
            self._recent.clear()
