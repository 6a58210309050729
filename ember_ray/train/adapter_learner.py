"""What all learners share: one model, one optimizer, one learning-rate schedule over a whole run of many rounds.

One TRL trainer is built at the start and trained once a round, with that round's rows as its ``train_dataset``. The
trainer keeps the optimizer that it made once, and keeps a scheduler that was given to it, so Adam's moments and the
schedule go on over the rounds without being copied.
"""

from __future__ import annotations

import abc
import os
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ember_ray.data.scored_group import ScoredGroup
from ember_ray.train.adapter import (
    adapter_scaling,
    adapter_tensors,
    check_patterns,
    peft_config,
    save_peft_folder,
    weights_digest,
    with_adapter,
)
from ember_ray.train.errors import LearnerError
from ember_ray.train.mismatch import answer_logprobs, mismatch_metrics, sampled_answers
from ember_ray.train.options import LearnerOptions, LoraOptions
from ember_ray.train.schedule import learning_rate_factor

if TYPE_CHECKING:
    from torch import Tensor

    from ember_ray.model.lora import AdapterUpdate
    from ember_ray.train.shared_base import SharedBase

STATE_FILE = "learner_state.pt"
_DTYPES = ("float32", "bfloat16")
_NOT_AVERAGED = ("epoch", "num_tokens")  # running counts, not values of a step

Row = dict[str, Any]
"""A row of the trainer's data set, in the columns that its collator reads."""


@dataclass(frozen=True)
class TrainerParts:
    """What a subclass builds its TRL trainer from.

    Attributes:
        model: the base model, or a PeftModel that holds ``init_adapter`` already.
        peft_config: for TRL to wrap a base model with; None where it is wrapped.
        tokenizer: the base model's.
        arguments: of ``trl.<Trainer>Config``, everything that learners have in common.
        callbacks: to be given to the trainer.
    """

    model: Any
    peft_config: Any
    tokenizer: Any
    arguments: dict[str, Any]
    callbacks: list[Any]

    @property
    def pad_token_id(self) -> int:
        """What fills short rows; masked, so any known token does."""
        tokenizer = self.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


@dataclass
class RoundRows:
    """What a batch is learnt from.

    Attributes:
        rows: of the trainer's data set, in any order.
        num_tokens: tokens in one pass over the rows, prompts included.
        counts: metrics of how the batch became rows.
    """

    rows: list[Row] = field(default_factory=list)
    num_tokens: int = 0
    counts: dict[str, float] = field(default_factory=dict)


