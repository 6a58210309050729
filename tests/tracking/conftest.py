"""Runs as they come out of the loop, with answers that a small model would give."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ember_ray.config.schema import DpoExtractConfig
from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
from ember_ray.engine.request import Candidate
from ember_ray.tracking.evaluation import gains, summarize
from ember_ray.tracking.metrics import rollout_metrics
from ember_ray.tracking.run_folder import RunFolder
from ember_ray.tracking.summary import build_summary

VENDORS = ("Blau & Söhne", "Kestrel Freight", "North <b>Pier</b>", "Ada's Bakery")


def make_candidate(
    rng: random.Random, gold: dict, skill: float, request_id: str, index: int, version: int
) -> ScoredCandidate:
    """An answer with dates left as they were, dropped fields or chatter, the less so the higher the skill."""
    answer = dict(gold)
    reason = None
    if rng.random() > skill:
        fault = rng.choice(("date", "dropped", "chatter"))
        if fault == "date":
            answer["date"] = "3 March 2024"
            reason = "date: '3 March 2024' is not 2024-03-03"
        elif fault == "dropped":
            del answer["total"]
            reason = "total: missing"
        else:
            answer["vendor"] = answer["vendor"].lower() + " gmbh"
            reason = "vendor: another text"
    exact = float(answer == gold)
    text = ("Here it is: " if reason and rng.random() < 0.3 else "") + json.dumps(answer, ensure_ascii=False)
    right = sum(answer.get(key) == value for key, value in gold.items())
    f1 = 2 * right / (len(answer) + len(gold))
    tokens = [rng.randrange(512) for _ in range(rng.randrange(30, 60))]
    logprobs = [-abs(rng.gauss(0.2, 0.3)) for _ in tokens]
    return ScoredCandidate(
        Candidate(request_id, index, tokens, logprobs, list(logprobs), text, "stop", version),
        reward=0.2 + 0.2 + 0.6 * f1,
        components={"parse": 1.0, "schema": float("total" in answer), "f1": f1, "exact_match": exact},
        reason=reason,
    )


def make_groups(count: int, candidates: int, skill: float, seed: int, version: int = 0) -> list[ScoredGroup]:
    """Groups of invoice prompts; the same seed gives the same prompts."""
    groups = []
    for number in range(count):
        prompt_rng = random.Random(f"{seed}-{number}")
        gold = {
            "vendor": prompt_rng.choice(VENDORS),
            "date": "2024-03-03",
            "total": prompt_rng.randrange(100, 90_000) / 100,
        }
        request_id = f"invoice-{number:04d}"
        prompt = [
            {"role": "system", "content": "Extract the invoice as JSON."},
            {
                "role": "user",
                "content": f"INVOICE\nFrom: {gold['vendor']}\nIssued 3 March 2024\nTotal due: {gold['total']:,} EUR",
            },
        ]
        rng = random.Random(f"{seed}-{number}-{version}-{candidates}")
        scored = [make_candidate(rng, gold, skill, request_id, index, version) for index in range(candidates)]
        groups.append(ScoredGroup(request_id, prompt, tuple(range(40)), scored))
    return groups


def make_run(output_dir: Path, rounds: int = 6, prompts: int = 64, status: str = "finished") -> Path:
    """A whole run folder, written by the code that a recipe uses."""
    config = DpoExtractConfig(rounds=rounds)
    folder = RunFolder.create(output_dir, config.name)
    folder.write_config(config)
    before = make_groups(prompts, 4, 0.42, 1), make_groups(prompts, 1, 0.5, 1)
    folder.write_eval("before", *before)
    seconds = {"starting Ray": 4.8, "loading the model": 1.2, "evaluating": 21.0}
    for number in range(1, rounds + 1):
        groups = make_groups(16, 8, 0.42 + 0.05 * number, 100 + number, number - 1)
        folder.write_rollouts(number, groups)
        took = {"rollout": 9.0 + number % 3, "learning": 12.5 - number * 0.4, "publishing": 0.3}
        folder.append_metrics(
            {
                "round": number,
                **rollout_metrics(groups),
                "pairs": 60 - number,
                "loss": 0.69 / number,
                "rewards/chosen": 0.1 * number,
                "rewards/rejected": -0.1 * number,
                "rewards/margins": 0.2 * number,
                "rewards/accuracies": min(1.0, 0.5 + 0.08 * number),
                "tokens_per_second": 2300 + 40 * number,
                "prefix_hit_rate": 0.874,
                "policy_version": number,
                **{f"seconds/{name}": value for name, value in took.items()},
            }
        )
        for name, value in took.items():
            seconds[name] = seconds.get(name, 0.0) + value
    finished = status == "finished"
    after = make_groups(prompts, 4, 0.66, 1, rounds), make_groups(prompts, 1, 0.7, 1, rounds)
    if finished:
        folder.write_eval("after", *after)
    folder.write_summary(
        build_summary(
            name=config.name,
            seed=config.seed,
            status=status,  # type: ignore[arg-type]
            rounds=rounds,
            before=summarize(*before, seed=0),
            after=summarize(*after, seed=0) if finished else None,
            gain=gains(before, after, seed=0) if finished else None,
            seconds=seconds,
            counters={"generated_tokens": 180_322.0, "prefill_tokens": 41_204.0, "prefix_hit_tokens": 288_420.0},
            policy_version=rounds,
        )
    )
    folder.close()
    return folder.path


@pytest.fixture
def finished_run(tmp_path: Path) -> Path:
    """A finished run of six rounds."""
    return make_run(tmp_path / "runs")
