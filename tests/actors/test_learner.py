"""The learner as a Ray actor."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

LIMIT = 300


@pytest.fixture(scope="module")
def local_ray():
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="test_learner")
    yield ray
    ray.shutdown()


@pytest.fixture
def groups():
    from ember_ray.data.scored_group import ScoredCandidate, ScoredGroup
    from ember_ray.engine.request import Candidate

    def scored(row, index, text, reward):
        tokens = [1 + byte for byte in text.encode()] + [0]
        logprobs = [-1.0] * len(tokens)
        return ScoredCandidate(Candidate(row, index, tokens, logprobs, logprobs, text, "stop", 0), reward)

    prompt = tuple(range(20, 50))
    good = [scored("a", 0, '{"total": 1}', 1.0), scored("a", 1, "total is 1", 0.0)]
    flat = [scored("b", 0, "one", 0.5), scored("b", 1, "two", 0.5)]
    return [ScoredGroup("a", "a prompt", prompt, good), ScoredGroup("b", "b prompt", prompt, flat)]


def make_actor(ray, model, num_cpus=1, name=None, options=None, **rest):
    from actors.learner import LearnerActor, LearnerSettings
    from ember_ray.train.options import DpoOptions, LoraOptions

    options = options or DpoOptions(learning_rate=1e-2, min_margin=0.5)
    settings = LearnerSettings(options.section, model, LoraOptions(r=4), options, **rest)
    return LearnerActor.options(num_cpus=num_cpus, **({"name": name} if name else {})).remote(settings)


def test_rounds_of_a_named_actor(local_ray, tiny_model, groups, tmp_path):
    import torch

    from actors.adapter_wire import unpack_adapter
    from actors.learner import LEARNER_NAME
    from ember_ray.model.lora import check_adapter, load_peft_adapter
    from ember_ray.model.qwen3_config import read_model_config
    from ember_ray.train.pairs import make_pairs

    get = lambda ref: local_ray.get(ref, timeout=LIMIT)  # noqa: E731
    actor = make_actor(local_ray, tiny_model, name=LEARNER_NAME)
    get(actor.start.remote())
    assert local_ray.get_actor(LEARNER_NAME)._actor_id == actor._actor_id

    first = get(actor.learn.remote(groups))
    assert (first["pairs"], first["steps"], first["rewards/margins"]) == (1, 1, pytest.approx(0.0, abs=1e-5))
    assert (first["pairs/groups"], first["pairs/groups_without_spread"]) == (2, 1)
    assert first["mismatch/tokens"] == sum(len(s.candidate.token_ids) for g in groups for s in g.candidates)
    pairs, _ = make_pairs(groups, 0.5)
    second = get(actor.learn.remote(pairs))
    assert second["rewards/margins"] > first["rewards/margins"]
    assert second["pairs"] == 1 and "pairs/groups" not in second
    assert get(actor.learn.remote([]))["steps"] == 0

    update = unpack_adapter(get(actor.adapter_update.remote(3)))
    config = read_model_config(tiny_model)
    layers = check_adapter(update, config.linear_shapes, config.num_hidden_layers)
    assert update.version == 3 and len(layers) == config.num_hidden_layers
    get(actor.save_adapter.remote(tmp_path / "adapter"))
    saved = load_peft_adapter(tmp_path / "adapter", 3)
    assert all(torch.equal(saved.tensors[name], update.tensors[name]) for name in update.tensors)

    get(actor.save_state.remote(tmp_path / "state"))
    third = get(actor.learn.remote(pairs))
    local_ray.kill(actor)
    again = make_actor(local_ray, tiny_model)
    get(again.load_state.remote(tmp_path / "state"))
    resumed = get(again.learn.remote(pairs))
    assert third.pop("seconds") > 0 and resumed.pop("seconds") > 0
    assert resumed == third
    local_ray.kill(again)


def test_best_of_n_resumes_from_an_adapter(local_ray, tiny_model, groups, tmp_path):
    """The SFT learner on groups, from a starting adapter, in a second process that goes on where the first died."""
    from actors.adapter_wire import unpack_adapter
    from ember_ray.train.options import SftOptions

    get = lambda ref: local_ray.get(ref, timeout=LIMIT)  # noqa: E731
    options = SftOptions(learning_rate=1e-2, min_reward=1.0)
    first = make_actor(local_ray, tiny_model, options=options)
    metrics = get(first.learn.remote(groups))
    assert (metrics["rows"], metrics["selection/groups"], metrics["selection/groups_selected"]) == (1, 2, 1)
    get(first.save_adapter.remote(tmp_path / "adapter"))
    wanted = unpack_adapter(get(first.adapter_update.remote(1)))
    local_ray.kill(first)

    start = {"options": options, "init_adapter": str(tmp_path / "adapter")}
    second = make_actor(local_ray, tiny_model, **start)
    found = unpack_adapter(get(second.adapter_update.remote(1)))
    assert all((found.tensors[name] == wanted.tensors[name]).all() for name in wanted.tensors)
    get(second.learn.remote(groups))
    get(second.save_state.remote(tmp_path / "state"))
    one = get(second.learn.remote(groups))
    local_ray.kill(second)
    third = make_actor(local_ray, tiny_model, **start)
    assert get(third.load_state.remote(tmp_path / "state")) == 1
    other = get(third.learn.remote(groups))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    local_ray.kill(third)


def test_settings_that_do_not_fit_each_other():
    from actors.learner import LearnerSettings
    from ember_ray.train.options import DpoOptions, LoraOptions, SftOptions

    with pytest.raises(ValueError, match="kind must be one of sft, dpo, grpo, not 'ppo'"):
        LearnerSettings("ppo", "model", LoraOptions(), DpoOptions())
    with pytest.raises(ValueError, match="of kind 'dpo' cannot take SftOptions"):
        LearnerSettings("dpo", "model", LoraOptions(), SftOptions())


def test_a_missing_model_is_told_as_itself(local_ray, tmp_path):
    from ember_ray.train.errors import LearnerError

    actor = make_actor(local_ray, str(tmp_path / "nowhere"))
    with pytest.raises(LearnerError, match="no model in"):
        local_ray.get(actor.start.remote(), timeout=LIMIT)
    with pytest.raises(LearnerError, match="no model in"):  # it lives on, and says so again
        local_ray.get(actor.start.remote(), timeout=LIMIT)
    local_ray.kill(actor)


@pytest.mark.parametrize(("num_cpus", "num_threads", "wanted"), [(2, None, 2), (0, None, 1), (1, 2, 2)])
def test_threads(local_ray, tmp_path, num_cpus, num_threads, wanted):
    actor = make_actor(local_ray, str(tmp_path / "nowhere"), num_cpus=num_cpus, num_threads=num_threads)

    def threads(_self):
        import torch

        return torch.get_num_threads()

    with pytest.raises(ValueError, match="no model"):  # they are set before the model is loaded
        local_ray.get(actor.start.remote(), timeout=LIMIT)
    assert local_ray.get(actor.__ray_call__.remote(threads), timeout=LIMIT) == wanted
    local_ray.kill(actor)


def test_the_module_needs_neither_torch_nor_trl():
    """The driver imports it in no time; only the actor's process loads the libraries."""
    import subprocess
    import sys

    code = "import sys, actors.learner; print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LIMIT, cwd=root)
    assert done.stdout.strip() == "[]", done.stderr
