"""Rows of a comparison, read off run folders, and the report that is made from rows alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_ray.config.compare_schema import CompareConfig
from ember_ray.config.errors import UserError
from ember_ray.evaluation.cost import gpu_dollars
from ember_ray.tracking.comparison import report_text, write_comparison
from ember_ray.tracking.comparison_cells import Cell, plan_cells
from ember_ray.tracking.comparison_figures import whole_rounds
from ember_ray.tracking.comparison_lines import Line, lines_of
from ember_ray.tracking.comparison_rows import cell_row, find_run, read_groups
from ember_ray.tracking.comparison_tables import cells_csv, in_words, summary_csv
from ember_ray.tracking.evaluation import gains, summarize
from ember_ray.tracking.evaluation_curves import Reading, TaskReader
from ember_ray.tracking.run_folder import RunFolder
from ember_ray.tracking.summary import build_summary
from tests.tracking.conftest import make_groups

READER = TaskReader(("parse", "schema"), lambda group, some: [Reading(True, one.candidate.text) for one in some])
CONFIG = CompareConfig(
    tasks=["extract"],
    algorithms=["sft", "dpo", "sft_clean"],
    designs=["decomposed", "binary"],
    seeds=[0, 1],
    token_budget=1000,
)
SKILLS = {"sft": (0.25, 0.55), "sft_clean": (0.25, 0.95), "dpo": (0.55, 0.85)}
PROMPTS = 32


def finished_run(folder: Path, cell: Cell, skills: tuple[float, float], status: str = "finished") -> Path:
    """A run folder as a recipe leaves it: four rounds of 260 tokens and 5 s where it learns from candidates."""
    run = RunFolder.create(folder / "runs" / cell.id, cell.recipe)
    parts = []
    for skill, version in zip(skills, (0, 4), strict=True):
        parts.append(
            (make_groups(PROMPTS, 4, skill, cell.seed, version), make_groups(PROMPTS, 1, skill, cell.seed, version))
        )
    before, after = parts
    run.write_eval("before", *before)
    run.write_eval("after", *after)
    for number in range(1, 5):
        rollout = {"generated_tokens": 260, "exact_match": skills[0] + 0.05 * number, "reward": 0.5}
        rollout |= {"mismatch/mean": 1e-7, "mismatch/max": 1e-6 * number}
        run.append_metrics({"round": number, "seconds/round": 5.0, **(rollout if cell.design else {})})
    run.write_summary(
        build_summary(
            name=cell.recipe,
            seed=cell.seed,
            status=status,  # type: ignore[arg-type]
            rounds=4,
            before=summarize(*before, cell.seed),
            after=summarize(*after, cell.seed),
            gain=gains(before, after, cell.seed),
            seconds={"rollout": 8.0, "learning": 12.0},
            counters={"generated_tokens": 5000 + 1040 * bool(cell.design)},
            policy_version=4,
            mismatch={"before": {"mismatch/mean": 1e-8}, "after": {"mismatch/mean": 3e-7, "mismatch/max": 2e-6}},
        )
    )
    run.close()
    return run.path


def row_of(cell: Cell, run: Path, folder: Path, at_once: int = 2, gpus: int = 0) -> dict[str, Any]:
    row = cell_row(
        cell,
        run,
        folder,
        reader=READER,
        wall_seconds=60.0,
        at_once=at_once,
        gpus=gpus,
        gpu_price_per_hour=3.0,
        token_budget=CONFIG.token_budget,
        machine="a test",
    )
    return json.loads(json.dumps(row))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compared")
    return [row_of(cell, finished_run(folder, cell, SKILLS[cell.algorithm]), folder) for cell in plan_cells(CONFIG)]


def test_a_row_says_what_the_run_came_to(rows: list[dict[str, Any]]) -> None:
    sft, dpo = rows[0], rows[1]
    assert (dpo["cell"], dpo["start"], dpo["design"]) == ("dpo_extract_decomposed_s0", sft["cell"], "decomposed")
    assert dpo["generated_tokens"] == 1040 and dpo["evaluation_tokens"] == 5000 and dpo["token_budget"] == 1000
    assert sft["generated_tokens"] == 0 and sft["evaluation_tokens"] == 5000 and sft["token_budget"] is None
    assert [(point["generated_tokens"], point["seconds"]) for point in dpo["curve"]] == [
        *((260, 5.0), (520, 10.0), (780, 15.0), (1040, 20.0)),
    ]
    assert dpo["training_seconds"] == 20.0 and dpo["dollars"] == pytest.approx(gpu_dollars(10.0, 3.0))
    assert dpo["mismatch"] == {"mean": 1e-7, "max": 4e-6} and sft["mismatch"] == {"mean": 3e-7, "max": 2e-6}
    assert dpo["run"].startswith("runs/dpo_extract_decomposed_s0/dpo_extract_")
    assert dpo["before"]["pass_at_k"][0]["mean"] == pytest.approx(dpo["before"]["exact_match_sampled"])
    assert dpo["after"]["best_of_n"]["oracle"]["points"][-1]["n"] == 4


def test_a_cell_pays_for_its_share_of_a_gpu(tmp_path: Path) -> None:
    cell = plan_cells(CONFIG)[1]
    row = row_of(cell, finished_run(tmp_path, cell, (0.3, 0.4)), tmp_path, at_once=8, gpus=2)
    assert row["dollars"] == pytest.approx(gpu_dollars(row["training_seconds"] / 4, 3.0))
    report = report_text([row], CONFIG, {}, [])
    assert "8 cells on 2 GPUs at a time" in report and "dollars an hour of a GPU" in report


def test_beyond_the_interval_is_the_paired_gains(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    assert rows[1]["beyond_interval"] and rows[1]["gain"]["exact_match_sampled_interval"][0] > 0
    cell = plan_cells(CONFIG)[1]
    same = row_of(cell, finished_run(tmp_path, cell, (0.5, 0.5)), tmp_path)
    assert not same["beyond_interval"] and not same["above_start_interval"]


def test_only_a_finished_run_gives_a_row(tmp_path: Path) -> None:
    cell = plan_cells(CONFIG)[0]
    run = finished_run(tmp_path, cell, (0.3, 0.4), status="interrupted")
    with pytest.raises(UserError, match="is interrupted, not finished"):
        row_of(cell, run, tmp_path)
    assert find_run(run.parent) == run
    finished_run(tmp_path, cell, (0.3, 0.4))
    with pytest.raises(UserError, match="holds 2 runs"):
        find_run(run.parent)
    (run / "eval" / "after.jsonl").write_text('{"kind": "sampled"}\n')
    with pytest.raises(UserError, match="after.jsonl' is no evaluation: a row lacks 'candidates'"):
        read_groups(run / "eval" / "after.jsonl")


def test_groups_are_read_back_as_they_were(tmp_path: Path) -> None:
    groups = make_groups(5, 3, 0.5, 0), make_groups(5, 1, 0.5, 0)
    folder = RunFolder(tmp_path)
    read = read_groups(folder.write_eval("before", *groups))
    assert summarize(*read, 0) == summarize(*groups, 0)
    assert [group.candidates[0].candidate.text for group in read[0]] == [
        g.candidates[0].candidate.text for g in groups[0]
    ]


def test_lines_go_over_seeds_and_the_base_model_is_what_sft_started_from(rows: list[dict[str, Any]]) -> None:
    lines = lines_of(rows, "extract", CONFIG.designs)
    assert [(line.algorithm, line.design) for line in lines] == [
        *(("base", None), ("sft", None), ("dpo", "decomposed"), ("dpo", "binary"), ("sft_clean", None)),
    ]
    base, sft = lines[0], lines[1]
    values = [row["before"]["exact_match_sampled"] for row in rows if row["algorithm"] == "sft"]
    found = base.quality("exact_match_sampled")
    assert found is not None and (found.low, found.high, found.seeds) == (min(values), max(values), 2)
    assert found.mean == pytest.approx(sum(values) / 2) and base.gain("exact_match_sampled") is None
    one = Line("extract", "sft", None, sft.rows[:1]).quality("exact_match_sampled")
    assert one is not None and [one.low, one.high] == sft.rows[0]["after"]["exact_match_sampled_interval"]
    assert sft.quality("rows") is None and sft.pass_at(16) is None


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_a_spread_holds_every_seed(values: list[float]) -> None:
    found = Line("sql", "dpo", "binary", tuple({"dollars": value} for value in values)).number("dollars")
    assert found is not None and found.seeds == len(values)
    if len(values) > 1:
        assert found.low is not None and found.high is not None
        assert found.low <= min(values) and max(values) <= found.high
        assert found.low - 1e-9 <= found.mean <= found.high + 1e-9
    assert f"{found.mean:.3f}" in in_words(found)


def test_the_tables_have_a_row_a_cell_and_a_row_a_learner(rows: list[dict[str, Any]]) -> None:
    cells = list(csv.DictReader(cells_csv(rows).splitlines()))
    assert [cell["cell"] for cell in cells] == [row["cell"] for row in rows]
    assert float(cells[1]["gain_exact_match_sampled"]) == rows[1]["gain"]["exact_match_sampled"]
    assert (cells[1]["token_budget"], cells[0]["token_budget"], cells[1]["beyond_interval"]) == ("1000", "", "1")
    lines = list(csv.DictReader(summary_csv(rows, ["extract"], CONFIG.designs).splitlines()))
    assert [(line["algorithm"], line["seeds"]) for line in lines] == [
        *(("base", "2"), ("sft", "2"), ("dpo", "2"), ("dpo", "2"), ("sft_clean", "2")),
    ]
    assert lines[2]["beyond_interval"] == "2" and lines[0]["beyond_interval"] == ""
    assert float(lines[2]["generated_tokens_min"]) == 1040


def test_the_report_says_who_improved_at_what_budget_and_what_is_missing(rows: list[dict[str, Any]]) -> None:
    worse = [dict(row) for row in rows if row["cell"] != "sft_clean_extract_s1"]
    for row in worse:
        if row["cell"] == "dpo_extract_decomposed_s1":
            row["beyond_interval"] = False
        if row["design"] == "binary":
            row["generated_tokens"] = 900
    text = report_text(worse, CONFIG, {"sft_clean_extract_s1": "the disk was full"}, ["figures/learners.png"])
    assert "SFT improved the base model beyond its interval for 2 of 2 seeds:" in text
    assert "DPO improved the SFT checkpoint beyond its interval for 1 of 2 seeds only:" in text
    assert "they took -10.0% to +4.0% of that" in text
    assert "- `sft_clean_extract_s1`: the disk was full" in text
    assert "| learner | decomposed | decomposed: gain | binary | binary: gain |" in text
    assert "| oracle (sees the gold answer) |" in text and "](figures/learners.png)" in text
    assert "nan" not in text.lower().split()
    whole = report_text(rows, CONFIG, {}, [])
    assert whole.rstrip().endswith("None.")


def test_a_curve_stands_at_what_its_policy_has_cost_and_leaves_rounds_cut_short_out() -> None:
    tokens, exact = (100, 190, 230, 330), (0.1, None, 0.9, 0.3)
    curve = [{"generated_tokens": total, "exact_match": value} for total, value in zip(tokens, exact, strict=True)]
    found = whole_rounds({"curve": curve}, lambda row, point: point["generated_tokens"] / 10)
    assert found == [(0.0, 0.1), (23.0, 0.3)]


@pytest.mark.slow
def test_figures_are_made_from_the_rows_alone(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    written = write_comparison(tmp_path, rows, CONFIG, {})
    names = {path.relative_to(tmp_path).as_posix() for path in written}
    figures = ("learners", "quality_over_tokens", "quality_over_seconds", "quality_over_dollars")
    figures += ("best_of_n_inference", "reward_designs")
    assert names == {"report.md", "table2.csv", "summary.csv", *(f"figures/{name}.png" for name in figures)}
    words = {
        "quality_over_tokens": ("generated tokens learnt from (thousands)", "exact match of sampled answers", "DPO"),
        "quality_over_seconds": ("training time after SFT (s)", "SFT on clean answers"),
        "quality_over_dollars": ("US cents; $3/h, 1/2 machine",),
        "best_of_n_inference": ("oracle (sees the gold answer)", "most frequent valid answer"),
        "reward_designs": ("binary reward", "decomposed reward"),
        "learners": ("base model", "greedy"),
    }
    for name in figures:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (tmp_path / "figures" / f"{name}.svg").read_text()
        assert all(word in svg for word in words[name]), name
    first = (tmp_path / "figures" / "learners.svg").read_bytes()
    one_design = CONFIG.model_copy(update={"designs": ["decomposed"]})
    again = write_comparison(tmp_path, [row for row in rows if row["design"] != "binary"], one_design, {})
    assert "reward_designs" not in {path.stem for path in again}
    assert (tmp_path / "figures" / "learners.svg").read_bytes() == first


def test_a_comparison_without_a_finished_cell_is_a_report_of_what_is_missing(tmp_path: Path) -> None:
    write_comparison(tmp_path, [], CONFIG, {})
    text = (tmp_path / "report.md").read_text()
    assert text.count("not run yet") == len(plan_cells(CONFIG)) == 8
