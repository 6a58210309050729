"""What the learner keeps, writes and refuses."""

import random

import numpy
import pytest
import torch

from ember_ray.train.dpo import STATE_FILE, DpoLearner, DpoOptions, LearnerError, LoraOptions

pytestmark = pytest.mark.slow  # each one trains

LORA = LoraOptions(r=4, lora_alpha=8)
DPO = DpoOptions(
    learning_rate=3e-3, lr_scheduler_type="cosine", planned_steps=20, per_device_train_batch_size=2, seed=5
)


def some_pairs(make_pair):
    names = ("Ada", "Bob", "Cyd", "Dee", "Eve")
    return [make_pair(f"name: {n}", f'{{"name": "{n}"}}', f"{n}, it is", n) for n in names]


def equal(one, other):
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_learner_goes_on_equal_to_the_bit(tiny_qwen3, make_pair, tmp_path, dropout):
    lora = LoraOptions(r=4, lora_alpha=8, lora_dropout=dropout)
    pairs = some_pairs(make_pair)
    learner = DpoLearner(tiny_qwen3, lora, DPO)
    learner.learn(pairs)
    learner.learn(pairs[:3])
    learner.save_state(tmp_path / "state")
    state = torch.load(tmp_path / "state" / STATE_FILE, weights_only=True)
    assert {int(moments["step"]) for moments in state["optimizer"]["state"].values()} == {5}
    wanted = [learner.learn(pairs), learner.learn(pairs)]

    torch.rand(3), random.random()  # other users of the process's generators change nothing
    resumed = DpoLearner(tiny_qwen3, lora, DPO)
    resumed.load_state(tmp_path / "state")
    assert (resumed.rounds, resumed.steps) == (2, 5)
    got = [resumed.learn(pairs), resumed.learn(pairs)]
    for metrics in (*wanted, *got):
        del metrics["seconds"]
    assert got == wanted
    assert equal(resumed.adapter_update(1).tensors, learner.adapter_update(1).tensors)

    started_over = DpoLearner(tiny_qwen3, lora, DPO)
    assert not equal(started_over.adapter_update(1).tensors, learner.adapter_update(1).tensors)


def test_a_used_learner_can_be_taken_back(tiny_qwen3, make_pair, tmp_path):
    pairs = some_pairs(make_pair)
    learner = DpoLearner(tiny_qwen3, LORA, DPO)
    learner.learn(pairs)
    learner.save_state(tmp_path)
    learner.learn(pairs)
    once = learner.adapter_update(1).tensors
    learner.load_state(tmp_path)
    learner.learn(pairs)
    assert equal(once, learner.adapter_update(1).tensors)


def test_dropout_is_really_on(tiny_qwen3, make_pair):
    pairs = some_pairs(make_pair)
    tensors = []
    for dropout in (0.0, 0.5):
        learner = DpoLearner(tiny_qwen3, LoraOptions(r=4, lora_alpha=8, lora_dropout=dropout), DPO)
        learner.learn(pairs)
        tensors.append(learner.adapter_update(1).tensors)
    assert not equal(*tensors)


def test_a_state_of_other_options_is_refused(tiny_qwen3, make_pair, tmp_path):
    learner = DpoLearner(tiny_qwen3, LORA, DPO)
    learner.learn(some_pairs(make_pair))
    learner.save_state(tmp_path)
    other = DpoLearner(tiny_qwen3, LoraOptions(r=4, lora_alpha=16), DPO)
    before = other.adapter_update(0).tensors
    with pytest.raises(LearnerError, match=r"lora\.lora_alpha=8, not 16"):
        other.load_state(tmp_path)
    assert equal(before, other.adapter_update(0).tensors) and other.steps == 0


def test_a_missing_or_broken_state_is_refused(tiny_qwen3, tmp_path):
    learner = DpoLearner(tiny_qwen3, LORA, DPO)
    with pytest.raises(LearnerError, match="is missing"):
        learner.load_state(tmp_path)
    (tmp_path / STATE_FILE).write_bytes(b"half a fi")
    with pytest.raises(LearnerError, match="cannot be read"):
        learner.load_state(tmp_path)


def test_a_saved_adapter_loads_in_peft_and_replaces_the_older_one(tiny_qwen3, make_pair, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    learner = DpoLearner(tiny_qwen3, LORA, DPO)
    folder = tmp_path / "run" / "adapter"
    learner.save_adapter(folder)
    (folder / "left_over").write_text("of the older adapter")
    learner.learn(some_pairs(make_pair))
    learner.save_adapter(folder)
    assert {path.name for path in folder.parent.iterdir()} == {"adapter"}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "left_over").exists()

    ids = torch.tensor([make_pair().prompt_token_ids])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_qwen3), folder).eval()
    learner.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, learner.model(ids).logits)