class AdapterLearner(abc.ABC):
    """Learns a LoRA adapter, round after round. To be derived from: DPO, SFT and GRPO say how.

    A subclass gives two methods, and this class does the rest:

    - ``_make_trainer(parts)``: the TRL trainer, of a class made by ``trl_trainer.watched(...)``. It takes
      ``args=SomeConfig(**parts.arguments, ...)`` and parts' model, peft_config, tokenizer (``processing_class``) and
      callbacks. Where TRL keeps a reference policy it is right by itself: TRL takes the adapter off a model that it
      has wrapped itself, and keeps a copy ``ref`` of the adapter of one that it was handed wrapped (`init_adapter`).
      The data set that it is built with is a placeholder that TRL accepts.
    - ``_round_rows(batch)``: a round's batch as rows. `learn` shuffles them with numbers that depend on seed and
      round alone, makes them the trainer's ``train_dataset``, and trains. What cannot be learnt from is left out
      there and counted; rows that are too long are left out, never cut, see `fits`.

    Random numbers of a round depend on seed and round only (``trl_trainer.own_random_numbers``), so that a state
    needs none of them. A subclass carries nothing from round to round beside adapter and optimizer.

    Args:
        model_path: Hugging Face folder of the base model and its tokenizer; its weights are never changed.
        lora: the adapter's shape.
        options: how to learn.
        dtype: of the base model, ``float32`` or ``bfloat16``; the adapter is float32 either way.
        device: ``cpu`` or ``cuda`` (the first visible GPU).
        output_dir: folder that TRL may write to (it does not); None takes a temporary one.
        init_adapter: PEFT folder of the adapter to start from, of the same shape as ``lora`` says. A reference
            policy is this adapter then. None starts from the base model.
        base: the base model's weights, which are used where they lie, see ``shared_base.SharedBase``; they say what the
            device is. None reads a copy of one's own from ``model_path``.

    Raises:
        LearnerError: there is no model at ``model_path``, or the options, the adapter or the base weights do not fit
            it.
    """

    def __init__(
        self,
        model_path: str | Path,
        lora: LoraOptions,
        options: LearnerOptions,
        dtype: str = "float32",
        device: str = "cpu",
        output_dir: str | Path | None = None,
        init_adapter: str | Path | None = None,
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise LearnerError(f"the learner's dtype must be one of {', '.join(_DTYPES)}, not '{dtype}'")
        if not (Path(model_path) / "config.json").is_file():
            raise LearnerError(f"no model in '{model_path}': config.json is missing")
        self.lora = lora
        self.options = options
        self.rounds = 0
        self.steps = 0
        self.num_tokens = 0
        self._temporary = tempfile.TemporaryDirectory(prefix="ember_learner_") if output_dir is None else None
        folder = Path(self._temporary.name if self._temporary else output_dir)  # type: ignore[arg-type]
        self._init_digest = None if init_adapter is None else weights_digest(init_adapter)
        self._shared: SharedBase | None = None
        self._build(str(model_path), dtype, device, folder, init_adapter, base)

    # -- what a subclass says -----------------------------------------------------------------------------------

    @abc.abstractmethod
    def _make_trainer(self, parts: TrainerParts) -> Any:
        """The TRL trainer, made once; see the class."""

    @abc.abstractmethod
    def _round_rows(self, batch: Sequence[Any]) -> RoundRows:
        """A round's batch as rows of the trainer's data set; see the class."""

    # -- building -------------------------------------------------------------------------------------------------

    def _build(
        self,
        model_path: str,
        dtype: str,
        device: str,
        output_dir: Path,
        init_adapter: str | Path | None,
        base: Mapping[str, Tensor] | None,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

        from ember_ray.train.shared_base import SharedBase
        from ember_ray.train.trl_trainer import StepWatch, own_random_numbers, quiet

        options = self.options
        with quiet(), own_random_numbers(options.seed):
            kind = getattr(torch, dtype)
            if base is None:
                model = AutoModelForCausalLM.from_pretrained(model_path, dtype=kind, local_files_only=True)
            else:
                self._shared = SharedBase(model_path, base, kind)
                model = self._shared.model
            tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
            if tokenizer.eos_token_id is None:
                raise LearnerError(f"the tokenizer of '{model_path}' has no EOS token")
            self.max_length = options.max_length or int(model.config.max_position_embeddings)
            self.vocab_size = int(model.config.vocab_size)
            self._check_layers(model_path, int(model.config.num_hidden_layers))
            self._watch = StepWatch()
            config = peft_config(self.lora)
            if init_adapter is not None:
                model, config = with_adapter(model, config, init_adapter), None
            arguments = self._arguments(output_dir, device)
            self._trainer = self._make_trainer(TrainerParts(model, config, tokenizer, arguments, [self._watch]))
            self._trainer.remove_callback(PrinterCallback)
            if self._shared is not None:
                self._shared.gather(self.model)
            check_patterns(self.lora, adapter_scaling(self.model))
            optimizer = self._trainer.create_optimizer()
        schedule, warmup, planned = options.lr_scheduler_type, options.whole_warmup_steps, options.planned_steps
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(schedule, step, warmup, planned)
        )
        self._trainer.lr_scheduler = self._scheduler

    def _arguments(self, output_dir: Path, device: str) -> dict[str, Any]:
        options = self.options
        return {
            "output_dir": str(output_dir),
            "learning_rate": options.learning_rate,
            "weight_decay": 0.0,
            "per_device_train_batch_size": options.per_device_train_batch_size,
            "gradient_accumulation_steps": options.gradient_accumulation_steps,
            "num_train_epochs": options.epochs_per_round,
            "max_grad_norm": options.max_grad_norm,
            "seed": options.seed,
            "use_cpu": device == "cpu",
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": device != "cpu",
            "remove_unused_columns": False,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "log_level": "error",
        }

    def _check_layers(self, model_path: str, num_layers: int) -> None:
        missing = [layer for layer in self.lora.layers_to_transform or () if layer >= num_layers]
        if missing:
            raise LearnerError(
                f"lora.layers_to_transform has layer {missing[0]}, but the model in '{model_path}' has only "
                f"{num_layers} layers, counted from 0"
            )

    # -- learning -------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """The ``peft.PeftModel`` that learns."""
        return self._trainer.model

    @property
    def learning_rate(self) -> float:
        """The rate of the next optimizer step."""
        return float(self._scheduler.get_last_lr()[0])

    def open_base(self, base: Mapping[str, Tensor]) -> None:
        """Goes on with other base weights of the same values: the engine's, where it was made anew.

        Raises:
            LearnerError: they do not fit the model.
            RuntimeError: this learner has a base of its own.
        """
        if self._shared is None:
            raise RuntimeError("this learner has a base of its own; it was made without base=")
        self._shared.open(base)

    def learn(self, batch: Sequence[Any]) -> dict[str, float]:
        """One round: ``epochs_per_round`` passes over the batch, in an order that depends on seed and round only.

        Returns:
            TRL's metrics, each the mean over the round's optimizer steps (``loss``, ``grad_norm``,
            ``learning_rate`` and the subclass's own; absent from a round without a step), the subclass's counts,
            and ``steps`` (optimizer steps of the round), ``num_tokens`` (prompts and answers of all rounds),
            ``seconds``. Of a batch with groups also what `mismatch` gives for ``mismatch_candidates`` of them.

        Raises:
            LearnerError: a loss or gradient is not finite (the step is not applied; earlier steps of the round
                are), or the batch holds what cannot be learnt from.
        """
        from ember_ray.train.trl_trainer import own_random_numbers, quiet

        started = time.perf_counter()
        made = self._round_rows(batch)
        rows = list(made.rows)
        groups = [entry for entry in batch if isinstance(entry, ScoredGroup)]
        apart = self.mismatch(groups, self.options.mismatch_candidates) if groups else {}
        self._watch.steps.clear()
        if rows:
            random.Random(f"{self.options.seed}/{self.rounds}").shuffle(rows)
            self._trainer.train_dataset = rows
            try:
                with quiet(), own_random_numbers((self.options.seed << 20) + self.rounds):
                    self._trainer.train()
            finally:
                self.steps += len(self._watch.steps)
        self.rounds += 1
        self.num_tokens += self.options.epochs_per_round * made.num_tokens
        metrics = means(self._watch.steps) | {"steps": len(self._watch.steps)} | made.counts | apart
        return metrics | {"num_tokens": self.num_tokens, "seconds": time.perf_counter() - started}

    def mismatch(self, groups: Sequence[ScoredGroup], limit: int | None = None) -> dict[str, float]:
        """Compares the engine's log-probabilities of its candidates with the learner's, as it is now.

        Before learning, and with the adapter published, both are the same policy: what differs is the arithmetic.
        Where candidates are of an older policy (off-policy rounds), how far the policy has moved is in it too.

        Args:
            groups: rollouts.
            limit: most candidates to measure, one of each group before the second of any; None measures all.

        Returns:
            See `mismatch_metrics`; empty for a limit of 0.

        Raises:
            LearnerError: a candidate has token ids that the model does not know.
        """
        if limit == 0:
            return {}
        answers = sampled_answers(groups, limit)
        for prompt, answer, _ in answers:
            self.check_tokens("a candidate", {"prompt_token_ids": prompt, "token_ids": answer})
        rows = [(prompt, answer) for prompt, answer, _ in answers]
        mine = answer_logprobs(self.model, rows, self.options.per_device_train_batch_size)
        engine = [value for _, _, logprobs in answers for value in logprobs]
        return mismatch_metrics(engine, [value for logprobs in mine for value in logprobs.tolist()])

    def check_tokens(self, what: str, ids: Mapping[str, Sequence[int]]) -> None:
        """Refuses token ids that the model does not know, and columns without any.

        Args:
            what: whose they are, for the message.
            ids: column name to token ids.

        Raises:
            LearnerError: see above.
        """
        for name, tokens in ids.items():
            if not tokens:
                raise LearnerError(f"{what} has no tokens in {name}")
            if min(tokens) < 0 or max(tokens) >= self.vocab_size:
                raise LearnerError(
                    f"{what} has a token id in {name} outside the model's vocabulary of {self.vocab_size}; was it "
                    "made by another model?"
                )

    def fits(self, num_tokens: int) -> bool:
        """Whether a row of so many tokens, prompt and answer, may be learnt from."""
        return num_tokens <= self.max_length

    # -- results --------------------------------------------------------------------------------------------------

    def adapter_update(self, version: int) -> AdapterUpdate:
        """The adapter as it is now, for the engine.

        Returns:
            float32 CPU copies with PEFT's names, A [r, in] and B [out, r], and PEFT's own scale of each module.

        Raises:
            LearnerError: a weight is NaN or infinite.
        """
        import torch

        from ember_ray.model.lora import AdapterUpdate

        tensors = {
            name: tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
            for name, tensor in adapter_tensors(self.model).items()
        }
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise LearnerError(f"adapter tensor '{name}' has NaN or Inf after learning; it is not published")
        return AdapterUpdate(version, tensors, adapter_scaling(self.model))

    def save_adapter(self, folder: str | Path) -> None:
        """Writes the adapter as a PEFT folder (``PeftModel.from_pretrained`` reads it); whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        save_peft_folder(self.model, Path(folder))

    def save_state(self, folder: str | Path) -> None:
        """Writes all that a resumed learner needs to go on equal to the bit.

        The file holds adapter, optimizer, schedule and counters. Random numbers need no state of their own: they
        depend on the seed and the round.

        Raises:
            OSError: the folder cannot be written.
        """
        import torch

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "options": self._named_options(),
            "adapter": {name: tensor.detach().cpu() for name, tensor in self._trainable()},
            "optimizer": self._trainer.optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "counters": {"rounds": self.rounds, "steps": self.steps, "num_tokens": self.num_tokens},
        }
        fresh = folder / f".{STATE_FILE}.{os.getpid()}"
        try:
            torch.save(state, fresh)
            os.replace(fresh, folder / STATE_FILE)
        finally:
            fresh.unlink(missing_ok=True)

    def load_state(self, folder: str | Path) -> None:
        """Goes on where ``save_state`` was called. The learner must have been made with the same options.

        Raises:
            LearnerError: there is no state in the folder, it cannot be read, or it is of a learner with other options
                or another model; the learner is unchanged then.
        """
        import torch

        path = Path(folder) / STATE_FILE
        if not path.is_file():
            raise LearnerError(f"no learner state in '{folder}': {STATE_FILE} is missing")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            options, adapter = state["options"], state["adapter"]
            optimizer, scheduler, counters = state["optimizer"], state["scheduler"], state["counters"]
        except Exception as fault:
            raise LearnerError(f"learner state '{path}' cannot be read: {fault}") from fault
        for name, value in self._named_options().items():
            if options.get(name) != value:
                raise LearnerError(f"learner state '{path}' was made with {name}={options.get(name)!r}, not {value!r}")
        mine = dict(self._trainable())
        if {n: t.shape for n, t in adapter.items()} != {n: t.shape for n, t in mine.items()}:
            raise LearnerError(f"learner state '{path}' is of an adapter on another model")
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(adapter[name])
        self._trainer.optimizer.load_state_dict(optimizer)
        self._scheduler.load_state_dict(scheduler)
        self.rounds, self.steps, self.num_tokens = counters["rounds"], counters["steps"], counters["num_tokens"]

    def _trainable(self) -> list[tuple[str, Any]]:
        return [(name, tensor) for name, tensor in self.model.named_parameters() if tensor.requires_grad]

    def _named_options(self) -> dict[str, Any]:
        named = {"lora": asdict(self.lora), self.options.section: asdict(self.options)}
        flat = {f"{group}.{name}": value for group, options in named.items() for name, value in options.items()}
        return flat | {"init_adapter": self._init_digest}


def means(steps: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of each metric over those steps of a round that have it; empty without a step."""
    found: dict[str, list[float]] = {}
    for step in steps:
        for name, value in step.items():
            if value is not None and name not in _NOT_AVERAGED:
                found.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}
