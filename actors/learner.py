"""The learner as an actor: its model, optimizer and schedule live in one process over the whole run."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from ember_ray.data.scored_group import ScoredGroup
from ember_ray.train.options import DpoOptions, LoraOptions
from ember_ray.train.pairs import PreferencePair, make_pairs

if TYPE_CHECKING:
    from actors.adapter_wire import PackedAdapter
    from ember_ray.train.dpo import DpoLearner

LEARNER_NAME = "ember-learner"


@ray.remote
class LearnerActor:
    """A `DpoLearner` in a process of its own.

    Resources and name are the caller's: ``LearnerActor.options(name=LEARNER_NAME, num_cpus=1).remote(...)``.
    Call `start` first: what is wrong with the model or the options is raised there, as itself.

    Args:
        model_path, lora, dpo, dtype, device, output_dir: as `DpoLearner` takes them.
        min_margin, pairs_per_prompt: for `learn` on groups, see `make_pairs`.
        num_threads: threads of torch; None takes as many as the actor has CPUs, at least 1. More than there are
            free cores make every step slower, since OpenMP's threads wait for each other.
    """

    def __init__(
        self,
        model_path: str | Path,
        lora: LoraOptions,
        dpo: DpoOptions,
        dtype: str = "float32",
        device: str = "cpu",
        output_dir: str | Path | None = None,
        min_margin: float = 0.05,
        pairs_per_prompt: int = 1,
        num_threads: int | None = None,
    ) -> None:
        self._arguments = (model_path, lora, dpo, dtype, device, output_dir)
        self._min_margin, self._pairs_per_prompt = min_margin, pairs_per_prompt
        self._num_threads = num_threads
        self._made: DpoLearner | None = None

    def start(self) -> None:
        """Loads the model; a second call does nothing.

        Raises:
            LearnerError: there is no model, or the options do not fit it.
        """
        if self._made is not None:
            return
        import torch

        from ember_ray.train.dpo import DpoLearner

        torch.set_num_threads(self._num_threads or _assigned_cpus())
        self._made = DpoLearner(*self._arguments)
        # The Trainer collects garbage in every round. What the imports left, a million objects, need not be looked
        # through each time: 0.3 s a round.
        gc.collect()
        gc.freeze()

    def _learner(self) -> DpoLearner:
        self.start()
        assert self._made is not None
        return self._made

    def learn(self, batch: Sequence[ScoredGroup] | Sequence[PreferencePair]) -> dict[str, float]:
        """One round, on scored groups (of which it makes the pairs) or on pairs made elsewhere.

        Returns:
            What `DpoLearner.learn` gives; for groups also the fields of `PairCounts`, as ``pairs/<field>``.

        Raises:
            LearnerError: see `DpoLearner.learn`.
        """
        groups = [entry for entry in batch if isinstance(entry, ScoredGroup)]
        pairs = [entry for entry in batch if isinstance(entry, PreferencePair)]
        if not groups:
            return self._learner().learn(pairs)
        made, counts = make_pairs(groups, self._min_margin, self._pairs_per_prompt)
        return self._learner().learn([*pairs, *made]) | {f"pairs/{name}": n for name, n in asdict(counts).items()}

    def adapter_update(self, version: int) -> PackedAdapter:
        """The adapter as it is now, as the coordinator's `publish` takes it (``actors.adapter_wire``).

        Raises:
            LearnerError: a weight is NaN or infinite.
        """
        from actors.adapter_wire import pack_adapter

        return pack_adapter(self._learner().adapter_update(version))

    def save_adapter(self, folder: str | Path) -> None:
        """See `DpoLearner.save_adapter`; the folder is on the actor's node."""
        self._learner().save_adapter(folder)

    def save_state(self, folder: str | Path) -> None:
        """See `DpoLearner.save_state`; the folder is on the actor's node."""
        self._learner().save_state(folder)

    def load_state(self, folder: str | Path) -> int:
        """See `DpoLearner.load_state`; the folder is on the actor's node. Gives the rounds learnt so far."""
        learner = self._learner()
        learner.load_state(folder)
        return learner.rounds


def _assigned_cpus() -> int:
    assigned = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return max(1, int(assigned))