def test_a_folder_that_cannot_be_written_leaves_the_older_adapter(tiny_qwen3, make_pair, tmp_path, monkeypatch):
    learner = DpoLearner(tiny_qwen3, LORA, DPO)
    learner.save_adapter(tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    learner.learn(some_pairs(make_pair))

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(learner.model, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space"):
        learner.save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_long_pairs_are_left_out_and_counted(tiny_qwen3, make_pair):
    learner = DpoLearner(tiny_qwen3, LORA, DpoOptions(max_length=30))
    short, long = make_pair("name", "Ada", "Bob"), make_pair("name", "Ada", "x" * 26)
    fits = make_pair("name", "Ada", "x" * 25)
    metrics = learner.learn([short, long, fits])
    assert (metrics["pairs"], metrics["pairs_too_long"]) == (2, 1)
    assert DpoLearner(tiny_qwen3, LORA, DpoOptions()).max_length == 256  # the model's own


def test_pairs_that_cannot_be_learned_are_refused(tiny_qwen3, make_pair):
    from dataclasses import replace

    learner = DpoLearner(tiny_qwen3, LORA, DPO)
    for field in ("prompt_token_ids", "chosen_token_ids", "rejected_token_ids"):
        with pytest.raises(LearnerError, match="'row-1' has no tokens"):
            learner.learn([replace(make_pair(), **{field: ()})])
    with pytest.raises(LearnerError, match="vocabulary"):
        learner.learn([replace(make_pair(), chosen_token_ids=(3, 259))])
    assert learner.steps == 0


def test_a_loss_that_is_not_finite_stops(tiny_qwen3, make_pair, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(tiny_qwen3, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    learner = DpoLearner(broken, LORA, DPO)
    with pytest.raises(LearnerError, match="loss became nan"):
        learner.learn([make_pair()])
    assert learner.steps == 0
    learner.adapter_update(1)  # the adapter itself was not touched


def test_a_gradient_that_is_not_finite_is_not_applied(tiny_qwen3, make_pair):
    learner = DpoLearner(tiny_qwen3, LORA, DPO)
    learner.learn([make_pair()])
    before = learner.adapter_update(1).tensors
    name, weight = next((n, p) for n, p in learner.model.named_parameters() if "lora_B" in n)
    hook = weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(LearnerError, match="gradient of"):
        learner.learn([make_pair()])
    assert equal(before, learner.adapter_update(1).tensors) and learner.steps == 1
    hook.remove()
    assert learner.learn([make_pair()])["steps"] == 1  # and learning can go on


def test_bad_weights_are_not_published(tiny_qwen3):
    learner = DpoLearner(tiny_qwen3, LORA, DPO)
    with torch.no_grad():
        next(p for n, p in learner.model.named_parameters() if "lora_B" in n)[0, 0] = float("inf")
    with pytest.raises(LearnerError, match="not published"):
        learner.adapter_update(1)


def test_a_missing_model_and_a_bad_dtype_are_named(tmp_path):
    with pytest.raises(LearnerError, match=r"no model in .*nowhere"):
        DpoLearner(tmp_path / "nowhere", LORA, DPO)
    with pytest.raises(LearnerError, match="float16"):
        DpoLearner(tmp_path, LORA, DPO, dtype="float16")


def test_options_that_do_not_fit_the_model_are_refused(tiny_qwen3):
    with pytest.raises(LearnerError, match="has layer 2, but the model in .* has only 2 layers"):
        DpoLearner(tiny_qwen3, LoraOptions(layers_to_transform=(1, 2)), DPO)
    with pytest.raises(LearnerError, match="lora.rank_pattern has 'q_prj', which fits no adapted module"):
        DpoLearner(tiny_qwen3, LoraOptions(rank_pattern={"q_prj": 8}), DPO)


def test_nothing_on_the_console_no_files_and_no_touched_generators(
    tiny_qwen3, make_pair, tmp_path, capfd, monkeypatch, recwarn
):
    import trl.trainer.dpo_trainer  # noqa: F401  transformers speaks when it is imported with WANDB_MODE=offline

    capfd.readouterr()
    monkeypatch.chdir(tmp_path)
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    wanted = random.random(), numpy.random.rand(), torch.rand(1)
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    learner = DpoLearner(tiny_qwen3, LORA, DPO, output_dir=tmp_path / "trainer")
    learner.learn(some_pairs(make_pair))
    learner.learn([make_pair()])
    assert (random.random(), numpy.random.rand(), torch.rand(1)) == wanted
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert [str(w.message) for w in recwarn.list] == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_trl_has_no_advice_on_the_placeholder(caplog):
    """The shipped tokenizer merges what TRL joins."""
    from ember_ray.assets import tiny_model_path

    DpoLearner(tiny_model_path(), LORA, DPO)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("trl")] == []


def test_bfloat16_base_keeps_a_float32_adapter(tiny_qwen3, make_pair):
    learner = DpoLearner(tiny_qwen3, LORA, DpoOptions(learning_rate=1e-2), dtype="bfloat16")
    metrics = [learner.learn(some_pairs(make_pair)) for _ in range(3)]
    assert metrics[-1]["rewards/margins"] > metrics[0]["rewards/margins"]
    assert learner.model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    assert {p.dtype for n, p in learner.model.named_parameters() if "lora_" in n} == {torch.float32}
