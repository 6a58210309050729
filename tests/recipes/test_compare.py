"""The comparison command: which cells it plans, and that a call goes on where another one ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ember_ray.config.compare_schema import CompareConfig
from ember_ray.config.errors import ConfigError, UserError
from ember_ray.config.load import load_config
from ember_ray.config.schema import DpoExtractConfig
from ember_ray.tracking.comparison_cells import LEARNERS, Cell, check_cell, plan_cells
from recipes.compare_run import Comparison, append, held_out, last_words, locked, whole_rows
from recipes.learners import DPO
from recipes.setup import load_rows
from tests.support.command_line import ROOT, Command, run

RECIPE = "recipes.compare"
TINY = (
    "tasks=[extract]",
    "algorithms=[sft, dpo]",
    "token_budget=3000",
    "settings.all=[data.eval_prompts=8, data.eval_samples=2, data.train_examples=64, rollout.prompts_per_round=8]",
    "settings.sft=[rounds=1, sft.rows_per_round=32]",
    "settings.dpo=[rounds=8]",
    "output_dir=compared",
)


def some_of(names: Any) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.sampled_from(names), min_size=1, unique=True)


@given(
    some_of(["extract", "sql"]),
    some_of(["best_of_n", "dpo", "grpo", "sft_clean"]),
    some_of(["binary", "weighted", "decomposed"]),
    st.lists(st.integers(0, 9), min_size=1, max_size=4, unique=True),
)
def test_every_cell_is_planned_once_and_after_what_it_starts_from(
    tasks: list[Any], algorithms: list[Any], designs: list[Any], seeds: list[int]
) -> None:
    config = CompareConfig(tasks=tasks, algorithms=["sft", *algorithms], designs=designs, seeds=seeds)
    cells = plan_cells(config)
    names = [cell.id for cell in cells]
    learners = len(set(algorithms) & set(LEARNERS))
    others = 1 + ("sft_clean" in algorithms)
    assert len(set(names)) == len(names) == len(tasks) * len(seeds) * (learners * len(designs) + others)
    for place, cell in enumerate(cells):
        assert cell.start is None or cell.start in names[:place]
        assert (cell.start is None) == (cell.design is None) == (cell.algorithm in ("sft", "sft_clean"))
        assert f"seed={cell.seed}" in cell.settings
    places = [(designs.index(cell.design or designs[0]), seeds.index(cell.seed)) for cell in cells]
    assert places == sorted(places), "a design is finished before the next, seed by seed"


def cell_of(config: CompareConfig, name: str) -> Cell:
    (found,) = (cell for cell in plan_cells(config) if cell.id == name)
    return found


def test_the_narrowest_setting_counts_and_the_comparison_has_the_last_word() -> None:
    settings = {
        "dpo_sql": ["rounds=5"],
        "all": ["rounds=1"],
        "dpo": ["rounds=4"],
        "sql": ["rounds=2"],
        "sft": ["sft.faults=0.5"],
    }
    config = CompareConfig(settings=settings, designs=["binary"], token_budget=7)
    dpo = cell_of(config, "dpo_sql_binary_s0")
    assert dpo.settings == (
        *("rounds=1", "rounds=2", "rounds=4", "rounds=5"),
        *("seed=0", "reward.design=binary", "rollout.token_budget=7"),
    )
    assert cell_of(config, "sft_clean_extract_s0").settings == (
        *("rounds=1", "sft.faults=0.5", "sft.faults=0.0", "seed=0"),
    )
    arguments = dpo.arguments(Path("out"), Path("out/runs/sft_sql_s0/sft_sql_1"))
    assert (
        arguments[:2] == ["-m", "recipes.dpo_sql"]
        and "model.adapter=out/runs/sft_sql_s0/sft_sql_1/adapter" in arguments
    )
    assert {"tracker=none", "output_dir=out/runs/dpo_sql_binary_s0", "data.databases=out/databases"} <= set(arguments)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["algorithms=[dpo]"], "must name sft"),
        (["seeds=[1, 1]"], "seeds names something twice"),
        (["settings.ppo=[rounds=1]"], "settings.ppo belongs to no cell"),
        (["settings.all=[seed=3]"], "settings.all sets seed"),
        (["settings.dpo=[dpo.betta=1]"], "cell dpo_extract_decomposed_s0: .*'dpo.betta'.*did you mean 'dpo.beta'"),
        (["settings.grpo=[rounds=1]"], "cell grpo_extract_decomposed_s0: rounds=1 of .* less than token_budget"),
    ],
)
def test_bad_settings_are_told_before_anything_runs(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        for cell in plan_cells(load_config(CompareConfig, ROOT / "configs" / "compare_short.yaml", overrides)):
            check_cell(cell)


@pytest.mark.parametrize("form", ["compare", "compare_short"])
def test_the_shipped_forms_have_good_settings(form: str) -> None:
    cells = plan_cells(load_config(CompareConfig, ROOT / "configs" / f"{form}.yaml"))
    for cell in cells:
        check_cell(cell)
    assert len(cells) == {"compare": 2 * 3 * (2 + 3 * 3), "compare_short": 2 * 5}[form]


def test_dry_run_lists_every_cell_with_its_command(tmp_path: Path) -> None:
    ended = run(RECIPE, "--dry-run", "seeds=[0, 4]", cwd=tmp_path)
    assert ended.status == 0 and not (tmp_path / "runs").exists()
    assert "20 cells" in ended.stdout and "\n  grpo_sql_decomposed_s4\n" in ended.stdout
    assert ended.stdout.count("python -m recipes.") == 20
    assert "model.adapter=runs/compare_short/runs/sft_sql_s4/sft_sql_<timestamp>/adapter" in ended.stdout


def test_half_a_row_is_cut_off_before_the_next_is_added(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text('{"cell": "a"}\n{"cell": "b", "tor')
    assert whole_rows(path) == [{"cell": "a"}]
    append(path, {"cell": "c"})
    assert [row["cell"] for row in whole_rows(path)] == ["a", "c"]


def test_a_row_of_other_settings_is_not_taken_for_the_cell(tmp_path: Path) -> None:
    config = CompareConfig(output_dir=str(tmp_path))
    cells = plan_cells(config)
    append(tmp_path / "cells.jsonl", {"cell": cells[0].id, "settings": [*cells[0].settings, "rounds=9"]})
    with pytest.raises(UserError, match=f"{cells[0].id} made with other settings .rounds=9."):
        Comparison(config, cells)


def test_cells_go_to_the_visible_gpu_with_the_fewest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CompareConfig(output_dir=str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 1")
    comparison = Comparison(config, plan_cells(config))
    given = []
    for _ in range(4):
        given.append(comparison._free_gpu())
        comparison._running.append(SimpleNamespace(gpu=given[-1]))
    assert given == ["3", "1", "3", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Comparison(config, plan_cells(config))._free_gpu() is None


def test_when_the_time_is_over_cells_are_ended_and_what_is_there_is_reported(tmp_path: Path) -> None:
    ended = run(RECIPE, *TINY, "time_limit_s=0.5", cwd=tmp_path)
    assert ended.status == 1 and "time_limit_s=0.5 is over; 2 cells are missing" in ended.stdout
    assert "`sft_extract_s0`: not run yet" in (tmp_path / "compared" / "report.md").read_text()


def test_a_cell_is_read_with_the_rows_that_its_run_held_out(tmp_path: Path) -> None:
    rows = [{"prompt": f"a is {n}", "gold": {"a": n}, "schema": {"type": "object"}} for n in range(20)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for data in ({"train": str(tmp_path / "own.jsonl")}, {"eval_prompts": 3, "train_examples": 64}):
        config = DpoExtractConfig.model_validate({"data": data, "output_dir": str(tmp_path / "runs"), "seed": 5})
        measured = [row.example.id for row in load_rows(config, DPO)[1]]
        assert [example.id for example in held_out(config)] == measured


def test_one_call_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(UserError, match="another comparison runs"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_the_reason_of_a_failure_is_its_error_or_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for text, reason in (
        ("one\nerror: no model folder 'x'\ntwo\n", "no model folder 'x'"),
        ("Traceback\nKeyError: 'a'\n\n", "KeyError: 'a'"),
        ("", "it said nothing"),
    ):
        log.write_text(text)
        assert last_words(log) == reason


@pytest.mark.slow
def test_failed_cells_are_listed_and_take_those_that_start_from_them_along(tmp_path: Path) -> None:
    mine = [*TINY[:-2], "settings.sft_extract=[data.train=none.jsonl, data.eval=none.jsonl]", TINY[-1]]
    ended = run(RECIPE, *mine, "settings.dpo=[rounds=8]", cwd=tmp_path)
    assert ended.status == 1 and ended.left == []
    assert "FAILED    sft_extract_s0" in ended.stdout and "none.jsonl" in ended.stdout
    report = (tmp_path / "compared" / "report.md").read_text()
    assert "`sft_extract_s0`" in report and "none.jsonl" in report
    assert "`dpo_extract_decomposed_s0`: cell sft_extract_s0, which it starts from, failed" in report
    late = run(RECIPE, *TINY, "algorithms=[sft]", "cell_timeout_s=2", "output_dir=late", cwd=tmp_path)
    assert late.status == 1 and late.left == [] and "it took longer than cell_timeout_s=2" in late.stdout


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for(command: Command, path: Path) -> None:
    deadline = time.monotonic() + 150
    while not path.exists():
        assert time.monotonic() < deadline and command.process.poll() is None
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="parents' deaths are told on Linux only")
def test_a_cell_whose_parent_died_before_it_began_ends_at_once() -> None:
    begin = "import os; from recipes.compare_run import _end_with_parent as end; end(os.getppid())"
    code = f"{begin}; print(1, flush=True); end(-1); print(2)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "1\n"), ended.stderr


@pytest.mark.slow
def test_resume_skips_finished_cells_after_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "compared"
    # killed without a chance to clean up, in its first cell
    command = Command(RECIPE, *TINY, cwd=tmp_path)
    wait_for(command, folder / "logs" / "sft_extract_s0.log")
    os.kill(command.process.pid, signal.SIGKILL)
    assert command.end(60).left == [], "the cell outlived its parent"
    assert not (folder / "cells.jsonl").exists()
    # Ctrl-C in its second
    command = Command(RECIPE, *TINY, cwd=tmp_path)
    wait_for(command, folder / "logs" / "dpo_extract_decomposed_s0.log")
    (first,) = rows(folder / "cells.jsonl")
    os.kill(command.process.pid, signal.SIGINT)
    ended = command.end(60)
    assert ended.status == 130 and ended.left == [], ended.stderr
    # to the end
    ended = run(RECIPE, *TINY, cwd=tmp_path)
    assert ended.status == 0 and ended.left == [], ended.stderr
    assert "2 cells, 1 of them finished" in ended.stdout and "begun     sft_extract_s0" not in ended.stdout
    found = rows(folder / "cells.jsonl")
    assert found[0] == first and [row["cell"] for row in found] == ["sft_extract_s0", "dpo_extract_decomposed_s0"]
    # the learner started from what the skipped cell had learnt, and got its budget
    sft, dpo = found
    measures = ("exact_match_sampled", "exact_match_greedy", "f1")
    assert [dpo["before"][name] for name in measures] == [sft["after"][name] for name in measures]
    assert 0.8 * 3000 <= dpo["generated_tokens"] == dpo["curve"][-1]["generated_tokens"] <= 1.2 * 3000
    assert sft["generated_tokens"] == 0 < sft["evaluation_tokens"] and 0 < dpo["mismatch"]["max"] < 1e-3
    assert (folder / "figures" / "quality_over_tokens.svg").exists()
    again = run(RECIPE, f"report={folder}", cwd=tmp_path)
    assert again.status == 0 and "report.md" in again.stdout
