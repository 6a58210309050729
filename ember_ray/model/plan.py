"""How the layers of a model are shared out among pipeline stages, and what each stage holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ember_ray.model.qwen3_config import Qwen3Config

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan_stages(config: Qwen3Config, stages: int | Sequence[int]) -> tuple[int, ...]:
    """Layers a stage holds.

    A number of stages is shared out evenly by the work of a decode step: the LM head counts as the layers its
    weight is worth, the embedding (a gather) as nothing but its place on the first stage.

    Args:
        stages: how many stages, or the layers of each.

    Raises:
        ValueError: the split does not fit the model; the text gives the numbers.
    """
    layers = config.num_hidden_layers
    if not isinstance(stages, int):
        split = tuple(stages)
        if not split or any(count < 1 for count in split):
            raise ValueError(f"stages {list(split)}: every stage needs at least one layer")
        if sum(split) != layers:
            raise ValueError(f"stages {list(split)} hold {sum(split)} layers together, the model has {layers}")
        return split
    if not 1 <= stages <= layers:
        raise ValueError(f"{stages} stages cannot be cut from {layers} layers; choose 1 to {layers}")
    head = config.vocab_size * config.hidden_size / config.layer_parameters
    # The cut after which the slowest stage is the least slow; ties go to fuller early stages.
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(0, 0): (0.0, ())}
    for stage in range(1, stages + 1):
        for end in range(stage, layers - (stages - stage) + 1):
            options = []
            for start in range(stage - 1, end):
                if (stage - 1, start) in best:
                    slowest, split = best[stage - 1, start]
                    load = end - start + (head if stage == stages else 0.0)
                    options.append((max(slowest, load), (*split, end - start)))
            best[stage, end] = min(options, key=lambda option: (option[0], [-count for count in option[1]]))
    return best[stages, layers][1]


def stage_layers(split: Sequence[int], stage: int) -> range:
    """The layers of one stage of a split."""
    bounds = [sum(split[:index]) for index in range(len(split) + 1)]
    first, last = list(pairwise(bounds))[stage]
    return range(first, last)


def layer_range_parameters(config: Qwen3Config, layers: range) -> int:
    """Parameters of a stage: its layers, the embedding on the first, norm and LM head on the last."""
    table = config.vocab_size * config.hidden_size
    count = len(layers) * config.layer_parameters
    if layers.start == 0:
        count += table
    if layers.stop == config.num_hidden_layers:
        count += config.hidden_size
        if layers.start > 0 or not config.tie_word_embeddings:
            count += table
    return count


def stage_bytes(config: Qwen3Config, split: Sequence[int], dtype: str) -> list[int]:
    """Bytes of weights on each stage, see :func:`layer_range_parameters`."""
    element = BYTES_PER_ELEMENT[dtype]
    return [element * layer_range_parameters(config, stage_layers(split, stage)) for stage in range(len(split))]
