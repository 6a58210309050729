"""What the coordinator asks of the stages for a batch of rows."""

from __future__ import annotations

import dataclasses

import pytest

from actors.rollout import build_requests, request_seed
from ember_ray.engine.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0.7, max_tokens=5)


def test_a_request_for_each_row(make_rows) -> None:
    rows = make_rows(3)
    requests = build_requests(rows, 4, PARAMS, seed=1, round_number=2)
    assert [request.request_id for request in requests] == ["row-0", "row-1", "row-2"]
    assert all(request.candidate_indices == (0, 1, 2, 3) for request in requests)
    assert [request.prompt_token_ids for request in requests] == [row.prompt_token_ids for row in rows]
    assert requests[0].sampling_params == dataclasses.replace(PARAMS, seed=request_seed(1, 2, 0))


def test_the_seed_of_a_row_does_not_depend_on_its_neighbours(make_rows) -> None:
    rows = make_rows(5)
    together = build_requests(rows, 2, PARAMS, seed=1, round_number=0)
    alone = build_requests(rows[3:4], 2, PARAMS, seed=1, round_number=0)
    assert together[3] == alone[0]


def test_rows_with_the_same_prompt_do_not_get_the_same_candidates(make_rows) -> None:
    row = make_rows(1)[0]
    twin = dataclasses.replace(row, example=dataclasses.replace(row.example, id="twin"))
    first, second = build_requests([row, twin], 2, PARAMS, seed=1, round_number=0)
    assert first.sampling_params.seed != second.sampling_params.seed


def test_seeds_differ_by_run_round_and_repeat() -> None:
    seeds = {request_seed(run, number, repeat) for run in range(20) for number in range(20) for repeat in range(5)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_in_the_parameters_replaces_the_seed_of_the_run(make_rows) -> None:
    params = dataclasses.replace(PARAMS, seed=9)
    first = build_requests(make_rows(1), 1, params, seed=1, round_number=0)
    second = build_requests(make_rows(1), 1, params, seed=2, round_number=0)
    assert first == second
    assert first[0].sampling_params.seed == request_seed(9, 0, 0)


def test_what_cannot_be_asked_is_refused(make_rows) -> None:
    rows = make_rows(2)
    with pytest.raises(ValueError, match="at least one prompt"):
        build_requests([], 1, PARAMS, 0, 0)
    with pytest.raises(ValueError, match="at least one candidate"):
        build_requests(rows, 0, PARAMS, 0, 0)
    with pytest.raises(ValueError, match="two rows of a rollout have the id 'row-0'"):
        build_requests([rows[0], rows[0]], 1, PARAMS, 0, 0)
    with pytest.raises(ValueError, match="'row-1' has no tokens"):
        build_requests([rows[0], dataclasses.replace(rows[1], prompt_token_ids=())], 1, PARAMS, 0, 0)
