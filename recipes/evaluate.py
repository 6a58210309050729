"""Evaluation: ``python -m recipes.evaluate [--config PATH] [key=value ...]``.

Measures a base model, a model with an adapter (model.adapter=RUN/adapter) or a model behind an OpenAI-compatible server
(endpoint.base_url=... endpoint.model=...) on held-out prompts of a task (task=extract or task=sql; your own rows with
data.eval=...): one greedy answer and data.eval_samples sampled ones each, judged by the same verifiers. Leaves
exact match, validity, fields, pass@k and best-of-N curves with intervals.

Answers of a server are kept as they come (answers.jsonl). An evaluation that a fault or Ctrl-C has ended goes on with
--config FOLDER/config.yaml resume=FOLDER: only what is missing is asked, then everything is judged.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from actors.messages import Limits
from ember_ray.config import signals
from ember_ray.config.cli import run_cli
from ember_ray.config.errors import UserError, user_faults
from ember_ray.config.evaluate_schema import EvaluateConfig
from ember_ray.config.schema import ExtractConfig, LearnConfig, SqlConfig
from ember_ray.data.example import Example
from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import RequestOutput
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.evaluation.answer_log import AnswerLog
from ember_ray.evaluation.endpoint import Answered, ChatPrompt, Endpoint
from ember_ray.model.lora import load_peft_adapter
from ember_ray.tracking.console import Console
from ember_ray.tracking.evaluation_curves import evaluate
from ember_ray.tracking.evaluation_text import curves_svg, evaluation_markdown
from ember_ray.tracking.files import plain, write_jsonl, write_text
from ember_ray.tracking.rows import group_row
from ember_ray.tracking.run_folder import RunFolder
from ember_ray.tracking.summary import git_state, versions
from recipes.readers import reader_of
from recipes.session import Session
from recipes.setup import (
    engine_options,
    held_out_examples,
    prompt_rows,
    sampling_params,
    verifier_settings,
)
from verifiers.isolated_judge import IsolatedJudge
from verifiers.judge import Batch

EVALUATION = 0
"""The round number of the training recipes' evaluations: the same prompts get the same random numbers here."""

MAY_DIFFER = (
    *("resume", "output_dir", "ray"),
    *(f"endpoint.{name}" for name in ("api_key_env", "concurrency", "max_retries", "timeout_s")),
)
"""Settings that a resumed evaluation may have otherwise: those that may have ended it."""

TASKS: dict[str, tuple[type[LearnConfig], tuple[str, ...]]] = {
    "extract": (ExtractConfig, ("difficulty",)),
    "sql": (SqlConfig, ("levels", "databases")),
}
"""The configuration of a task's runs, and which settings of its data are the task's own."""


@dataclass
class Answers:
    """What a model said to the held-out prompts, judged, and what that took."""

    sampled: list[ScoredGroup]
    greedy: list[ScoredGroup]
    cost: dict[str, Any]


def main(config: EvaluateConfig) -> None:
    """Asks, judges, measures, writes and prints."""
    with Console() as console:
        console.title("evaluation", model_words(config))
        run_config = as_run(config)
        examples = held_out_examples(run_config)
        endpoint = Endpoint(config.endpoint) if config.endpoint.base_url is not None else None
        if config.resume is not None:
            folder = reopened(config.resume, config)
        else:
            folder = RunFolder.create(config.output_dir, config.name)
            folder.write_config(config)
        if endpoint is not None:
            answers = ask_endpoint(endpoint, run_config, examples, console, folder)
        else:
            answers = ask_engine(run_config, examples, console)
        with console.stage("measuring"):
            result = evaluate(answers.sampled, answers.greedy, reader_of(config.task, examples), config.seed)
        text = write(folder, config, result, answers)
    print(f"\n{text}\n{folder.path}/")


def reopened(path: str, config: EvaluateConfig) -> RunFolder:
    """The folder of an evaluation to go on with.

    Raises:
        UserError: there is no such evaluation, it is finished, or it was made with other settings.
    """
    if (Path(path) / "evaluation.json").exists():
        raise UserError(f"resume: the evaluation in '{path}' is finished; start a new one")
    return RunFolder.reopen(path, config, MAY_DIFFER)


