"""The learner as an actor: its model, optimizer and schedule live in one process over the whole run."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import ray

from ember_ray.train.options import LearnerOptions, LoraOptions
from ember_ray.train.version_journal import VersionJournal

if TYPE_CHECKING:
    from pathlib import Path

    from actors.adapter_wire import PackedAdapter
    from actors.publisher import Publisher
    from ember_ray.data.scored_group import ScoredGroup
    from ember_ray.model.adapter_outbox import AdapterNotice
    from ember_ray.model.base_weights import BaseHandles
    from ember_ray.train.adapter_learner import AdapterLearner

LEARNER_NAME = "ember-learner"

Kind = Literal["sft", "dpo", "grpo"]

LEARNERS: dict[str, tuple[str, str]] = {
    "sft": ("ember_ray.train.sft", "SftLearner"),
    "dpo": ("ember_ray.train.dpo", "DpoLearner"),
    "grpo": ("ember_ray.train.grpo", "GrpoLearner"),
}
"""Module and class of each kind; they import torch and TRL, so late."""


@dataclass(frozen=True)
class LearnerSettings:
    """What a learner is made with; see `AdapterLearner` for the rest of it.

    Attributes:
        kind: ``sft`` (also best-of-N), ``dpo`` or ``grpo``.
        options: of that kind: ``SftOptions``, ``DpoOptions`` or ``GrpoOptions``.
        num_threads: threads of torch; None takes as many as the actor has CPUs, at least 1. More than there are
            free cores make every step slower, since OpenMP's threads wait for each other.

    Raises:
        ValueError: there is no such kind, or the options are of another one.
    """

    kind: Kind
    model_path: str
    lora: LoraOptions
    options: LearnerOptions
    dtype: str = "float32"
    device: str = "cpu"
    output_dir: str | None = None
    init_adapter: str | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in LEARNERS:
            raise ValueError(f"learner kind must be one of {', '.join(LEARNERS)}, not '{self.kind}'")
        if self.options.section != self.kind:
            raise ValueError(f"a learner of kind '{self.kind}' cannot take {type(self.options).__name__}")


@ray.remote
class LearnerActor:
    """A learner in a process of its own.

    Resources and name are the caller's: ``LearnerActor.options(name=LEARNER_NAME, num_cpus=1).remote(settings)``.
    Call `start` first: what is wrong with the model or the options is raised there, as itself.
    """

    def __init__(self, settings: LearnerSettings) -> None:
        self._settings = settings
        self._made: AdapterLearner | None = None
        self._publisher: Publisher | None = None
        self._journal = VersionJournal(settings.output_dir) if settings.output_dir is not None else None

    def prepare(self) -> None:
        """Imports what `start` needs, while the stages load whose weights it is to be given."""
        # else torch asks the driver, which from then on shows the GPUs that it has found
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        importlib.import_module(LEARNERS[self._settings.kind][0])
        importlib.import_module("ember_ray.train.trl_trainer")

    def start(self, base: Sequence[BaseHandles] | None = None) -> None:
        """Loads the model; a second call does nothing.

        Args:
            base: where the base weights of the stages lie, which the model is then built on. On GPUs this process
                must not have used any before: it will see the stages' and no others.

        Raises:
            LearnerError: there is no model, or the options do not fit it.
            HandleError: the base weights cannot be opened from here.
        """
        if self._made is not None:
            return
        settings = self._settings
        if base is not None and settings.device == "cuda":
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(f"GPU-{gpu}" for gpu in gpus_of(base))
        import torch

        from ember_ray.model.base_weights import open_base

        module, name = LEARNERS[settings.kind]
        learner: Any = getattr(importlib.import_module(module), name)
        torch.set_num_threads(settings.num_threads or _assigned_cpus())
        self._made = learner(
            settings.model_path,
            settings.lora,
            settings.options,
            settings.dtype,
            settings.device,
            settings.output_dir,
            settings.init_adapter,
            None if base is None else open_base(base),
        )
        # The Trainer collects garbage in every round. What the imports left, a million objects, need not be looked
        # through each time: 0.3 s a round.
        gc.collect()
        gc.freeze()

    def open_base(self, base: Sequence[BaseHandles]) -> None:
        """Goes on with the base weights of fresh stages, and lets those of the lost ones go.

        Raises:
            HandleError: they cannot be opened from here.
            LearnerError: they are of another model.
        """
        from ember_ray.model.base_weights import open_base

        self._learner().open_base(open_base(base))

    def _learner(self) -> AdapterLearner:
        self.start()
        assert self._made is not None
        return self._made

    def learn(self, batch: Sequence[Any]) -> dict[str, float]:
        """One round, on scored groups or on what else the kind learns from; see its class's `learn`.

        Raises:
            LearnerError: see `AdapterLearner.learn`.
        """
        return self._learner().learn(batch)

    def mismatch(self, groups: Sequence[ScoredGroup], limit: int | None = None) -> dict[str, float]:
        """See `AdapterLearner.mismatch`."""
        return self._learner().mismatch(groups, limit)

    def adapter_update(self, version: int, coordinator: Any = None) -> PackedAdapter | AdapterNotice:
        """The adapter as it is now, as the coordinator's `publish` takes it.

        Args:
            version: its number. Where an earlier session of the run, or a process that was lost, has given it to
                another adapter, the update has a higher one.
            coordinator: whose stages are to take it; see `Publisher`. Without one it is the tensors.

        Raises:
            LearnerError: a weight is NaN or infinite.
        """
        from actors.adapter_wire import pack_adapter
        from actors.publisher import Publisher, update_digest
        from ember_ray.model.lora import AdapterError, AdapterUpdate
        from ember_ray.train.adapter import adapter_scaling, adapter_tensors
        from ember_ray.train.errors import LearnerError

        learner = self._learner()
        if coordinator is None:
            return pack_adapter(learner.adapter_update(version))
        try:
            if self._publisher is None:
                own = AdapterUpdate(0, adapter_tensors(learner.model), adapter_scaling(learner.model))
                self._publisher = Publisher(self._settings.model_path, own, self._settings.device, coordinator)
            update = self._publisher.write(version)
            if self._journal is not None:
                update = replace(update, version=self._journal.number(version, update_digest(update)))
            return update
        except AdapterError as fault:
            raise LearnerError(f"{fault} after learning; it is not published") from fault

    def save_adapter(self, folder: str | Path) -> None:
        """See `AdapterLearner.save_adapter`; the folder is on the actor's node."""
        self._learner().save_adapter(folder)

    def save_state(self, folder: str | Path) -> None:
        """See `AdapterLearner.save_state`; the folder is on the actor's node."""
        self._learner().save_state(folder)

    def load_state(self, folder: str | Path) -> int:
        """See `AdapterLearner.load_state`; the folder is on the actor's node. Gives the rounds learnt so far."""
        learner = self._learner()
        learner.load_state(folder)
        return learner.rounds


def gpus_of(base: Sequence[BaseHandles]) -> list[str]:
    """UUIDs of the GPUs that base weights lie on, in the order of the layers."""
    from cuda_ext.ipc import IpcMemory

    memories = [handle.memory for stage in base for handle in stage.values()]
    return list(dict.fromkeys(memory.gpu for memory in memories if isinstance(memory, IpcMemory)))


def _assigned_cpus() -> int:
    assigned = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    return max(1, int(assigned))
