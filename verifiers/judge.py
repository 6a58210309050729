"""Several reward functions over a batch of candidates: called as TRL calls them, checked, weighed and added up.

A function that raises is called again for each candidate alone, so a fault costs the candidates that it is about. A
candidate on which a function fails gets no reward, because a sum without one of its parts would be another reward.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from verifiers.reward_functions import BUILT_IN, NOT_COLUMNS, RewardFunction, find_reward_function, required_columns


@dataclass(frozen=True)
class TrainerState:
    """What reward functions get as ``trainer_state``: ``global_step`` is the number of the round."""

    global_step: int = 0


@dataclass
class Judgement:
    """What all functions together say of a candidate.

    Attributes:
        reward: the sum of weight times score over the functions that apply; None if none does or if one failed.
        components: the parts of a function's verdicts, what it logged, and, if there are several functions, the score
            of each under its name. Parts keep their names if there is one function, or one built-in among several;
            the other functions' are called ``<function>/<part>``.
        reason: why it did not get everything, or what failed.
    """

    reward: float | None
    components: dict[str, float] = field(default_factory=dict)
    reason: str | None = None


@dataclass
class Batch:
    """Candidates, one entry each in every list.

    Attributes:
        prompts: as the rows have them, message lists or texts.
        texts: the answers.
        completion_ids: the answers' tokens.
        rows: the columns of each candidate's row.
    """

    prompts: Sequence[list[dict[str, Any]] | str]
    texts: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    rows: Sequence[Mapping[str, object]]

    def __len__(self) -> int:
        return len(self.texts)

    def only(self, indices: Sequence[int]) -> Batch:
        """Some of the candidates as a batch."""
        return Batch(
            [self.prompts[index] for index in indices],
            [self.texts[index] for index in indices],
            [self.completion_ids[index] for index in indices],
            [self.rows[index] for index in indices],
        )


@dataclass
class _Score:
    """What one function says of one candidate; ``fault`` if it failed, ``value`` None if it does not apply."""

    value: float | None = None
    components: dict[str, float] = field(default_factory=dict)
    reason: str | None = None
    fault: str | None = None


class Judge:
    """Reward functions, found and ready; close it after use.

    Args:
        functions: at least one, no two the same.

    Raises:
        ValueError: a function does not exist or cannot be called as TRL does.
    """

    def __init__(self, functions: Sequence[RewardFunction]) -> None:
        if not functions:
            raise ValueError("no reward function is named: give at least one")
        full = [function.name for function in functions]
        twice = [name for name in full if full.count(name) > 1]
        if twice:
            raise ValueError(f"reward function '{twice[0]}' is named twice: name it once, with the sum of the weights")
        self._several = len(functions) > 1
        short = [function.short_name for function in functions]
        names = [name if short.count(name) == 1 else long for name, long in zip(short, full, strict=True)]
        built_in = [name for name in full if name in BUILT_IN]
        taken = frozenset(names if self._several else ())
        self._functions = [
            _Function(function, name, not self._several or built_in == [function.name], taken)
            for function, name in zip(functions, names, strict=True)
        ]
        self._runner = asyncio.Runner()

    @property
    def required_columns(self) -> dict[str, tuple[str, ...]]:
        """By function, the columns that every row must have."""
        return {function.name: function.required for function in self._functions}

    def judge(self, batch: Batch, state: TrainerState = TrainerState()) -> list[Judgement]:  # noqa: B008 (frozen)
        """One judgement a candidate, in order; an exception of a reward function is a judgement too."""
        lacking = [self._lacking(row) for row in batch.rows]
        judged = {index: Judgement(None, {}, fault) for index, fault in enumerate(lacking) if fault}
        whole = [index for index in range(len(batch)) if index not in judged]
        if whole:
            scores = self._scores(self._functions, batch.only(whole), state)
            judged |= {index: self._combined([of_one[at] for of_one in scores]) for at, index in enumerate(whole)}
        return [judged[index] for index in range(len(batch))]

    def close(self) -> None:
        """Ends the event loop of async functions."""
        self._runner.close()

    def _lacking(self, row: Mapping[str, object]) -> str | None:
        for function in self._functions:
            for column in function.required:
                if column not in row:
                    return f"the row has no column '{column}', which reward function '{function.name}' needs"
        return None

    def _scores(self, functions: Sequence[_Function], batch: Batch, state: TrainerState) -> list[list[_Score]]:
        """Per function, one score a candidate."""
        calls = [_Call(function, batch, state) for function in functions]
        waiting = [call for call in calls if inspect.isawaitable(call.output)]
        if waiting:
            # One loop for the judge's life, since clients that functions keep are bound to it; side by side as in TRL.
            outputs = self._runner.run(_gather([call.output for call in waiting]))
            for call, output in zip(waiting, outputs, strict=True):
                call.output = output
        return [self._checked(call, batch, state) for call in calls]

    def _checked(self, call: _Call, batch: Batch, state: TrainerState) -> list[_Score]:
        fault = call.fault()
        if fault is None:
            return call.scores()
        if len(batch) == 1:
            return [_Score(fault=fault)]
        alone = (self._scores([call.function], batch.only([index]), state) for index in range(len(batch)))
        return [score for [[score]] in alone]

    def _combined(self, scores: Sequence[_Score]) -> Judgement:
        """The judgement of a candidate from the functions' scores."""
        total, reasons = 0.0, []
        components: dict[str, float] = {}
        for function, score in zip(self._functions, scores, strict=True):
            components |= {function.part_name(part): value for part, value in score.components.items()}
            if score.value is not None:
                total += function.weight * score.value
                if self._several:
                    components[function.name] = score.value
            reason = score.fault or score.reason
            if reason:
                reasons.append(f"{function.name}: {reason}" if self._several else reason)
        if all(score.value is None and score.fault is None for score in scores):
            reasons = reasons or ["no reward function applies"]
        elif not math.isfinite(total):
            reasons.append(f"the sum of the rewards is {total}")
        elif not any(score.fault for score in scores):
            return Judgement(total, components, "; ".join(reasons) or None)
        return Judgement(None, components, "; ".join(reasons))