def as_run(config: EvaluateConfig) -> LearnConfig:
    """The settings in the form in which the training recipes have them, for what is shared with them.

    Raises:
        UserError: settings do not fit each other.
    """
    run_class, own = TASKS[config.task]
    data = config.data.model_dump(include={"eval", "chat_template", "eval_prompts", "eval_samples", *own})
    values = config.model_dump(include={"name", "seed", "output_dir", "model", "ray", "engine", "rollout", "reward"})
    try:
        # A run with held-out rows of its own has training rows too; nothing reads them here.
        return run_class.model_validate({**values, "data": {**data, "train": config.data.eval}})
    except ValidationError as fault:
        said = [
            f"{'.'.join(map(str, error['loc']))}: {error['msg']}".removeprefix(": ").replace("Value error, ", "")
            for error in fault.errors()
        ]
        raise UserError("; ".join(said)) from None


def model_words(config: EvaluateConfig) -> str:
    """Which model is evaluated."""
    if config.endpoint.base_url is not None:
        return f"{config.endpoint.model} at {config.endpoint.base_url}"
    adapter = f" with adapter {config.model.adapter}" if config.model.adapter is not None else ""
    return (config.model.path or f"the shipped tiny model of {config.task}") + adapter


def plan(config: EvaluateConfig) -> str:
    """What ``--dry-run`` prints below the configuration."""
    run_config, data = as_run(config), config.data
    if config.endpoint.base_url is None:
        engine_options(run_config)
    return (
        f"plan:\n  model       {model_words(config)}\n"
        f"  evaluation  {data.eval_prompts} held-out prompts x {data.eval_samples} sampled = "
        f"{data.eval_prompts * data.eval_samples:,}, and {data.eval_prompts} greedy, "
        f"each answer at most {config.rollout.max_tokens} tokens\n"
        f"  leaves      {config.output_dir.rstrip('/')}/{config.name}_<timestamp>/\n"
    )


def ask_engine(config: LearnConfig, examples: Sequence[Example], console: Console) -> Answers:
    """Candidates from our own engine."""
    rows, params = prompt_rows(config, "held-out", examples), sampling_params(config)
    adapter = load_peft_adapter(config.model.adapter, version=1) if config.model.adapter is not None else None
    with Session(config, console) as session:
        session.ready()
        if adapter is not None:
            session.publish(adapter)
        asked = session.start_rollout(rows, config.data.eval_samples, params, EVALUATION, "sampling")
        sampled = asked.result().groups
        greedy = session.start_rollout(rows, 1, _greedy(params), EVALUATION, "greedy").result().groups
        totals = session.totals
    cost = {"generated_tokens": totals.generated_tokens, "seconds": totals.seconds_generating}
    return Answers(sampled, greedy, cost)


def ask_endpoint(
    endpoint: Endpoint, config: LearnConfig, examples: Sequence[Example], console: Console, folder: RunFolder
) -> Answers:
    """Candidates from a model behind an endpoint, judged once all are there, in a process of their own.

    Raises:
        UserError: the endpoint or the reward functions cannot be used; the text says how to go on.
    """
    prompts, params = [ChatPrompt(example.id, example.messages) for example in examples], sampling_params(config)
    with user_faults(ValueError):
        judge = IsolatedJudge(verifier_settings(config).functions, Limits().verify)
    try:
        log = AnswerLog(folder.path / "answers.jsonl", prompts)
        try:
            sampled = asked(endpoint, log, "sampled", prompts, config.data.eval_samples, params, console)
            greedy = asked(endpoint, log, "greedy", prompts, 1, _greedy(params), console)
            scored = [judged(judge, outputs, examples, console) for outputs in (sampled, greedy)]
        except UserError as fault:
            raise UserError(f"{fault}; {kept_words(log, folder)}") from fault
        except KeyboardInterrupt:
            console.info(kept_words(log, folder))
            raise
        finally:
            log.close()
    finally:
        judge.close()
    cost = endpoint.usage.as_row(endpoint.settings) | {"seconds": log.seconds}
    return Answers(sampled=scored[0], greedy=scored[1], cost=cost)


