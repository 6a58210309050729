"""The report is one page that loads nothing, says what the files say, and cannot be steered by a model's output."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_ray.config.errors import UserError
from ember_ray.tracking.report import read_run, render, write_report
from ember_ray.tracking.report_charts import Bar, Estimate, Series, line_chart, nice_ticks, short_number, stacked_bars
from ember_ray.tracking.report_diff import marked

VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Checks that tags close in order and collects links and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def rewrite(path: Path, change) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(row)) + "\n" for row in rows))


def test_the_report_is_one_page_that_loads_nothing(finished_run: Path) -> None:
    path = write_report(finished_run)
    assert path == finished_run / "report.html"
    text = path.read_text()
    page = Page(text)
    assert page.loads == ["data:,"]
    assert page.tags.isdisjoint({"script", "img", "iframe", "object", "form"})
    assert "http" not in text.replace("http-equiv", "").replace("http://www.w3.org/2000/svg", "")
    assert "default-src 'none'" in text
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ElementTree.fromstring(drawing)


def test_the_report_says_what_the_summary_says(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    words = " ".join(Page(write_report(finished_run).read_text()).words)
    for key in ("exact_match_sampled", "exact_match_greedy", "f1", "reward_mean"):
        assert f"{summary['before'][key]:.3f}" in words and f"{summary['after'][key]:.3f}" in words
        assert f"{summary['gain'][key]:+.3f}" in words
    for part in ("policy v6", "seed 0", "180,322", "288,420", "87.5 %", "learning", "r: 16", "torch 2"):
        assert part in words, part


def test_counts_of_changed_answers_are_right(finished_run: Path) -> None:
    rows = {}
    for when in ("before", "after"):
        lines = (finished_run / "eval" / f"{when}.jsonl").read_text().splitlines()
        rows[when] = {
            row["request_id"]: row["candidates"][0] for row in map(json.loads, lines) if row["kind"] == "greedy"
        }
    pairs = [(one, rows["after"][key]) for key, one in rows["before"].items()]
    changed = [(one, two) for one, two in pairs if one["text"] != two["text"]]
    fixed = sum(one["rewards"]["exact_match"] < two["rewards"]["exact_match"] for one, two in changed)
    broken = sum(one["rewards"]["exact_match"] > two["rewards"]["exact_match"] for one, two in changed)
    text = render(read_run(finished_run))
    assert (
        f"{len(changed)} of {len(pairs)} greedy answers changed: {fixed} became an exact match, {broken} were one"
        in text
    )
    assert fixed > broken > 0


def test_a_models_output_is_text_and_nothing_else(finished_run: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\x1b[31m\u2028"

    def change(row: dict) -> dict:
        row["prompt"] = [{"role": "user", "content": evil}]
        for number, candidate in enumerate(row["candidates"]):
            candidate |= {"text": evil + str(number) + row.get("kind", "") + str(candidate["reward"]), "reason": evil}
        return row

    for path in (*finished_run.glob("eval/*.jsonl"), *finished_run.glob("rollouts/*.jsonl")):
        rewrite(path, change)
    rewrite(finished_run / "metrics.jsonl", lambda row: row | {f"seconds/{evil}": 1.0, f"rewards/{evil}/mean": 0.5})
    summary = json.loads((finished_run / "summary.json").read_text())
    summary |= {"name": evil, "status": evil, "versions": {evil: evil}, "git_commit": evil}
    (finished_run / "summary.json").write_text(json.dumps(summary))
    (finished_run / "config.yaml").write_text(evil)
    text = write_report(finished_run).read_text()
    page = Page(text)
    assert page.tags.isdisjoint({"script", "img"}) and page.loads == ["data:,"]
    assert "\x1b" not in text
    assert "<script>alert(1)</script>" in "".join(page.words)


def test_an_interrupted_run_has_a_report(finished_run: Path) -> None:
    (finished_run / "eval" / "after.jsonl").unlink()
    summary = json.loads((finished_run / "summary.json").read_text())
    summary |= {"status": "interrupted", "after": None, "gain": None}
    (finished_run / "summary.json").write_text(json.dumps(summary))
    words = " ".join(Page(render(read_run(finished_run))).words)
    assert "interrupted" in words and f"{summary['before']['f1']:.3f}" in words


def test_a_crashed_run_without_a_summary_has_a_report(finished_run: Path) -> None:
    (finished_run / "summary.json").unlink()
    with open(finished_run / "metrics.jsonl", "a") as file:
        file.write('{"round": 7, "rew')  # killed while writing
    page = Page(render(read_run(finished_run)))
    assert "no summary" in page.words and "Exact match" in page.words


def test_numbers_that_are_missing_leave_a_gap(finished_run: Path) -> None:
    rewrite(finished_run / "metrics.jsonl", lambda row: row | ({"reward": None} if row["round"] == 3 else {}))
    text = render(read_run(finished_run))
    assert "training prompts, 2: " in text and text.count("training prompts, 3: ") == 1  # of exact match only


def test_a_very_long_run_stays_readable(finished_run: Path) -> None:
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    with open(finished_run / "metrics.jsonl", "w") as file:
        for number in range(1, 501):
            file.write(json.dumps(rows[number % 6] | {"round": number}) + "\n")
    words = Page(render(read_run(finished_run))).words
    assert "1 to 13" in words and "495 to 500" in words
    assert sum(bool(re.fullmatch(r"\d+ to \d+", word)) for word in words) == 39


def test_faults_of_the_folder_are_told_in_one_line(tmp_path: Path) -> None:
    def report(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ember_ray.tracking.report", *argv]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2], timeout=60
        )

    for argv, words in (([str(tmp_path / "none")], "no run folder"), ([str(tmp_path)], "holds neither summary.json")):
        done = report(*argv)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert words in done.stderr
    assert report().returncode == 2
    (tmp_path / "metrics.jsonl").write_text("x\n")
    with pytest.raises(UserError, match="metrics.jsonl:1: not a line of JSON"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match="summary.json: not JSON"):
        write_report(tmp_path)


def test_the_report_can_be_made_again_from_the_command_line(finished_run: Path) -> None:
    command = [sys.executable, "-m", "ember_ray.tracking.report", str(finished_run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2], timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{finished_run / 'report.html'}\n")
    assert (finished_run / "report.html").stat().st_size < 500_000


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.integers(2, 8))
def test_ticks_are_round_and_enclose_the_values(low: float, span: float, count: int) -> None:
    high = low + span
    ticks = nice_ticks(low, high, count)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= count + 3
    steps = {round((b - a) / (ticks[1] - ticks[0]), 3) for a, b in zip(ticks, ticks[1:], strict=False)}
    assert steps == {1.0}


def test_ticks_by_hand() -> None:
    assert nice_ticks(0.43, 0.71, 5) == [0.4, 0.5, 0.6, 0.7, 0.8]
    assert nice_ticks(0, 0, 3) == [-0.5, 0.0, 0.5]
    assert [short_number(value) for value in (0, 0.25, 1200.0, 1e-5)] == ["0", "0.25", "1,200", "1.0e-05"]


numbers = st.none() | st.floats(-1e5, 1e5)


@settings(deadline=None, max_examples=50)
@given(st.lists(numbers, max_size=20), st.floats(-10, 10), st.text(max_size=10).filter(str.isprintable))
def test_a_chart_of_anything_is_sound_and_stays_inside(values: list[float | None], value: float, name: str) -> None:
    points = [(float(x), y) for x, y in enumerate(values)]
    text = line_chart(
        [Series(name, points)],
        [Estimate(name, 0.0, value, (value - 1, value + 1))],
        x_ticks=[(x, str(int(x))) for x, _ in points],
    )
    tree = ElementTree.fromstring(text)
    circles = [node for node in tree.iter() if node.tag.endswith("circle") and node.get("class") == "dot c1"]
    assert len(circles) == sum(y is not None for y in values)
    for node in circles:
        assert 0 <= float(node.get("cx", "-1")) <= 520 and 0 <= float(node.get("cy", "-1")) <= 250


def test_a_line_goes_where_its_points_are() -> None:
    text = line_chart([Series("s", [(0, 0.0), (1, 1.0), (2, None), (3, 0.5)])], x_ticks=[(0, "0"), (3, "3")])
    ys = {float(y) for y in re.findall(r'class="dot c1" cx="[\d.]+" cy="([\d.]+)"', text)}
    assert ys == {210.0, 12.0, 111.0}  # bottom, top and the middle between them
    assert re.search(r'd="M[\d. ]+ L[\d. ]+ M[\d. ]+"', text)  # a gap where nothing was measured


def test_bars_have_lengths_in_proportion() -> None:
    text = stacked_bars(
        [Bar("round 1", [("rollout", 30.0), ("learning", 10.0)]), Bar("round 2", [("rollout", 0.0)])], {}
    )
    first, second = (float(width) for width in re.findall(r'<rect [^>]*? width="([\d.]+)"', text))
    assert (first + 1) / (second + 1) == pytest.approx(3, rel=1e-2)
    assert "round 1, learning: 10.0 s (25 %)" in text and "40.0 s" in text
    assert "nothing was measured" in stacked_bars([], {})


def test_differences_are_marked_and_the_rest_is_not() -> None:
    left, right = marked('{"a": 1, "b": "x"}', '{"a": 2, "b": "x", "c": 3}')
    assert left == "{&quot;a&quot;: <del>1</del>, &quot;b&quot;: &quot;x&quot;}"
    assert right == "{&quot;a&quot;: <ins>2</ins>, &quot;b&quot;: &quot;x&quot;<ins>, &quot;c&quot;: 3</ins>}"


@given(st.text(max_size=40), st.text(max_size=40))
def test_marked_texts_lose_nothing(before: str, after: str) -> None:
    for text, original in zip(marked(before, after), (before, after), strict=True):
        collected: list[str] = []
        parser = HTMLParser()
        parser.handle_data = collected.append  # type: ignore[method-assign]
        parser.feed(text)
        parser.close()
        assert "".join(collected) == original