class _Function:
    """A reward function as it is called."""

    def __init__(self, named: RewardFunction, name: str, keeps_names: bool, taken: frozenset[str]) -> None:
        self.name, self.weight, self.settings = name, float(named.weight), dict(named.settings)
        self.call = find_reward_function(named.name)
        self.required = required_columns(self.call, self.settings)
        self._keeps_names, self._taken = keeps_names, taken

    def part_name(self, part: str) -> str:
        return part if self._keeps_names and part not in self._taken else f"{self.name}/{part}"


class _Call:
    """One call of one function, and what it logged meanwhile."""

    def __init__(self, function: _Function, batch: Batch, state: TrainerState) -> None:
        self.function, self._count = function, len(batch)
        self._extra: dict[str, list[Any]] = {}
        self._metrics: dict[str, list[Any]] = {}
        self.output: Any
        try:
            self.output = function.call(**self._arguments(batch, state))
        except (Exception, SystemExit) as fault:
            self.output = fault

    def fault(self) -> str | None:
        """Why there are no results, None if there is one a candidate."""
        if isinstance(self.output, BaseException):
            return f"the reward function failed: {type(self.output).__name__}: {_first_line(self.output)}"
        try:
            self.output = list(self.output)
        except Exception:
            return f"the reward function returned a {type(self.output).__name__}, not a list of rewards"
        if len(self.output) != self._count:
            return f"the reward function returned {len(self.output)} rewards for {self._count} candidates"
        return None

    def scores(self) -> list[_Score]:
        """One score an entry of the output."""
        everywhere = {}
        for name, values in self._metrics.items():
            numbers = [number for number in map(_logged, values) if number is not None]
            if numbers:
                everywhere[name] = math.fsum(numbers) / len(numbers)
        scores = []
        for index, result in enumerate(self.output):
            logged = dict(everywhere)
            for column, values in self._extra.items():
                number = _logged(values[index]) if len(values) == self._count else None
                if number is not None:
                    logged[column] = number
            scores.append(_score(result, logged))
        return scores

    def _arguments(self, batch: Batch, state: TrainerState) -> dict[str, Any]:
        columns = dict.fromkeys(name for row in batch.rows for name in row if name not in NOT_COLUMNS)
        return {
            **{name: [row.get(name) for row in batch.rows] for name in columns},
            **self.function.settings,
            "prompts": list(batch.prompts),
            "completions": [
                text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(batch.prompts, batch.texts, strict=True)
            ],
            "completion_ids": [list(ids) for ids in batch.completion_ids],
            "trainer_state": state,
            "log_extra": lambda column, values: self._extra.setdefault(column, []).extend(values),
            "log_metric": lambda name, value: self._metrics.setdefault(name, []).append(value),
        }


def _score(result: object, logged: dict[str, float]) -> _Score:
    """A number, None or a verdict, with what the function logged."""
    try:
        verdict = hasattr(result, "reward")
        value = result.reward if verdict else result  # type: ignore[attr-defined]
        number = None if value is None else _number(value, "the reward")
        reason = None
        if verdict:
            parts = dict(getattr(result, "components", None) or {})
            logged |= {str(part): _number(part_value, f"component '{part}'") for part, part_value in parts.items()}
            reason = getattr(result, "reason", None)
        return _Score(number, logged, None if reason is None else str(reason))
    except Exception as fault:
        return _Score(None, logged, fault=f"the reward function failed: {_first_line(fault)}")


def _number(value: Any, what: str) -> float:
    """A finite float; numbers of numpy and torch are numbers, texts are not.

    Raises:
        ValueError: it is none, in words.
    """
    try:
        number = float("not a number" if isinstance(value, str | bytes) else value)
    except Exception:
        raise ValueError(f"{what} is {str(value)[:80]!r}, not a number") from None
    if not math.isfinite(number):
        raise ValueError(f"{what} is {number}")
    return number


def _logged(value: Any) -> float | None:
    try:
        return _number(value, "")
    except ValueError:
        return None


async def _gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*awaitables, return_exceptions=True)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
