"""Does the reward rise? The recipe dpo_extract over several seeds, with and without publication.

    python -m benchmarks.dpo_seeds [--seeds 0 1 2 3] [--control 0] [--output FOLDER] [key=value ...]

Appends one JSON line a run to ``seeds.jsonl`` in the output folder; runs that are there already are skipped, so an
interrupted series goes on. Prints the lines and, last, the median gain.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def one_run(seed: int, publish: bool, overrides: list[str]) -> dict[str, Any]:
    """A whole run in a process of its own; its summary and how long it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "recipes.dpo_extract", f"seed={seed}", f"output_dir={folder}", "tracker=none"]
        command += [f"rollout.publish={str(publish).lower()}", *overrides]
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        wall = time.monotonic() - start
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
        (run,) = Path(folder).iterdir()
        summary = json.loads((run / "summary.json").read_text())
        rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("seed", "before", "after", "gain", "rounds", "seconds", "generated_tokens", "prefill_tokens",
            "prefix_hit_tokens", "policy_version", "git_commit", "git_dirty", "versions")  # fmt: skip
    return {key: summary[key] for key in keys} | {
        "publish": publish,
        "overrides": overrides,
        "wall_seconds": round(wall, 1),
        "rollout_versions": [row["rollout_policy_version"] for row in rounds],
        "exact_match_by_round": [round(row["exact_match"], 4) for row in rounds],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--control", type=int, nargs="*", default=[0], help="seeds to run without publication as well")
    parser.add_argument("--output", type=Path, default=Path(f"reports/dpo_extract_cpu_{time.strftime('%Y-%m-%d')}"))
    parser.add_argument("overrides", nargs="*", help="settings of the recipe")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "seeds.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    have = {(row["seed"], row["publish"], tuple(row["overrides"])) for row in rows}
    for seed, publish in [(s, True) for s in options.seeds] + [(s, False) for s in options.control]:
        if (seed, publish, tuple(options.overrides)) not in have:
            rows.append(one_run(seed, publish, options.overrides))
            print(json.dumps(rows[-1]), flush=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    learnt = [row for row in rows if row["publish"]]
    gains = [row["gain"]["exact_match_sampled"] for row in learnt]
    print(
        json.dumps(
            {
                "runs": len(gains),
                "median_gain": round(statistics.median(gains), 4),
                "min_gain": round(min(gains), 4),
                "min_after": round(min(row["after"]["exact_match_sampled"] for row in learnt), 4),
                "greedy_not_below_its_interval": all(
                    row["after"]["exact_match_greedy"] >= row["before"]["exact_match_greedy_interval"][0]
                    for row in learnt
                ),
                "gain_without_publication": [row["gain"]["exact_match_sampled"] for row in rows if not row["publish"]],
                "wall_seconds": [row["wall_seconds"] for row in rows],
            }
        )
    )


if __name__ == "__main__":
    main()
