"""Files and overrides become a configuration, and faults are told where they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_ray.config.cli import find_config
from ember_ray.config.describe import keys_of, nested_values
from ember_ray.config.errors import ConfigError
from ember_ray.config.learning import DpoSection
from ember_ray.config.load import as_overrides, dump_yaml, load_config
from ember_ray.config.schema import DpoExtractConfig
from ember_ray.config.sections import LoraSection
from ember_ray.config.task_sections import ExtractRewardSection, SqlRewardSection
from verifiers.sql_rewards import DEFAULT_SHARES

NAMES = st.text(st.sampled_from("abcxyz019_.-"), min_size=1, max_size=12).filter(lambda text: text[0].isalnum())
TEXTS = st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable())
COUNTS = st.integers(1, 10_000)
POSITIVE = st.floats(1e-9, 1e9)


@st.composite
def configs(draw: st.DrawFn) -> DpoExtractConfig:
    base = DpoExtractConfig()
    losses = draw(st.lists(st.sampled_from(["sigmoid", "sft", "ipo"]), min_size=1, max_size=3))
    return base.model_copy(
        update={
            "name": draw(NAMES),
            "seed": draw(st.integers(0, 2**32 - 1)),
            "output_dir": draw(TEXTS),
            "rounds": draw(COUNTS),
            "model": base.model.model_copy(update={"path": draw(st.none() | TEXTS)}),
            "engine": base.engine.model_copy(
                update={"stages": draw(COUNTS | st.lists(COUNTS, min_size=1, max_size=4))}
            ),
            "lora": LoraSection(
                rank_pattern=draw(st.dictionaries(TEXTS, COUNTS, max_size=3)),
                alpha_pattern=draw(st.dictionaries(NAMES, POSITIVE, max_size=3)),
                layers_to_transform=draw(st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=4)),
                use_rslora=draw(st.booleans()),
            ),
            "dpo": DpoSection(
                learning_rate=draw(POSITIVE),
                loss_type=losses,
                loss_weights=draw(st.none() | st.just([1.0] * len(losses))),
            ),
        }
    )


@settings(deadline=None, max_examples=25)
@given(configs())
def test_overrides_and_yaml_give_the_same_configuration_back(
    tmp_path_factory: pytest.TempPathFactory, config: DpoExtractConfig
) -> None:
    assert load_config(DpoExtractConfig, None, as_overrides(config)) == config
    path = tmp_path_factory.mktemp("round") / "config.yaml"
    path.write_text(dump_yaml(config), encoding="utf-8")
    assert load_config(DpoExtractConfig, path) == config


@settings(deadline=None, max_examples=25)
@given(configs())
def test_other_yaml_readers_read_the_same_values(config: DpoExtractConfig) -> None:
    assert yaml.safe_load(dump_yaml(config)) == config.model_dump()


def test_order_is_defaults_then_file_then_overrides_and_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rounds: 3\nlora:\n  r: 4\nengine:\n")
    config = load_config(DpoExtractConfig, path, ["lora.r=8", "dpo.beta=0.2", "lora.r=2"])
    assert (config.rounds, config.lora.r, config.dpo.beta, config.engine.block_size) == (3, 2, 0.2, 16)


def test_a_mapping_as_an_override_changes_only_what_it_names() -> None:
    config = load_config(DpoExtractConfig, None, ["lora={r: 4}", "lora.lora_alpha=8", "lora={use_rslora: true}"])
    assert (config.lora.r, config.lora.lora_alpha, config.lora.use_rslora) == (4, 8.0, True)


def test_an_entry_of_a_key_that_holds_names_may_have_dots() -> None:
    config = load_config(
        DpoExtractConfig, None, ["lora.rank_pattern.layers.0.self_attn.q_proj=4", "lora.rank_pattern.k_proj=2"]
    )
    assert config.lora.rank_pattern == {"layers.0.self_attn.q_proj": 4, "k_proj": 2}


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("output_dir=yes", "yes"),
        ("output_dir=123", "123"),
        ("output_dir=a: b #c", "a: b #c"),
        ("output_dir=2024-11-24", "2024-11-24"),
        ("output_dir='null'", "null"),
        ('output_dir="tab\\there"', "tab\there"),
    ],
)
def test_text_needs_no_quotes_on_the_command_line(override: str, value: str) -> None:
    assert load_config(DpoExtractConfig, None, [override]).output_dir == value


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("5E-5", 5e-5), (".5", 0.5), ("1", 1.0), ("+2.5", 2.5), ("010", 10.0)]
)
def test_numbers_are_read_as_people_write_them(text: str, value: float) -> None:
    assert load_config(DpoExtractConfig, None, [f"dpo.learning_rate={text}"]).dpo.learning_rate == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dpo.learning_rat=1", "unknown key 'dpo.learning_rat'; did you mean 'dpo.learning_rate'?"),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean 'dpo.learning_rate'?"),
        ("rouds=1", "unknown key 'rouds'; did you mean 'rounds'?"),
        ("seed.deep=1", "unknown key 'seed.deep'"),
        ("zzz=1", "unknown key 'zzz'; known keys of this level are name, seed"),
        ("lora={rr: 1}", "unknown key 'lora.rr'; did you mean 'lora.r'?"),
        ("seed=true", "seed must be integer >= 0 and < 4294967296, not true"),
        ("seed=1.0", "seed must be integer >= 0 and < 4294967296, not 1.0"),
        ("seed=", "seed must be integer >= 0 and < 4294967296, not null"),
        ("engine.stages=[1, 0]", "engine.stages must be integer >= 1 or non-empty list of integers >= 1, not [1, 0]"),
        ("engine.stages=[]", "engine.stages must be integer >= 1 or non-empty list of integers >= 1, not []"),
        ("engine=3", "engine is a section with the keys stages, block_size"),
        ("data.eval_samples=0", "data.eval_samples must be integer >= 1, not 0"),
        ("rollout.top_p=1.5", "rollout.top_p must be number > 0 and <= 1, not 1.5"),
        ("dpo.learning_rate=.nan", "dpo.learning_rate must be number > 0, not .nan"),
        ("rollout.publish=yes", 'rollout.publish must be true or false, not "yes"'),
        ("model.dtype=fp16", 'model.dtype must be one of float32, bfloat16, float16, not "fp16"'),
        ("name=a/b", "name must be text of letters, digits"),
        ("seed=[1", "not valid YAML"),
        ("seed=!!python/none x", "not valid YAML"),
        ("lora={r: 1, r: 2}", "'r' is given twice"),
        ("noequals", "settings are written key=value"),
        ("dpo.loss_weights=[1]", "dpo.loss_weights has 1 values and dpo.loss_type has 2"),
        ("dpo.loss_weights=[0, 0]", "dpo.loss_weights are all 0"),
        ("data.eval=mine.jsonl", "data.eval is set but data.train is not"),
        ("reward={design: binary, weights: {total: 2}}", "reward.weights has no use with reward.design=binary"),
        ("reward.weights={total: 2}", "reward.weights names 'total'; with reward.design=decomposed it takes parse"),
        ("rollout.num_candidates=1", "a pair needs two candidates"),
        ("engine.max_model_len=64", "rollout.max_tokens=96 leaves no room for a prompt"),
        ("engine.num_kv_blocks=2", None),
        ("engine={num_kv_blocks: 2, max_model_len: 64}", "holds 32 tokens, less than one sequence"),
        ("engine.max_num_batched_tokens=100", "one token a candidate"),
        ("rollout.prompts_per_round=5000", "rollout.prompts_per_round=5000 is more than data.train_examples=2048"),
        ("ray={address: auto, num_cpus: 2}", "ray.num_cpus is for a local Ray only"),
        ("ray.placement_strategy=STRICT_SPREAD", None),
    ],
)
def test_a_bad_override_is_told_with_its_key_and_what_would_do(override: str, words: str | None) -> None:
    if words is None:  # fine by itself
        load_config(DpoExtractConfig, None, [override])
        return
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_config(DpoExtractConfig, None, [override])
    assert "\n" not in str(caught.value)
    assert override[:70] in str(caught.value) or words.startswith(("a pair", "one token", "rollout.max"))


def test_strict_spread_needs_a_cluster_only_with_several_stages() -> None:
    with pytest.raises(ConfigError, match="STRICT_SPREAD"):
        load_config(DpoExtractConfig, None, ["ray.placement_strategy=STRICT_SPREAD", "engine.stages=[1, 1]"])
    load_config(DpoExtractConfig, None, ["ray.placement_strategy=STRICT_SPREAD", "engine.stages=2", "ray.address=auto"])


def test_zero_shares_may_be_given_beside_default_ones() -> None:
    ExtractRewardSection(weights={"parse": 0, "schema": 0})
    with pytest.raises(ValueError, match="all 0"):
        ExtractRewardSection(weights={"parse": 0, "schema": 0, "fields": 0, "clean": 0})


@pytest.mark.parametrize(
    ("text", "where", "words"),
    [
        ("rounds: 3\nlora:\n  rr: 4\n", ":3", "unknown key 'lora.rr'; did you mean 'lora.r'?"),
        ("rounds: 3\nlora:\n  r: four\n", ":3", 'lora.r must be integer >= 1, not "four"'),
        ("rounds: 3\n\nrounds: 4\n", ":3", "'rounds' is given twice (first in line 1)"),
        ("rounds: 3\nlora: [1\n", ":3", "not valid YAML"),
        ("a:\n\tb: 1\n", ":2", "not valid YAML"),
        ("- 1\n", "", "must hold lines of 'key: value'"),
        ("? [a]\n: 1\n", ":1", "a key must be a name"),
        ("name: 123\n", ":1", "name must be text"),
        ("dpo:\n  beta: 1\n  loss_weights: [1, 2, 3]\n", ":3", "dpo.loss_weights has 3 values"),
        ("x: \x01\n", "", "holds a character that text does not have"),
        ("[" * 1500, "", "nested too deeply"),
    ],
)
def test_a_bad_file_is_told_with_its_line(tmp_path: Path, text: str, where: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(DpoExtractConfig, path)
    assert str(caught.value).startswith(f"{path}{where}: ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match="lora.r must.*; .*dpo.beta must"):
        load_config(DpoExtractConfig, None, ["lora.r=0", "dpo.beta=0"])


def test_a_file_that_is_missing_a_folder_or_binary(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(DpoExtractConfig, tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(DpoExtractConfig, tmp_path)
    (tmp_path / "bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(DpoExtractConfig, tmp_path / "bin")


def test_every_key_has_a_meaning_and_the_shipped_file_is_valid() -> None:
    for key in keys_of(DpoExtractConfig):
        assert len(key.description) > 15 and key.description.endswith("."), key.path
        assert "typing" not in key.type_words and "class" not in key.type_words, key
    shipped = load_config(DpoExtractConfig, find_config("dpo_extract.yaml"))
    assert shipped.name == "dpo_extract"
    assert nested_values(shipped).keys() == {key.path for key in keys_of(DpoExtractConfig)}


def test_weights_of_the_sql_reward_are_those_of_its_design() -> None:
    for design, shares in DEFAULT_SHARES.items():
        if design != "binary":
            assert SqlRewardSection(design=design, weights=dict(shares)).parts[design] == tuple(shares)
    with pytest.raises(ValueError, match="design=weighted it takes columns, rows, exact_match"):
        SqlRewardSection(design="weighted", weights={"parse": 1})
    with pytest.raises(ValueError, match="all 0"):
        SqlRewardSection(design="weighted", weights={"columns": 0, "rows": 0, "exact_match": 0})
