"""Anyone can reuse the verifiers: they bring neither torch nor Ray, and nothing else of this project."""

import subprocess
import sys
from pathlib import Path

PROBE = """
import sys
from verifiers.json_extraction import verify
from verifiers.judge import Judge
import verifiers.sql
assert verify('{"a": 1}', {"a": 1}).reward == 1.0
heavy = {"sqlglot", "torch", "ray", "transformers", "trl", "numpy", "ember_ray", "actors", "recipes", "cuda_ext"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""


def test_imports_neither_torch_nor_ray_nor_anything_of_ours():
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", PROBE], cwd=root, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
