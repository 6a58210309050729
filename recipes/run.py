"""What every training run has around its loop: folder, actors, evaluations, bookkeeping, resuming, the end.

A recipe's loop calls the methods of `Run` in the order in which things happen; see ``recipes/dpo_extract.py``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from actors.calls import ActorLost, UpdateLost
from actors.messages import PromptRow, RolloutResult, RolloutStats, added
from ember_ray.config import signals
from ember_ray.config.errors import UserError
from ember_ray.config.schema import LearnConfig
from ember_ray.data.example import Example
from ember_ray.data.scored_group import ScoredGroup
from ember_ray.data.tokenize import completion_tokens
from ember_ray.engine.sampling_params import SamplingParams
from ember_ray.model.tensor_handles import HandleError
from ember_ray.model.tokenizer import Tokenizer
from ember_ray.tracking.console import Console
from ember_ray.tracking.evaluation import gains, summarize
from ember_ray.tracking.metrics import rollout_metrics
from ember_ray.tracking.report import write_report
from ember_ray.tracking.rows import prompt_text
from ember_ray.tracking.run_folder import RunFolder
from ember_ray.tracking.samples import changed_samples, draw, verdict
from ember_ray.tracking.summary import build_summary
from ember_ray.tracking.trackers import Tracker, make_tracker
from ember_ray.train.adapter_learner import STATE_FILE
from ember_ray.train.batch import Demonstration
from ember_ray.train.options import DpoOptions
from ember_ray.train.preferences import answers_to_score, reference_scores
from recipes.earlier import Earlier, forget_before, kept
from recipes.learners import Algorithm, shares_base, start_learner
from recipes.session import PendingRollout, Session
from recipes.setup import highest_reward, load_rows, model_path, sampling_params
from recipes.tasks import task_of

MAY_DIFFER = ("resume", "output_dir", "tracker", "ray")
"""Settings that a resumed run may have otherwise."""

EVALUATION = 0
"""The round number under which held-out candidates are drawn: before and after get the same random numbers."""

MOST_REVIVALS = 3
"""Learner processes lost one after the other before the run gives up."""

Evaluation = tuple[list[ScoredGroup], list[ScoredGroup]]
"""Sampled and greedy groups of the held-out prompts."""


class Run:
    """One training run.

    Args:
        algorithm: which learner learns, and from what section of the configuration.

    Attributes:
        train, held_out: the rows.
        rounds_done, steps: whole rounds and their optimizer steps, those of an earlier session included.
    """

    def __init__(self, config: LearnConfig, algorithm: Algorithm, console: Console) -> None:
        self.config, self.algorithm, self.console = config, algorithm, console
        algorithm.learner_options(config)  # what it refuses is told before anything is made
        self.train, self.held_out = load_rows(config, algorithm)
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
        self._tokenizer = Tokenizer(model_path(config))
        self.first_version = 0 if config.model.adapter is None else 1
        self.rounds_done = self.steps = 0
        self._ahead = getattr(getattr(config, algorithm.section), "async_steps", 0)
        self._in_flight = getattr(getattr(config, algorithm.section), "in_flight", False)
        self._earlier = Earlier([], self._ahead, self.first_version, self.learner_path)
        self._versions: list[int] = []  # after each whole round
        self.before: Evaluation | None = None
        self.after: Evaluation | None = None
        self.mismatch: dict[str, dict[str, float]] = {}
        self._round_began = 0.0
        self._seconds: dict[str, float] = {}
        self._learnt_from: Any = None
        self._revivals = 0
        self._shares_base: bool | None = None
        self._base_of = 0

    def run(self, loop: Callable[[Run], None]) -> None:
        """Brings up the actors, measures, lets the recipe's loop run, measures again."""
        with Session(self.config, self.console) as session:
            self.session = session
            self._make_learner()
            session.ready()
            self._keeping_learner(self._start_learner)
            if self.first_version:
                self._publish(self.first_version)
            self.before = self._evaluate("before")
            if self.config.resume is not None:
                self._go_on()
            self.console.start_rounds(self.config.rounds, self.rounds_done)
            loop(self)
            self.after = self._evaluate("after")

    # What a loop is made of, in the order in which it is called.

    def rounds(self) -> Iterator[tuple[int, list[PromptRow]]]:
        """Number and prompts of each round that is still to come, within the budget of generated tokens.

        Epochs over the training rows, each in an order of its own; the same ones for the same seed, also after a
        resume: then the engine is brought to the policy of each round first.
        """
        for number, rows in self._rounds():
            self._serve(self._earlier.version_for(number))
            yield number, rows
        self._serve(self._earlier.newest)

    def _rounds(self) -> Iterator[tuple[int, list[PromptRow]]]:
        size = min(self.algorithm.prompts_a_round(self.config), len(self.train))
        budget = self.config.rollout.token_budget
        if budget is not None and (self._earlier.last_prompts or size) < size:
            return  # the last round before the resume was cut to fit
        order: list[int] = []
        epoch = 0
        for number in range(1, self.config.rounds + 1):
            if len(order) < size:
                order = list(range(len(self.train)))
                random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
                epoch += 1
            rows, order = [self.train[index] for index in order[:size]], order[size:]
            if number > self.rounds_done:
                for row in self._earlier.ended_before(number):
                    self.session.ended(row["prompts"], row["prompts_with_refill"], row["generated_tokens"])
                if budget is not None:
                    rows = rows[: self._affordable(budget, size)]
                if rows:
                    yield number, rows
                if len(rows) < size:
                    return

    def start_rollout(self, rows: Sequence[PromptRow], number: int, spare: Sequence[PromptRow] = ()) -> PendingRollout:
        """Candidates of all rows, scored, under the policy as it is now; ``result()`` waits for them.

        Args:
            spare: groups whose rewards are all equal give their places to groups of these.
        """
        config = self.config
        return self.session.start_rollout(
            rows, config.rollout.num_candidates, sampling_params(config), number, "rollout", spare
        )

    def spare_rows(self, rows: Sequence[PromptRow], number: int) -> list[PromptRow]:
        """Other prompts for groups that teach nothing: as many as the round's, or as there are."""
        taken = {row.example.id for row in rows}
        others = [row for row in self.train if row.example.id not in taken]
        return random.Random(f"{self.config.seed}/refill/{number}").sample(others, min(len(rows), len(others)))

    def rollout(self, rows: Sequence[PromptRow], number: int) -> RolloutResult:
        """Candidates of all rows, scored."""
        return self.start_rollout(rows, number).result()

    def demonstrations(self, rows: Sequence[PromptRow]) -> list[Demonstration]:
        """The rows' own answers, as tokens."""
        return [self._demonstration(row, row.example) for row in rows]

    def with_reference(self, groups: Sequence[ScoredGroup], rows: Sequence[PromptRow]) -> list[Any]:
        """What DPO needs beside the groups: gold answers with ``oracle``, and what the reference says of the pairs.

        The reference is the policy that the run started from.
        """
        options = self.algorithm.learner_options(self.config)
        assert isinstance(options, DpoOptions)
        batch: list[Any] = list(groups)
        if options.pair_choice == "oracle":
            given = [row.example for row in rows]
            shown = [one if one.completion else task_of(self.config).demonstrate([one], 0.0, 0)[0] for one in given]
            batch += [self._demonstration(row, example) for row, example in zip(rows, shown, strict=True)]
        if options.reference == "engine":
            answers = answers_to_score(batch, options)
            begun = time.monotonic()
            batch += reference_scores(answers, self.session.score(answers, self.first_version))
            self._seconds["scoring"] = time.monotonic() - begun
        return batch

    def learn(self, batch: Any) -> dict[str, float]:
        """One round of the learner. If its process dies, a fresh one goes on from the last whole round's state."""
        begun = time.monotonic()
        self._learnt_from = batch
        learnt = self._ask_learner("learning", "learn", batch)
        self._seconds["learning"] = time.monotonic() - begun
        return learnt

    def publish(self, number: int) -> None:
        """Makes what was learnt the policy of all stages, unless the run is the control experiment without it."""
        begun = time.monotonic()
        if self.config.rollout.publish:
            self._publish(self.first_version + number)
        self._seconds["publishing"] = time.monotonic() - begun

    def record(self, number: int, learnt: dict[str, float], result: RolloutResult | None = None) -> None:
        """Writes down the round; from here on a resumed run need not do it again."""
        self._ask_learner("saving", "save_adapter", self.adapter_path)  # here: publication does not wait for files
        session = self.session
        metrics: dict[str, Any] = {"round": number, **learnt, "policy_version": session.policy_version}
        if result is not None:
            stats = result.stats
            metrics |= rollout_metrics(result.groups) | {
                "rollout_policy_version": stats.policy_version,
                "tokens_per_second": stats.tokens_per_s,
                "generated_tokens": stats.generated_tokens,
                "prefill_tokens": stats.prefill_tokens,
                "prefix_hit_tokens": stats.prefix_hit_tokens,
                "prefix_hit_rate": stats.prefix_hit_rate,
                "prompts": len(result.groups),
                "prompts_with_refill": stats.candidates // self.config.rollout.num_candidates,
                "preemptions": stats.preemptions,
                "recoveries": stats.recoveries,
                "seconds/rollout": stats.seconds_generating,
                "seconds/verifying": stats.seconds_verifying,
            }
            self.folder.write_rollouts(number, result.groups)
        metrics |= {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        now = time.monotonic()
        metrics["seconds/round"] = now - self._round_began
        self._round_began, self._seconds = now, {}
        self.folder.append_metrics(metrics)
        if (
            self._ahead and self.config.rollout.publish
        ):  # the next rollouts are under way with older policies, and are made again after a resume
            self._ask_learner("saving", "save_adapter", kept(self.learner_path, session.policy_version))
        with signals.held():
            self._ask_learner("saving", "save_state", self.learner_path)
            self._learnt_from, self._revivals = None, 0
            self.rounds_done = number
            self.steps += int(learnt.get("steps", 0))
        self._versions.append(session.policy_version)
        # a resume needs those of the last rounds; numbers may have gaps (`VersionJournal`)
        forget_before(self.learner_path, self._versions[max(0, len(self._versions) - 1 - self._ahead)])
        self.tracker.log(metrics, step=number)
        if result is not None:
            self.tracker.log_samples(number, list(_sample_rows(result.groups[:4])))
        self.console.round_done(metrics)

    # The rest serves these.

    def _demonstration(self, row: PromptRow, example: Example) -> Demonstration:
        answer = example.completion
        if answer is None:
            raise UserError(f"training row '{example.id}' has no answer to learn from (its 'completion')")
        tokens = completion_tokens(self._tokenizer, example, answer, self.config.data.chat_template)
        return Demonstration(example.id, tuple(row.prompt_token_ids), tokens, answer, highest_reward(self.config))

    def _affordable(self, budget: int, size: int) -> int:
        """How many of a round's prompts the budget still pays for, by what a prompt has cost so far."""
        spent, prompts = self.session.trained_tokens, self.session.trained_prompts
        if spent >= budget:
            return 0
        if not prompts:
            return size
        return max(0, min(size, round((budget - spent) / (spent / prompts)) - self.session.pending_prompts))

    def _make_learner(self) -> None:
        if self._shares_base is None:
            here = self.session.stages_are_here
            self._shares_base = shares_base(self.config, here)
            if not self._shares_base and self.config.learner.base == "auto":
                reason = f"it does not learn in {self.config.model.dtype}" if here else "a stage is on another node"
                self.console.info(f"the learner takes base weights of its own: {reason}")
        self.learner = start_learner(self.config, self.algorithm, self.learner_path, self._shares_base)
        self._starting = self.learner.prepare.remote() if self._shares_base else self.learner.start.remote()

    def _start_learner(self) -> None:
        if self._shares_base:
            try:
                self.session.call("loading the learner", self.learner.start.remote(self._look_at_base()))
                return
            except HandleError as obstacle:
                if self.config.learner.base == "shared":
                    raise UserError(
                        f"learner.base=shared: the learner cannot use the engine's weights, {obstacle}; use own"
                    ) from obstacle
                self.console.info(f"the learner takes base weights of its own: {obstacle}")
                self._shares_base = False
                self._make_learner()
        self.session.call("loading the learner", self._starting)

    def _look_at_base(self) -> list[Any]:
        """Where the base weights of the stages lie now.

        Raises:
            HandleError: they cannot be shown to another process.
        """
        while True:
            self._base_of = self.session.recoveries()
            base = self.session.base_weights()
            if self.session.recoveries() == self._base_of:
                break
        obstacle = next((text for text in base if isinstance(text, str)), None)
        if obstacle is not None:
            raise HandleError(obstacle)
        return base

    def _follow_stages(self) -> None:
        """Where stages were lost and made anew, their weights lie elsewhere: the learner lets the old ones go.

        Raises:
            ActorLost: it cannot open the new ones.
        """
        if self._shares_base and self.session.recoveries() != self._base_of:
            self.console.info("the stages were made anew; the learner goes on with the base weights of the new ones")
            try:
                self.session.call("opening the base weights", self.learner.open_base.remote(self._look_at_base()))
            except HandleError as obstacle:
                raise ActorLost(f"fresh stages' base weights cannot be opened: {obstacle}") from obstacle

    def _ask_learner(self, phase: str, method: str, argument: Any) -> Any:
        def ask() -> Any:
            if method == "learn":
                self._follow_stages()
            try:
                return self.session.call(phase, getattr(self.learner, method).remote(argument))
            except RuntimeError as fault:
                if isinstance(fault, ActorLost) or not self._lost_its_base():
                    raise
                raise ActorLost(f"{phase} failed when a stage was lost whose weights it used: {fault}") from fault

        return self._keeping_learner(ask, again=method == "learn")

    def _lost_its_base(self) -> bool:
        """Whether the stages that the learner has its base weights from are no more; looks after them."""
        if not self._shares_base:
            return False
        before = self._base_of
        with suppress(HandleError):  # whoever starts the next learner deals with that
            self._look_at_base()
        return self._base_of != before

    def _publish(self, version: int) -> None:
        """The learner's adapter as it is now. If another actor than the learner is lost, so is the run."""

        def publish() -> int:
            update = self.learner.adapter_update.remote(version, self.session.coordinator)
            return self.session.publish(update, self._in_flight)

        self._keeping_learner(publish, UpdateLost)

    def _keeping_learner(self, ask: Callable[[], Any], loss: type[ActorLost] = ActorLost, again: bool = False) -> Any:
        """Asks the learner for something, and a fresh one if it is lost.

        Args:
            loss: what tells that it is lost.
            again: see `_revive`.
        """
        while True:
            try:
                return ask()
            except loss as lost:
                self._revive(lost, again)

    def _revive(self, lost: ActorLost, again: bool = False) -> None:
        """A fresh learner at the state of the last whole round, which then learns this round's batch again.

        Args:
            again: the caller will hand over the batch itself.
        """
        while True:
            self._revivals += 1
            if self._revivals > MOST_REVIVALS:
                raise lost
            self.console.info(f"the learner was lost ({lost}); a fresh one takes its place")
            try:
                self._make_learner()
                self._start_learner()
                # the state may be of this round already, where the process died after it had been written
                learnt = self._load_state()
                if self._learnt_from is not None and not again and learnt == self.rounds_done:
                    self.session.call("learning", self.learner.learn.remote(self._learnt_from))
                return
            except ActorLost as once_more:
                lost = once_more

    def _load_state(self) -> int:
        """Brings the learner to the last state that was written, if there is one; gives the rounds that it learnt."""
        if not (self.learner_path / STATE_FILE).is_file():
            return 0
        return int(self.session.call("loading the state", self.learner.load_state.remote(self.learner_path)))

    def _go_on(self) -> None:
        """Brings learner, engine and counts to the end of the last whole round of the run that is resumed."""
        self.rounds_done = self._keeping_learner(self._load_state)
        rows = self.folder.keep_rounds(self.rounds_done)
        self._earlier = Earlier(rows, self._ahead, self.first_version, self.learner_path)
        self._versions = [int(row["policy_version"]) for row in rows]
        self.steps = sum(int(row.get("steps", 0)) for row in rows)
        counted = ("generated_tokens", "prefill_tokens", "prefix_hit_tokens", "preemptions", "recoveries")
        for row in rows:
            if "generated_tokens" in row:
                self.session.begun(row["prompts"])
                more = RolloutStats(**{name: row[name] for name in counted})
                self.session.totals = added(self.session.totals, more)
        self.console.info(f"going on after round {self.rounds_done}")

    def _serve(self, version: int) -> None:
        """Brings the engine of a resumed run to a version that an earlier session published."""
        if self.session.policy_version < version == self._earlier.newest:
            self._publish(version)
        elif self.session.policy_version < version:
            self.session.publish(self._earlier.adapter(version))

    def _evaluate(self, when: str) -> Evaluation:
        """Held-out prompts, sampled at the rollout's temperature and greedy; written to the run folder."""
        config, session, params = self.config, self.session, sampling_params(self.config)
        greedy_params = SamplingParams(temperature=0.0, max_tokens=params.max_tokens)
        name = f"evaluating {when}"
        samples = config.data.eval_samples
        sampled = session.start_rollout(self.held_out, samples, params, EVALUATION, name).result().groups
        greedy = session.start_rollout(self.held_out, 1, greedy_params, EVALUATION, f"{name}, greedy").result().groups
        self.folder.write_eval("before" if when == "before" else "after", sampled, greedy)
        if when == "before" or config.rollout.publish:  # else the engine has another policy than the learner
            self.mismatch[when] = self._measure_mismatch(sampled)
        self._round_began = time.monotonic()
        return sampled, greedy

    def _measure_mismatch(self, groups: list[ScoredGroup]) -> dict[str, float]:
        limit = getattr(self.config, self.algorithm.section).mismatch_candidates
        try:
            self._follow_stages()
            return self.session.call("comparing", self.learner.mismatch.remote(groups, limit))
        except ActorLost as lost:  # the next round makes a fresh learner; nothing that was learnt hangs on this
            self.console.info(f"engine and learner were not compared: {lost}")
            return {}

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
            algorithm=self.algorithm.name,
            task=self.config.task,
            mismatch=self.mismatch,
            steps=self.steps,
            warning=self.algorithm.learnt_nothing if status == "finished" and not self.steps else None,
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


def _sample_rows(groups: list[ScoredGroup]) -> Iterator[dict[str, Any]]:
    """Rows of the tracker's samples table."""
    for group in groups:
        for scored in group.candidates[:2]:
            yield {
                "prompt": prompt_text(group.prompt),
                "completion": scored.candidate.text,
                "reward": scored.reward,
                "verdict": verdict(scored),
            }
