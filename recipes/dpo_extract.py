"""DPO on JSON extraction: ``python -m recipes.dpo_extract [--config PATH] [key=value ...]``.

Each round: N candidates of some prompts from the engine, scored by the verifier; the best and the worst of each prompt
make a pair; the learner takes the pairs; its adapter becomes the engine's policy, in place. Held-out prompts, which
are never learnt from, are measured before the first and after the last round.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

from actors.messages import PromptRow
from ember_ray.config.cli import run_cli
from ember_ray.config.schema import DpoExtractConfig
from ember_ray.data.scored_group import ScoredGroup
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.tracking.console import Console
from ember_ray.tracking.evaluation import gains, summarize
from ember_ray.tracking.metrics import rollout_metrics
from ember_ray.tracking.report import write_report
from ember_ray.tracking.rows import prompt_text
from ember_ray.tracking.run_folder import RunFolder
from ember_ray.tracking.samples import changed_samples, draw, verdict
from ember_ray.tracking.summary import build_summary
from ember_ray.tracking.trackers import Tracker, make_tracker
from recipes.extract_task import load_rows, plan, sampling_params
from recipes.session import Session, start_learner

MAY_DIFFER = ("resume", "output_dir", "tracker", "ray")
"""Settings that a resumed run may have otherwise."""

EVALUATION = 0
"""The round number under which held-out candidates are drawn: before and after get the same random numbers."""

Evaluation = tuple[list[ScoredGroup], list[ScoredGroup]]
"""Sampled and greedy groups of the held-out prompts."""


class DpoRun:
    """One run from the first evaluation to the report."""

    def __init__(self, config: DpoExtractConfig, console: Console) -> None:
        self.config, self.console = config, console
        self.train, self.held_out = load_rows(config)
        if config.resume is not None:
            self.folder = RunFolder.reopen(config.resume, config, MAY_DIFFER)
        else:
            self.folder = RunFolder.create(config.output_dir, config.name)
            self.folder.write_config(config)
        self.tracker: Tracker = make_tracker(
            config.tracker, self.folder.path, self.folder.path.name, config.model_dump()
        )
        # actors need not share this process's working folder
        self.adapter_path, self.learner_path = self.folder.adapter_path.resolve(), self.folder.learner_path.resolve()
        self.rounds_done = 0
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None

    def run(self) -> None:
        config, console = self.config, self.console
        steps_a_round = math.ceil(
            min(config.rollout.prompts_per_round, len(self.train))
            * config.dpo.pairs_per_prompt
            / (config.dpo.per_device_train_batch_size * config.dpo.gradient_accumulation_steps)
        )
        with Session(config, console) as session:
            self.session = session
            planned = config.rounds * config.dpo.epochs_per_round * steps_a_round
            learner = start_learner(config, planned, self.learner_path)
            learner_ready = learner.start.remote()
            session.ready()
            session.call("loading the learner", learner_ready)

            self.before = self.evaluate("before")
            if config.resume is not None:
                self.go_on(learner)
            console.start_rounds(config.rounds, self.rounds_done)
            for number, rows in enumerate(self.batches(), start=1):
                if number > self.rounds_done:
                    self.round(number, rows, learner)
            self.after = self.evaluate("after")

    def go_on(self, learner: Any) -> None:
        """Brings learner, engine and counts to the end of the last whole round of the run that is resumed."""
        if not any(self.learner_path.glob("*")):
            return  # it ended before its first round did
        self.rounds_done = self.session.call("loading the state", learner.load_state.remote(self.learner_path))
        rows = self.folder.keep_rounds(self.rounds_done)
        for row in rows:
            self.session.count(row)
        if rows and rows[-1]["policy_version"]:
            self.session.publish(learner.adapter_update.remote(rows[-1]["policy_version"]))
        self.console.info(f"going on after round {self.rounds_done}")

    def round(self, number: int, rows: list[PromptRow], learner: Any) -> None:
        """Rollout, learning, publication."""
        config, session, start = self.config, self.session, time.monotonic()
        result = session.rollout(rows, config.rollout.num_candidates, sampling_params(config), number, "rollout")
        learnt = session.call("learning", learner.learn.remote(result.groups))
        session.call("saving", learner.save_adapter.remote(self.adapter_path))
        publishing = time.monotonic()
        if config.rollout.publish and learnt["pairs"]:
            session.publish(learner.adapter_update.remote(number))
        publishing = time.monotonic() - publishing

        stats = result.stats
        metrics = rollout_metrics(result.groups) | learnt
        metrics |= {
            "round": number,
            "rollout_policy_version": stats.policy_version,
            "policy_version": session.policy_version,
            "tokens_per_second": stats.tokens_per_s,
            "generated_tokens": stats.generated_tokens,
            "prefill_tokens": stats.prefill_tokens,
            "prefix_hit_tokens": stats.prefix_hit_tokens,
            "prefix_hit_rate": stats.prefix_hit_rate,
            "preemptions": stats.preemptions,
            "recoveries": stats.recoveries,
            "seconds/rollout": stats.seconds_generating,
            "seconds/verifying": stats.seconds_verifying,
            "seconds/learning": learnt["seconds"],
            "seconds/publishing": publishing,
            "seconds/round": time.monotonic() - start,
        }
        self.folder.write_rollouts(number, result.groups)
        self.folder.append_metrics(metrics)
        session.call("saving", learner.save_state.remote(self.learner_path))
        self.rounds_done = number
        self.tracker.log(metrics, step=number)
        self.tracker.log_samples(number, list(sample_rows(result.groups[:4])))
        self.console.round_done(metrics)

    def evaluate(self, when: str) -> Evaluation:
        """Held-out prompts, sampled at the rollout's temperature and greedy; written to the run folder."""
        config, session, params = self.config, self.session, sampling_params(self.config)
        greedy_params = SamplingParams(temperature=0.0, max_tokens=params.max_tokens)
        name = f"evaluating {when}"
        sampled = session.rollout(self.held_out, config.data.eval_samples, params, EVALUATION, name).groups
        greedy = session.rollout(self.held_out, 1, greedy_params, EVALUATION, f"{name}, greedy").groups
        self.folder.write_eval("before" if when == "before" else "after", sampled, greedy)
        return sampled, greedy

    def batches(self) -> Iterator[list[PromptRow]]:
        """The prompts of each round: epochs over the training rows, each in an order of its own."""
        size = min(self.config.rollout.prompts_per_round, len(self.train))
        order: list[int] = []
        epoch = 0
        for _ in range(self.config.rounds):
            if len(order) < size:
                order = list(range(len(self.train)))
                random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
                epoch += 1
            yield [self.train[index] for index in order[:size]]
            order = order[size:]

    def finish(self, status: str) -> None:
        """Summary, tracker and report, of whatever there is."""
        seed = self.config.seed
        before, after = self.before, self.after
        summary = build_summary(
            name=self.config.name,
            seed=seed,
            status=status,  # type: ignore[arg-type]
            rounds=self.rounds_done,
            before=summarize(*before, seed) if before else None,
            after=summarize(*after, seed) if after else None,
            gain=gains(before, after, seed) if before and after else None,
            seconds=self.console.seconds,
            counters=vars(self.session.totals),
            policy_version=self.session.policy_version,
        )
        self.folder.write_summary(summary)
        for when in ("before", "after"):
            part = summary[when]
            if part:
                self.tracker.log({f"eval/{when}/{key}": value for key, value in part.items()}, step=self.rounds_done)
        self.tracker.finish()
        self.folder.close()
        write_report(self.folder.path)
        changed = draw(changed_samples(before[1], after[1]), 3, seed) if before and after else []
        self.console.final(summary, changed, self.folder.path, self.folder.files())


def sample_rows(groups: list[ScoredGroup]) -> Iterator[dict[str, Any]]:
    """Rows of the tracker's samples table."""
    for group in groups:
        for scored in group.candidates[:2]:
            yield {
                "prompt": prompt_text(group.prompt),
                "completion": scored.candidate.text,
                "reward": scored.reward,
                "verdict": verdict(scored),
            }


def main(config: DpoExtractConfig) -> None:
    """Runs it; what was learnt until Ctrl-C or a failure is kept and reported."""
    with Console() as console:
        console.title("DPO on JSON extraction", config.name)
        run = DpoRun(config, console)
        status = "failed"
        try:
            run.run()
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            if hasattr(run, "session"):
                run.finish(status)


if __name__ == "__main__":
    sys.exit(
        run_cli(
            DpoExtractConfig,
            prog="python -m recipes.dpo_extract",
            description=__doc__.split("\n\n", 1)[1],
            main=main,
            default_config="dpo_extract",
            plan=plan,
            user_errors=(
                "ember_ray.model.qwen3_config:ModelError",
                "ember_ray.engine.scheduler:RequestError",
                "ember_ray.train.errors:LearnerError",
            ),
        )
    )
