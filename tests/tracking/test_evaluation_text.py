"""Tables and the figure of an evaluation."""

from __future__ import annotations

from xml.etree import ElementTree

from ember_ray.tracking.evaluation_text import curves_svg, curves_table, evaluation_markdown, measures_table


def point(n: int, mean: float) -> dict:
    return {"n": n, "mean": mean, "interval": [mean - 0.1, mean + 0.1], "prompts": 5}


RESULT = {
    "prompts": 5,
    "samples": 10,
    "verifier_failures": 1,
    "exact_match_sampled": 0.25,
    "exact_match_sampled_interval": [0.2, 0.3],
    "exact_match_greedy": 0.5,
    "exact_match_greedy_interval": None,
    "execute_sampled": 0.75,
    "execute_sampled_interval": [0.7, 0.8],
    "pass_at_k": [point(1, 0.25), point(2, 0.75)],
    "best_of_n": {
        "valid_logprob": {"points": [point(1, 0.25), point(2, 0.375)]},
        "majority": {"points": [point(1, 0.25), point(2, 0.5)]},
        "oracle": {"points": [point(1, 0.25), point(2, 0.75)]},
    },
    "has_logprobs": False,
}


def test_tables_have_what_was_measured_and_no_more() -> None:
    lines = measures_table(RESULT).splitlines()
    assert len({len(line) for line in lines}) == 1  # columns stand below each other
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2:] == [
        ["exact match", "0.25 [0.20, 0.30]", "0.50"],
        ["executes", "0.75 [0.70, 0.80]", "-"],
    ]
    last = [cell.strip() for cell in curves_table(RESULT).splitlines()[-1].strip("|").split("|")]
    assert [cell.split()[0] for cell in last] == ["2", "0.38", "0.50", "0.75"]


def test_the_page_says_what_was_left_out_and_marks_the_oracle() -> None:
    text = evaluation_markdown(RESULT, "a model", ["it cost nothing"], "curves.svg")
    assert text.startswith("# a model\n") and "1 left out" in text and "- it cost nothing" in text
    assert "(sees gold)" in text and "![Exact match over N](curves.svg)" in text and "choice is random" in text
    bare = {key: RESULT[key] for key in ("prompts", "samples", "verifier_failures")}
    assert "Best of N" not in evaluation_markdown(bare, "a model", [], None)


def test_the_figure_is_a_document_of_its_own() -> None:
    root = ElementTree.fromstring(curves_svg(RESULT))
    words = "".join(root.itertext())
    for name in ("oracle = pass@N", "majority", "log-probability", "greedy", "N samples", "0.75"):
        assert name in words
    assert "var(--c1)" in words  # the style is in it
    nothing = {**RESULT, "pass_at_k": [], "best_of_n": {name: {"points": []} for name in RESULT["best_of_n"]}}  # type: ignore[attr-defined]
    ElementTree.fromstring(curves_svg({**nothing, "exact_match_greedy": None}))
