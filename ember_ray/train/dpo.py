"""A DPO learner that lives over a whole run: one model, one optimizer, one learning-rate schedule, many rounds.

One ``trl.DPOTrainer`` is built at the start and trained once a round with that round's pairs as its
``train_dataset``. The trainer keeps the optimizer that it made once, and keeps a scheduler that was given to it, so
Adam's moments and the schedule go on over the rounds without being copied. The reference is the base model with the
adapter off: TRL takes it so when it wraps the base model itself (``peft_config=``); handed a model that is wrapped
already, it would take a copy of the adapter instead.

Completions are trained on exactly the tokens that the engine sampled: the data set has the columns that TRL's own
collator reads (``prompt_ids``, ``chosen_ids``, ``rejected_ids``), so no text is tokenised again.

Rafailov et al. 2023, "Direct Preference Optimization", equation 7, is the ``sigmoid`` loss.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ember_ray.train.errors import LearnerError
from ember_ray.train.options import DpoOptions, LoraOptions
from ember_ray.train.pairs import PreferencePair
from ember_ray.train.schedule import learning_rate_factor

if TYPE_CHECKING:
    from ember_ray.model.lora import AdapterUpdate

__all__ = ["DpoLearner", "DpoOptions", "LearnerError", "LoraOptions"]

STATE_FILE = "learner_state.pt"
_DTYPES = ("float32", "bfloat16")
_NOT_AVERAGED = ("epoch", "num_tokens")  # running counts, not values of a step


class DpoLearner:
    """Learns a LoRA adapter from preference pairs, round after round.

    Args:
        model_path: Hugging Face folder of the base model and its tokenizer; its weights are never changed.
        lora: the adapter's shape.
        dpo: how to learn.
        dtype: of the base model, ``float32`` or ``bfloat16``; the adapter is float32 either way.
        device: ``cpu`` or ``cuda`` (the first visible GPU).
        output_dir: folder that TRL may write to (it does not); None takes a temporary one.

    Raises:
        LearnerError: there is no model at ``model_path``, or the options do not fit it.
    """

    def __init__(
        self,
        model_path: str | Path,
        lora: LoraOptions,
        dpo: DpoOptions,
        dtype: str = "float32",
        device: str = "cpu",
        output_dir: str | Path | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise LearnerError(f"the learner's dtype must be one of {', '.join(_DTYPES)}, not '{dtype}'")
        if not (Path(model_path) / "config.json").is_file():
            raise LearnerError(f"no model in '{model_path}': config.json is missing")
        self.lora = lora
        self.dpo = dpo
        self.rounds = 0
        self.steps = 0
        self.num_tokens = 0
        self._temporary = tempfile.TemporaryDirectory(prefix="ember_learner_") if output_dir is None else None
        folder = Path(self._temporary.name if self._temporary else output_dir)  # type: ignore[arg-type]
        self._build(str(model_path), dtype, device, folder)

    def _build(self, model_path: str, dtype: str, device: str, output_dir: Path) -> None:
        import torch
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
        from trl import DPOConfig
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        from ember_ray.train.trl_trainer import StepWatch, WatchedDPOTrainer, own_random_numbers, quiet

        lora, dpo = self.lora, self.dpo
        layers = None if lora.layers_to_transform is None else list(lora.layers_to_transform)
        with quiet(), own_random_numbers(dpo.seed):
            model = AutoModelForCausalLM.from_pretrained(model_path, dtype=getattr(torch, dtype), local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True)
            if tokenizer.eos_token_id is None:
                raise LearnerError(f"the tokenizer of '{model_path}' has no EOS token")
            self.max_length = dpo.max_length or int(model.config.max_position_embeddings)
            self._vocab_size = int(model.config.vocab_size)
            missing = [layer for layer in layers or () if layer >= model.config.num_hidden_layers]
            if missing:
                raise LearnerError(
                    f"lora.layers_to_transform has layer {missing[0]}, but the model in '{model_path}' has only "
                    f"{model.config.num_hidden_layers} layers, counted from 0"
                )
            self._watch = StepWatch()
            self._trainer = WatchedDPOTrainer(
                model=model,
                peft_config=LoraConfig(
                    task_type="CAUSAL_LM",
                    r=lora.r,
                    lora_alpha=lora.lora_alpha,
                    target_modules=list(lora.target_modules),
                    use_rslora=lora.use_rslora,
                    rank_pattern=dict(lora.rank_pattern),
                    alpha_pattern=dict(lora.alpha_pattern),
                    layers_to_transform=layers,
                    lora_dropout=lora.lora_dropout,
                ),
                args=DPOConfig(
                    output_dir=str(output_dir),
                    learning_rate=dpo.learning_rate,
                    weight_decay=0.0,
                    beta=dpo.beta,
                    loss_type=list(dpo.loss_type),
                    loss_weights=list(dpo.loss_weights) if dpo.loss_weights else None,
                    per_device_train_batch_size=dpo.per_device_train_batch_size,
                    gradient_accumulation_steps=dpo.gradient_accumulation_steps,
                    num_train_epochs=dpo.epochs_per_round,
                    max_grad_norm=dpo.max_grad_norm,
                    max_length=None,  # checked here: TRL would cut
                    disable_dropout=lora.lora_dropout == 0.0,
                    seed=dpo.seed,
                    use_cpu=device == "cpu",
                    bf16=False,
                    gradient_checkpointing=False,
                    dataloader_pin_memory=device != "cpu",
                    remove_unused_columns=False,
                    logging_steps=1,
                    logging_nan_inf_filter=False,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    log_level="error",
                ),
                # TRL wants a data set of texts at the start; the rounds' own pairs take its place in learn().
                train_dataset=Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}),
                data_collator=DataCollatorForPreference(pad_token_id=_pad_id(tokenizer)),
                processing_class=tokenizer,
                callbacks=[self._watch],
            )
            self._trainer.remove_callback(PrinterCallback)
            self._check_patterns()
            optimizer = self._trainer.create_optimizer()
        kind, warmup, planned = dpo.lr_scheduler_type, dpo.whole_warmup_steps, dpo.planned_steps
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(kind, step, warmup, planned)
        )
        self._trainer.lr_scheduler = self._scheduler

    def _check_patterns(self) -> None:
        """PEFT passes over a pattern that fits no module; here that is a spelling mistake."""
        adapted = self.adapter_update(0).scaling
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self.lora, field):
                if not any(re.match(rf"(.*\.)?({pattern})$", path) for path in adapted):
                    raise LearnerError(
                        f"lora.{field} has '{pattern}', which fits no adapted module; they are named like "
                        f"'{next(iter(adapted))}', and the end of the name is enough"
                    )

    @property
    def model(self) -> Any:
        """The ``peft.PeftModel`` that learns."""
        return self._trainer.model

    @property
    def learning_rate(self) -> float:
        """The rate of the next optimizer step."""
        return float(self._scheduler.get_last_lr()[0])

    def learn(self, pairs: Sequence[PreferencePair]) -> dict[str, float]:
        """One round: ``epochs_per_round`` passes over the pairs, in an order that depends on seed and round only.

        Returns:
            TRL's metrics, each the mean over the round's optimizer steps (``loss``, ``grad_norm``,
            ``learning_rate``, ``rewards/chosen``, ``rewards/rejected``, ``rewards/accuracies``,
            ``rewards/margins``, ``logps/chosen``, ``logps/rejected``, ``logits/...``, ``entropy``,
            ``mean_token_accuracy``; absent from a round without a step), and ``steps`` (optimizer steps of the
            round), ``pairs`` (learned from), ``pairs_too_long`` (left out), ``num_tokens`` (prompts and answers
            of all rounds), ``seconds``.

        Raises:
            LearnerError: a loss or gradient is not finite (the step is not applied; earlier steps of the round
                are), or a pair has no prompt, no answer, or token ids that the model does not know.
        """
        from ember_ray.train.trl_trainer import own_random_numbers, quiet

        started = time.perf_counter()
        rows = [row for row in map(self._row, pairs) if row is not None]
        self._watch.steps.clear()
        if rows:
            random.Random(f"{self.dpo.seed}/{self.rounds}").shuffle(rows)
            self._trainer.train_dataset = rows
            try:
                with quiet(), own_random_numbers((self.dpo.seed << 20) + self.rounds):
                    self._trainer.train()
            finally:
                self.steps += len(self._watch.steps)
        self.rounds += 1
        self.num_tokens += self.dpo.epochs_per_round * sum(
            2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows
        )
        metrics = _means(self._watch.steps)
        metrics |= {"steps": len(self._watch.steps), "pairs": len(rows), "pairs_too_long": len(pairs) - len(rows)}
        return metrics | {"num_tokens": self.num_tokens, "seconds": time.perf_counter() - started}

    def _row(self, pair: PreferencePair) -> dict[str, list[int]] | None:
        """The pair in the columns of TRL's collator; None when it is too long."""
        ids = {
            "prompt_ids": list(pair.prompt_token_ids),
            "chosen_ids": list(pair.chosen_token_ids),
            "rejected_ids": list(pair.rejected_token_ids),
        }
        for name, tokens in ids.items():
            if not tokens:
                raise LearnerError(f"a pair of prompt '{pair.request_id}' has no tokens in {name}")
            if min(tokens) < 0 or max(tokens) >= self._vocab_size:
                raise LearnerError(
                    f"a pair of prompt '{pair.request_id}' has a token id in {name} outside the model's "
                    f"vocabulary of {self._vocab_size}; was it made by another model?"
                )
        longest = len(ids["prompt_ids"]) + max(len(ids["chosen_ids"]), len(ids["rejected_ids"]))
        return None if longest > self.max_length else ids

    def adapter_update(self, version: int) -> AdapterUpdate:
        """The adapter as it is now, for the engine.

        Returns:
            float32 CPU copies with PEFT's names, A [r, in] and B [out, r], and PEFT's own scale of each module.

        Raises:
            LearnerError: a weight is NaN or infinite.
        """
        import torch
        from peft import get_peft_model_state_dict
        from peft.tuners.lora import LoraLayer

        from ember_ray.model.lora import AdapterUpdate

        model = self.model
        tensors = {
            name: tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
            for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
        }
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise LearnerError(f"adapter tensor '{name}' has NaN or Inf after learning; it is not published")
        scaling = {
            name.removeprefix("base_model.model."): float(module.scaling["default"])
            for name, module in model.named_modules()
            if isinstance(module, LoraLayer)
        }
        return AdapterUpdate(version, tensors, scaling)

    def save_adapter(self, folder: str | Path) -> None:
        """Writes the adapter as a PEFT folder (``PeftModel.from_pretrained`` reads it); whole or not at all.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            self.model.save_pretrained(str(fresh), save_embedding_layers=False)
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
            "options": self._options(),
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
        for name, value in self._options().items():
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

    def _options(self) -> dict[str, Any]:
        named = {"lora": asdict(self.lora), "dpo": asdict(self.dpo)}
        return {f"{group}.{name}": value for group, options in named.items() for name, value in options.items()}


def _pad_id(tokenizer: Any) -> int:
    """What fills short rows; masked, so any known token does."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _means(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    names = [name for name in (steps[0] if steps else {}) if name not in _NOT_AVERAGED]
    return {name: sum(step[name] for step in steps) / len(steps) for name in names}


def _swap_folder(fresh: Path, folder: Path) -> None:
    """Puts a finished folder in place. A folder cannot replace a full one in one call, so the old one steps aside."""
    if folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
        os.replace(folder, aside / folder.name)
        os.replace(fresh, folder)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(fresh, folder)
