"""The faults that the suite must notice. Each is small: the code still runs, and most of what it gives looks right."""

from __future__ import annotations

from mutant import Mutant

MUTANTS = [
    Mutant(
        name="lse-merge",  # prefix and suffix are weighed 1 % wrong
        module="cuda_ext.decode_attention",
        old="share_b = torch.sigmoid(lse_b - lse_a)",
        new="share_b = torch.sigmoid(1.01 * (lse_b - lse_a))",
        tests=("tests/cuda_ext/test_decode_attention.py",),
    ),
    Mutant(
        name="version-in-cache-key",  # K and V of an older policy are found again
        module="ember_ray.engine.block_pool",
        old='policy_version.to_bytes(8, "little")',
        new='(0).to_bytes(8, "little")',
        tests=("tests/engine/test_generate.py", "-k", "switch"),
    ),
    Mutant(
        name="pair-margin",  # a margin that is 1 % too small makes a pair
        module="ember_ray.train.pairs",
        old="difference >= min_margin - _ROUNDING",
        new="difference >= 0.99 * min_margin - _ROUNDING",
        tests=("tests/train/test_pairs.py",),
    ),
    Mutant(
        name="number-tolerance",  # the relative tolerance forgets what it is relative to
        module="verifiers.normalize",
        old="max(relative * abs(float(gold)), absolute)",
        new="max(relative, absolute)",
        tests=("tests/verifiers/test_normalize.py", "tests/verifiers/test_compare.py"),
    ),
    Mutant(
        name="lora-scale",  # every adapter is 1 % too strong
        module="ember_ray.model.adapter_layout",
        old="ranks + rank, b, scale)",
        new="ranks + rank, b, 1.01 * scale)",
        tests=("tests/model/test_parity.py", "-k", "adapter"),
    ),
    Mutant(
        name="publication-no-op",  # the version counts up, the weights stay
        module="ember_ray.model.slots",
        old="self._activate(held)",
        new="self._activate(_Held())",
        tests=("tests/engine/test_generate.py", "-k", "switch"),
    ),
    Mutant(
        name="publication-no-op-in-the-actor",  # the stage says that it switched, and did not
        module="actors.stage",
        old="self._engine.commit_adapter(version)",
        new="_ = version",
        tests=("tests/actors/test_stages.py", "-k", "published_adapter"),
    ),
    Mutant(
        name="preempted-with-results-on-the-way",  # a victim is made anew without tokens that are not known yet
        module="ember_ray.engine.scheduler",
        old="return need > self.pool.num_free",
        new="return False",
        tests=("tests/engine/test_scheduler.py", "-k", "ahead"),
    ),
    Mutant(
        name="merged-from-merged",  # an adapter is added to what the one before left
        module="ember_ray.model.slots",
        old="rebuild_weight(live, golden, lora, more",
        new="rebuild_weight(live, live.clone(), lora, more",
        tests=("tests/model/test_many_swaps.py",),
    ),
    Mutant(
        name="score-one-late",  # a token is scored by the position behind it
        module="ember_ray.engine.scorer",
        old="tokens.append(requests[number].token_ids[position + 1])",
        new="tokens.append(requests[number].token_ids[position])",
        tests=("tests/engine/test_score.py",),
    ),
    Mutant(
        name="first-token-logprob",  # the first token is given the log-probability it was drawn with
        module="ember_ray.engine.stage_engine",
        old="sequence.logprobs.extend(logprobs)",
        new="sequence.logprobs.extend(logprobs if sequence.logprobs else sampling_logprobs)",
        tests=("tests/engine/test_generate.py", "-k", "logprobs"),
    ),
    Mutant(
        name="sft-learns-prompts",  # prompts are imitated too
        module="ember_ray.train.sft",
        old="[IGNORED] * len(prompt) + answer",
        new="prompt + answer",
        tests=("tests/train/test_sft.py", "-k", "loss_is_over"),
    ),
    Mutant(
        name="reference-scores",  # the engine's reference comes 0.01 too high for both answers
        module="ember_ray.train.dpo",
        old="row[column] = scores[pair.prompt_token_ids, tokens]",
        new="row[column] = scores[pair.prompt_token_ids, tokens] + 0.01",
        tests=("tests/train/test_preferences.py", "-k", "engines_reference"),
    ),
    Mutant(
        name="mismatch-temperature",  # the learner's side is at another temperature than the engine's
        module="ember_ray.train.mismatch",
        old="logits = head(states).float()",
        new="logits = head(states).float() / 1.01",
        tests=("tests/train/test_mismatch.py", "-k", "agree"),
    ),
    Mutant(
        name="grpo-old-policy",  # the old policy is the trainer's own, not the one that drew the candidates
        module="ember_ray.train.grpo_trainer",
        old='output["old_per_token_logps"] = output["sampling_per_token_logps"]',
        new='output.pop("old_per_token_logps", None)',
        tests=("tests/train/test_grpo.py", "-k", "papers and dapo"),
    ),
    Mutant(
        name="grpo-empty-rows",  # rows that fill a batch up count in the mean over rows
        module="ember_ray.train.grpo_trainer",
        old="self.row_scale = len(chosen) / len(real)",
        new="self.row_scale = 1.0",
        tests=("tests/train/test_grpo.py", "-k", "papers and dr_grpo"),
    ),
    Mutant(
        name="sql-row-order",  # where the gold query asks for an order, any order of rows passes
        module="verifiers.sql_compare",
        old="[0] * len(rows) if gold.blocks is None else gold.blocks",
        new="[0] * len(rows)",
        tests=("tests/verifiers/test_sql_compare.py",),
    ),
    Mutant(
        name="pattern-time",  # the searches of one validation have the whole time each
        module="verifiers.patterns",
        old="_spent.left -= time.process_time() - began",
        new="pass",
        tests=("tests/verifiers/test_hostile_schemas.py", "-k", "slow and many"),
    ),
]