def kept_words(log: AnswerLog, folder: RunFolder) -> str:
    """What is not lost, and how to go on."""
    if not log.requests:
        return "no answer had come yet"
    return (
        f"{log.requests:,} answered requests are kept: go on with --config {folder.path / 'config.yaml'} "
        f"resume={folder.path}"
    )


def asked(
    endpoint: Endpoint,
    log: AnswerLog,
    kind: str,
    prompts: Sequence[ChatPrompt],
    count: int,
    params: SamplingParams,
    console: Console,
) -> list[RequestOutput]:
    """``count`` candidates of each prompt, those that the log has and those that are asked for now."""
    earlier = log.earlier.get(kind, [])

    def keep(prompt: ChatPrompt, answered: Answered) -> None:
        log.append(kind, prompt, answered)
        signals.check()
        console.advance(len(answered.candidates))

    with console.phase(f"asking, {kind}", total=count * len(prompts)):
        console.advance(sum(len(answered.candidates) for answered in earlier))
        return endpoint.generate(prompts, count, params, keep, earlier)


def judged(
    judge: IsolatedJudge, outputs: Sequence[RequestOutput], examples: Sequence[Example], console: Console
) -> list[ScoredGroup]:
    """Candidates with their verdicts, the examples in the order of the outputs."""
    groups = []
    with console.phase("judging", total=len(outputs)):
        for output, example in zip(outputs, examples, strict=True):
            signals.check()
            prompt = example.messages[0]["content"] if example.is_text else example.messages
            made = output.candidates
            batch = Batch(
                [prompt] * len(made),
                [one.text for one in made],
                [one.token_ids for one in made],
                [example.reward_columns()] * len(made),
            )
            with user_faults(ValueError):
                verdicts = judge.judge(batch)
            scored = [
                ScoredCandidate(one, verdict.reward, verdict.components, verdict.reason)
                for one, verdict in zip(made, verdicts, strict=True)
            ]
            groups.append(ScoredGroup(example.id, prompt, (), scored))
            console.advance()
    return groups


def write(folder: RunFolder, config: EvaluateConfig, result: Mapping[str, Any], answers: Answers) -> str:
    """``eval.jsonl``, ``evaluation.json``, ``evaluation.md`` and ``curves.svg``; gives the Markdown."""
    rows = [group_row(group, kind="sampled") for group in answers.sampled]
    rows += [group_row(group, kind="greedy") for group in answers.greedy]
    write_jsonl(folder.path / "eval.jsonl", rows)
    commit, dirty = git_state()
    head = {
        "name": config.name,
        "task": config.task,
        "model": model_words(config),
        "seed": config.seed,
        "git_commit": commit,
        "git_dirty": dirty,
        "versions": versions(),
        "cost": answers.cost,
    }
    document = json.dumps(plain({**head, **result}), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(folder.path / "evaluation.json", document + "\n")
    figure = "curves.svg" if "best_of_n" in result else None
    if figure is not None:
        write_text(folder.path / figure, curves_svg(result))
    title = f"{'JSON extraction' if config.task == 'extract' else 'text-to-SQL'}: {model_words(config)}"
    text = evaluation_markdown(result, title, [cost_words(answers.cost)], figure)
    write_text(folder.path / "evaluation.md", text)
    return text


def cost_words(cost: Mapping[str, Any]) -> str:
    """What the answers took, in a line."""
    if "requests" not in cost:
        return f"{cost['generated_tokens']:,} tokens generated in {cost['seconds']:.1f} s"
    dollars = "unknown" if cost["dollars"] is None else f"{cost['dollars']:.4g} dollars"
    return (
        f"{cost['requests']:,} requests and {cost['retries']:,} retries in {cost['seconds']:.1f} s, "
        f"{cost['input_tokens']:,} tokens in and {cost['output_tokens']:,} out by the server's count; price: {dollars}"
    )


def _greedy(params: SamplingParams) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=params.max_tokens)


if __name__ == "__main__":
    sys.exit(
        run_cli(
            EvaluateConfig,
            prog="python -m recipes.evaluate",
            description=__doc__.split("\n\n", 1)[1],
            main=main,
            default_config="evaluate",
            plan=plan,
            user_errors=("ember_ray.model.qwen3_config:ModelError", "ember_ray.engine.scheduler:RequestError"),
        )
    )
