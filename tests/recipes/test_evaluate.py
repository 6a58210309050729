"""Evaluations of the engine and of endpoints, by the same code, on the same rows."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ember_ray.assets import tiny_model_path
from ember_ray.config.cli import find_config
from ember_ray.config.errors import UserError
from ember_ray.config.evaluate_schema import EvaluateConfig
from ember_ray.config.load import load_config
from ember_ray.data.example import Example
from recipes.evaluate import as_run, main
from recipes.setup import held_out_examples
from tests.support.chat_server import completion, serving
from tests.support.command_line import run
from tests.support.peft_adapters import make_adapter

KEY = "sk-secret-123"


def configured(*overrides: str) -> EvaluateConfig:
    return load_config(EvaluateConfig, find_config("evaluate"), overrides)


def rows_of(*overrides: str) -> list[Example]:
    return held_out_examples(as_run(configured(*overrides)))


def only_folder(parent: Path) -> Path:
    (found,) = parent.glob("evaluate_*")
    return found


def scripted(config: EvaluateConfig) -> Any:
    """Greedy answers are right; of four samples the first two are right, one is wrong and the last is none."""
    answers = {}
    for example in held_out_examples(as_run(config)):
        if config.task == "extract":
            right, wrong = json.dumps(example.gold), json.dumps({**example.gold, next(iter(example.gold)): None})  # type: ignore[dict-item,call-overload]
        else:
            right, wrong = str(example.gold), "SELECT 'neither', 'this', 'nor', 'that'"
        answers[example.messages[-1]["content"]] = (right, right, wrong, "I do not know")

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        texts = answers[request["messages"][-1]["content"]]
        if request["temperature"] == 0:
            return completion([texts[0]], [-0.1])
        body = completion(list(texts))
        for choice, logprob in zip(body["choices"], (-0.4, -0.3, -0.2, -0.1), strict=True):
            choice["logprobs"] = {"content": [{"token": "t", "logprob": logprob}]}
        return body

    return answer


@pytest.mark.parametrize("task", ["extract", "sql"])
def test_an_endpoint_is_evaluated(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEST_KEY", KEY)
    settings = (f"task={task}", f"output_dir={tmp_path}", "data.eval_prompts=6", "data.eval_samples=4")
    endpoint = (
        "endpoint.model=m",
        "endpoint.api_key_env=TEST_KEY",
        "endpoint.input_price=1.0",
        "endpoint.output_price=2.0",
    )
    with serving(scripted(configured(*settings))) as server:
        main(configured(*settings, *endpoint, f"endpoint.base_url={server.base_url}"))
    folder = only_folder(tmp_path)
    result = json.loads((folder / "evaluation.json").read_text())
    assert (result["exact_match_greedy"], result["exact_match_sampled"]) == (1.0, 0.5)
    assert (result["parse_sampled"], result["verifier_failures"]) == (0.75, 0)
    valid = "execute_sampled" if task == "sql" else "schema_sampled"
    assert result[valid] == (0.75 if task == "sql" else 0.5)  # null is no text, as a schema has it
    last = {name: curve["points"][-1]["mean"] for name, curve in result["best_of_n"].items()}
    assert last["majority"] == last["oracle"] == 1.0
    assert last["valid_logprob"] == (0.0 if task == "sql" else 1.0)  # the wrong query is valid and the likeliest
    assert [point["n"] for point in result["pass_at_k"]] == [1, 2, 4]
    assert result["pass_at_k"][1]["mean"] == pytest.approx(5 / 6)
    if task == "extract":
        assert result["field_recall"] < result["field_precision"] < 1
    assert result["cost"]["requests"] == 12 and result["cost"]["dollars"] == pytest.approx((120 + 2 * 300) / 1e6)
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["sampled"] * 6 + ["greedy"] * 6
    assert rows[0]["candidates"][0]["logprobs"] == [-0.4] and rows[0]["candidates"][0]["token_ids"] == []
    text = (folder / "evaluation.md").read_text()
    assert text in capsys.readouterr().out and "12 requests" in text and (folder / "curves.svg").is_file()
    for path in folder.rglob("*"):
        assert path.is_dir() or KEY not in path.read_text()
    again = load_config(EvaluateConfig, folder / "config.yaml")
    assert again.endpoint.api_key_env == "TEST_KEY"


def test_what_an_endpoint_answered_before_it_failed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRST_KEY", "sk-1")
    monkeypatch.setenv("OTHER_KEY", "sk-2")
    settings = (f"output_dir={tmp_path}", "data.eval_prompts=6", "data.eval_samples=4")
    endpoint = (
        *("endpoint.model=m", "endpoint.api_key_env=FIRST_KEY"),
        *("endpoint.input_price=1.0", "endpoint.output_price=2.0"),
    )
    right, failing = scripted(configured(*settings)), True

    def answer(request: dict[str, Any]) -> Any:
        if failing and len(server.requests) > 4:
            return 400, {"error": {"message": "spent"}}, {}
        return right(request)

    with serving(answer) as server:
        here = (*settings, *endpoint, f"endpoint.base_url={server.base_url}")
        with pytest.raises(UserError, match="spent.*; 4 answered requests are kept: go on with --config"):
            main(configured(*here, "endpoint.concurrency=1"))
        folder, failing = only_folder(tmp_path), False
        resume = f"resume={folder}"
        with pytest.raises(UserError, match="other settings of 'data'"):
            main(configured(*here, "data.eval_prompts=5", resume))
        with pytest.raises(UserError, match="other settings of 'endpoint'"):
            main(configured(*here, "endpoint.logprobs=false", resume))
        main(configured(*here, "endpoint.concurrency=2", "endpoint.api_key_env=OTHER_KEY", resume))
        first = {request["messages"][-1]["content"] for request in server.requests[:4]}
        rest = [one for one, key in zip(server.requests, server.keys, strict=True) if key == "Bearer sk-2"]
        assert len(rest) == 8 and not any(
            request["messages"][-1]["content"] in first for request in rest if request["temperature"] > 0
        )
        with pytest.raises(UserError, match="is finished"):
            main(configured(*here, resume))
        main(configured(*here, f"output_dir={tmp_path / 'undisturbed'}"))
    undisturbed = only_folder(tmp_path / "undisturbed")
    assert (folder / "eval.jsonl").read_text() == (undisturbed / "eval.jsonl").read_text()
    cost, usual = (json.loads((one / "evaluation.json").read_text())["cost"] for one in (folder, undisturbed))
    assert cost.pop("seconds") > 0 and usual.pop("seconds") > 0 and cost == usual
    assert cost["requests"] == 12 and cost["dollars"] == pytest.approx((120 + 2 * 300) / 1e6)


def test_a_reward_function_that_ends_its_process_costs_only_its_candidate(tmp_path: Path) -> None:
    (tmp_path / "deadly.py").write_text(
        "import os\n"
        "def f(completions, **kwargs):\n"
        "    texts = [one[0]['content'] for one in completions]\n"
        "    return [os._exit(1) if text == 'bad' else 1.0 for text in texts]\n"
    )
    settings = (
        *(f"output_dir={tmp_path}", "data.eval_prompts=1", "data.eval_samples=2", "endpoint.model=m"),
        *("endpoint.api_key_env=null", f"reward.functions={{'{tmp_path}/deadly.py:f': 1.0}}"),
    )
    with serving(lambda request: completion(["good", "bad"][: request["n"]])) as server:
        main(configured(*settings, f"endpoint.base_url={server.base_url}"))
    rows = [json.loads(line) for line in (only_folder(tmp_path) / "eval.jsonl").read_text().splitlines()]
    assert [[one["reward"] for one in row["candidates"]] for row in rows] == [[1.0, None], [1.0]]
    assert rows[0]["candidates"][1]["reason"] == "the verifier's process died twice on this candidate"


def test_resume_is_for_endpoints() -> None:
    with pytest.raises(UserError, match="resume goes on with an evaluation of an endpoint"):
        configured("resume=x")


def test_own_rows_are_evaluated_and_a_bad_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "Extract: a is 1", "gold": {"a": 1}}) + "\n")
    own = (f"output_dir={tmp_path}", f"data.eval={path}", "endpoint.model=m", "endpoint.api_key_env=null")
    with serving(lambda request: completion(['{"a": 1}'] * request["n"])) as server:
        main(configured(*own, f"endpoint.base_url={server.base_url}", "data.eval_samples=2"))
    assert server.requests[0]["messages"] == [{"role": "user", "content": "Extract: a is 1"}]
    result = json.loads((only_folder(tmp_path) / "evaluation.json").read_text())
    assert result["exact_match_sampled"] == 1.0 and result["prompts"] == 1 and not result["cost"]["dollars"]
    path.write_text(json.dumps({"prompt": "Extract", "gold": {"a": 1}, "schema": {"required": ["b"]}}) + "\n")
    with pytest.raises(UserError, match="own schema"):
        main(configured(*own, "endpoint.base_url=http://127.0.0.1:9/v1"))


def test_settings_that_do_not_fit_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = ("endpoint.base_url=http://127.0.0.1:9/v1", "endpoint.model=m", f"output_dir={tmp_path}/out")
    with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
        main(configured(*server, "data.eval_prompts=1"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="model.adapter and endpoint.base_url are both set"):
        configured(*server, "model.adapter=x")
    with pytest.raises(UserError, match="^reward: reward.weights names 'execute'.*it takes parse, schema"):
        as_run(configured("reward.weights={execute: 1.0}"))
    assert as_run(configured("task=sql", "reward.weights={execute: 1.0}")).reward.weights == {"execute": 1.0}


@pytest.mark.slow
def test_the_engine_with_an_adapter_and_the_same_model_behind_an_endpoint(tmp_path: Path) -> None:
    """The endpoint serves the tiny model's own answers: greedy ones are the engine's, judged alike."""
    from transformers import Qwen3ForCausalLM

    from ember_ray.engine.llm import LLM
    from ember_ray.engine.options import EngineOptions
    from ember_ray.engine.sampling_params import SamplingParams

    settings = ("data.eval_prompts=12", "data.eval_samples=4")
    network = Qwen3ForCausalLM.from_pretrained(tiny_model_path())
    make_adapter(network, tmp_path / "adapter", target_modules=["q_proj"], r=4)
    adapter = (f"model.adapter={tmp_path / 'adapter'}", "ray.dashboard=false", f"output_dir={tmp_path / 'engine'}")
    ended = run("recipes.evaluate", *settings, *adapter, cwd=tmp_path)
    assert ended.status == 0, ended.stderr
    assert ended.left == [], "processes were left behind"
    assert "| exact match" in ended.stdout

    llm = LLM(EngineOptions(model=str(tiny_model_path()), dtype="float32", layer_split=(2,)))
    base = [llm.generate([one.messages], 1, SamplingParams(0.0, max_tokens=96)) for one in rows_of(*settings)]
    llm.load_adapter(tmp_path / "adapter")
    seeds = random.Random(0)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(request["temperature"], max_tokens=request["max_tokens"], seed=seeds.randrange(2**31))
        (output,) = llm.generate([request["messages"]], request["n"], params)
        body = completion([one.text for one in output.candidates])
        for choice, one in zip(body["choices"], output.candidates, strict=True):
            choice["logprobs"] = {"content": [{"token": "", "logprob": value} for value in one.logprobs]}
            choice["finish_reason"] = one.finish_reason
        return body

    with serving(answer) as server:
        endpoint = (f"endpoint.base_url={server.base_url}", "endpoint.model=tiny", "endpoint.api_key_env=null")
        # one at a time: the engine is not made for several threads
        main(configured(*settings, *endpoint, "endpoint.concurrency=1", f"output_dir={tmp_path / 'endpoint'}"))

    greedy, results = [], []
    for folder in (only_folder(tmp_path / "engine"), only_folder(tmp_path / "endpoint")):
        rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
        greedy.append([row["candidates"][0] for row in rows if row["kind"] == "greedy"])
        results.append(json.loads((folder / "evaluation.json").read_text()))
        assert (results[-1]["prompts"], results[-1]["samples"]) == (12, 48)
    for made, served in zip(*greedy, strict=True):
        assert [served[key] for key in ("text", "finish_reason", "rewards")] == [
            made[key] for key in ("text", "finish_reason", "rewards")
        ]
        assert served["logprobs"] == pytest.approx(made["logprobs"], abs=1e-4) and made["policy_version"] == 1
    plain = [output.candidates[0].text for (output,) in base]
    assert [made["text"] for made in greedy[0]] != plain, "the adapter changes nothing"
    assert results[0]["cost"]["generated_tokens"] > 0
    assert results[0]["exact_match_greedy"] == results[1]["exact_match_greedy"]
