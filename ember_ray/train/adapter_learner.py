"""What all learners share: one model, one optimizer, one learning-rate schedule over a whole run of many rounds.

One TRL trainer is built at the start and trained once a round, with that round's rows as its ``train_dataset``. The
trainer keeps the optimizer that it made once, and keeps a scheduler that was given to it, so Adam's moments and the
schedule go on over the rounds without being copied.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ember_ray.train.errors import LearnerError
from ember_ray.train.options import LearnerOptions, LoraOptions
from ember_ray.train.schedule import learning_rate_factor

if TYPE_CHECKING:
    from ember_ray.model.lora import AdapterUpdate

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


class AdapterLearner:
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
    needs none of them. What a subclass carries from round to round beside adapter and optimizer it must add to
    ``_extra_state`` and take back in ``_set_extra_state``.

    Args:
        model_path: Hugging Face folder of the base model and its tokenizer; its weights are never changed.
        lora: the adapter's shape.
        options: how to learn.
        dtype: of the base model, ``float32`` or ``bfloat16``; the adapter is float32 either way.
        device: ``cpu`` or ``cuda`` (the first visible GPU).
        output_dir: folder that TRL may write to (it does not); None takes a temporary one.
        init_adapter: PEFT folder of the adapter to start from, of the same shape as ``lora`` says. A reference
            policy is this adapter then. None starts from the base model.

    Raises:
        LearnerError: there is no model at ``model_path``, or the options or the adapter do not fit it.
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
        self._init_digest = None if init_adapter is None else _digest(Path(init_adapter))
        self._build(str(model_path), dtype, device, folder, init_adapter)

    # -- what a subclass says -----------------------------------------------------------------------------------

    def _make_trainer(self, parts: TrainerParts) -> Any:
        """The TRL trainer, made once; see the class."""
        raise NotImplementedError

    def _round_rows(self, batch: Sequence[Any]) -> RoundRows:
        """A round's batch as rows of the trainer's data set; see the class."""
        raise NotImplementedError

    def _extra_state(self) -> dict[str, Any]:
        """What the subclass carries from round to round: plain values and tensors."""
        return {}

    def _set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Takes back what `_extra_state` gave."""

    # -- building -------------------------------------------------------------------------------------------------

    def _build(
        self, model_path: str, dtype: str, device: str, output_dir: Path, init_adapter: str | Path | None
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

        from ember_ray.train.trl_trainer import StepWatch, own_random_numbers, quiet

        options = self.options
        with quiet(), own_random_numbers(options.seed):
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype), local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
            if tokenizer.eos_token_id is None:
                raise LearnerError(f"the tokenizer of '{model_path}' has no EOS token")
            self.max_length = options.max_length or int(model.config.max_position_embeddings)
            self.vocab_size = int(model.config.vocab_size)
            self._check_layers(model_path, int(model.config.num_hidden_layers))
            self._watch = StepWatch()
            peft_config = self._peft_config()
            if init_adapter is not None:
                model, peft_config = self._wrapped(model, peft_config, init_adapter), None
            arguments = self._arguments(output_dir, device)
            self._trainer = self._make_trainer(TrainerParts(model, peft_config, tokenizer, arguments, [self._watch]))
            self._trainer.remove_callback(PrinterCallback)
            self._check_patterns()
            optimizer = self._trainer.create_optimizer()
        kind, warmup, planned = options.lr_scheduler_type, options.whole_warmup_steps, options.planned_steps
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(kind, step, warmup, planned)
        )
        self._trainer.lr_scheduler = self._scheduler

    def _peft_config(self) -> Any:
        from peft import LoraConfig

        lora = self.lora
        layers = lora.layers_to_transform
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            target_modules=list(lora.target_modules),
            use_rslora=lora.use_rslora,
            rank_pattern=dict(lora.rank_pattern),
            alpha_pattern=dict(lora.alpha_pattern),
            layers_to_transform=None if layers is None else list(layers),
            lora_dropout=lora.lora_dropout,
        )

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

    def _wrapped(self, model: Any, peft_config: Any, folder: str | Path) -> Any:
        """The model with the adapter of a folder in it, which must have the shape that the options say."""
        import torch
        from peft import get_peft_model

        from ember_ray.model.lora import AdapterError, load_peft_adapter

        try:
            found = load_peft_adapter(folder, 0)
        except AdapterError as fault:
            raise LearnerError(str(fault)) from fault
        wrapped = get_peft_model(model, peft_config)
        mine, scaling = adapter_tensors(wrapped), adapter_scaling(wrapped)
        for name in sorted(mine.keys() | found.tensors.keys()):
            want, have = (tuple(side[name].shape) if name in side else None for side in (mine, found.tensors))
            if want != have:
                raise LearnerError(
                    f"adapter '{folder}' does not fit the lora options: '{name}' is {have or 'missing'} there and "
                    f"{want or 'missing'} here; give the options that the adapter was made with"
                )
        for path, scale in scaling.items():
            if abs(scale - found.scaling[path]) > 1e-6 * abs(scale):
                raise LearnerError(
                    f"adapter '{folder}' does not fit the lora options: the scale of '{path}' is "
                    f"{found.scaling[path]:g} there and {scale:g} here; give lora_alpha as the adapter was made with"
                )
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(found.tensors[name])
        return wrapped

    def _check_layers(self, model_path: str, num_layers: int) -> None:
        missing = [layer for layer in self.lora.layers_to_transform or () if layer >= num_layers]
        if missing:
            raise LearnerError(
                f"lora.layers_to_transform has layer {missing[0]}, but the model in '{model_path}' has only "
                f"{num_layers} layers, counted from 0"
            )

    def _check_patterns(self) -> None:
        """PEFT passes over a pattern that fits no module; here that is a spelling mistake."""
        adapted = adapter_scaling(self.model)
        for name in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self.lora, name):
                if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in adapted):
                    raise LearnerError(
                        f"lora.{name} has '{pattern}', which fits no adapted module; they are named like "
                        f"'{next(iter(adapted))}', and the end of the name is enough"
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

    def learn(self, batch: Sequence[Any]) -> dict[str, float]:
        """One round: ``epochs_per_round`` passes over the batch, in an order that depends on seed and round only.

        Returns:
            TRL's metrics, each the mean over the round's optimizer steps (``loss``, ``grad_norm``,
            ``learning_rate`` and the subclass's own; absent from a round without a step), the subclass's counts,
            and ``steps`` (optimizer steps of the round), ``num_tokens`` (prompts and answers of all rounds),
            ``seconds``.

        Raises:
            LearnerError: a loss or gradient is not finite (the step is not applied; earlier steps of the round
                are), or the batch holds what cannot be learnt from.
        """
        from ember_ray.train.trl_trainer import own_random_numbers, quiet

        started = time.perf_counter()
        made = self._round_rows(batch)
        rows = list(made.rows)
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
        metrics = means(self._watch.steps) | {"steps": len(self._watch.steps)} | made.counts
        return metrics | {"num_tokens": self.num_tokens, "seconds": time.perf_counter() - started}

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
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            self.model.save_pretrained(str(fresh), save_embedding_layers=False, selected_adapters=["default"])
            fresh.chmod(0o755)  # mkdtemp's is for the owner alone
            _swap_folder(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

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
            "extra": self._extra_state(),
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
            options, adapter, extra = state["options"], state["adapter"], state["extra"]
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
        self._set_extra_state(extra)

    def _trainable(self) -> list[tuple[str, Any]]:
        return [(name, tensor) for name, tensor in self.model.named_parameters() if tensor.requires_grad]

    def _named_options(self) -> dict[str, Any]:
        named = {"lora": asdict(self.lora), self.options.section: asdict(self.options)}
        flat = {f"{group}.{name}": value for group, options in named.items() for name, value in options.items()}
        return flat | {"init_adapter": self._init_digest}


def adapter_tensors(model: Any) -> dict[str, Any]:
    """The learning adapter's own tensors (not copies) by PEFT's names."""
    from peft import get_peft_model_state_dict

    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def adapter_scaling(model: Any) -> dict[str, float]:
    """PEFT's scale of each adapted module, by its path without PEFT's prefix."""
    from peft.tuners.lora import LoraLayer

    return {
        name.removeprefix("base_model.model."): float(module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric over a round's steps; empty without a step."""
    names = [name for name in (steps[0] if steps else {}) if name not in _NOT_AVERAGED]
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}


def _digest(folder: Path) -> str | None:
    """Tells one starting adapter from another; None where there is none, which is told when it is read."""
    weights = folder / "adapter_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None


def _swap_folder(fresh: Path, folder: Path) -> None:
    """Puts a finished folder in place. A folder cannot replace a full one in one call, so the old one steps aside."""
    if folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, aside / folder.name)
        os.replace(fresh, folder)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(fresh, folder)
