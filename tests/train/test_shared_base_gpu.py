"""A learner on base weights that processes of their own hold on GPUs."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from tests.support import base_process as there
from tests.train.conftest import build_tiny_qwen3

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def process(gpus: str) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=there.see_gpus, initargs=(gpus,))


@pytest.fixture(scope="module")
def gpus():
    import os

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "qwen3"
    return str(build_tiny_qwen3(folder, num_hidden_layers=8, hidden_size=512, spread=0.02))


@pytest.fixture
def rounds(make_pair):
    names = ("Ada", "Bob", "Cyd")
    return [[make_pair(f"name: {name}", f'{{"name": "{name}"}}', f"{name}, it is", name)] for name in names]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_learns_on_the_engines_memory_as_on_its_own(model, rounds, gpus, dtype):
    """Also when the engine's process dies under it: the driver keeps what is mapped."""
    with process(gpus[0]) as owner, process(gpus[0]) as learner, process(gpus[0]) as alone:
        expected = alone.submit(there.learn, model, None, rounds, dtype)
        handles = owner.submit(there.load, model, (8,), (0,), dtype, "cuda").result()
        before = owner.submit(there.digest).result()
        nbytes = sum(torch.Size(h.shape).numel() * h.dtype.itemsize for h in handles[0].values())
        found = learner.submit(there.learn, model, handles, rounds, dtype).result()
        assert owner.submit(there.digest).result() == before
        orphaned = learner.submit(there.learn, model, handles, rounds, dtype, owner.submit(there.pid).result()).result()
        expected = expected.result()
    for result in (found, orphaned):
        assert result["losses"] == expected["losses"]
        assert all(torch.equal(tensor, result["adapter"][name]) for name, tensor in expected["adapter"].items())
    assert expected["loaded"][0] > nbytes
    assert found["peak"][0] < nbytes / 4  # while it was built, too


def test_is_cut_where_the_engine_is_cut(model, rounds, gpus):
    """Two stages on two GPUs: the same losses as on one, and no copy of the base on either."""
    if len(gpus) < 2:
        pytest.skip("needs two GPUs")
    both = ",".join(gpus[:2])
    with process(gpus[0]) as first, process(gpus[1]) as second, process(both) as learner, process(gpus[0]) as alone:
        one = alone.submit(there.learn, model, None, rounds, "float32")
        halves = [
            owner.submit(there.load, model, (4, 4), (stage,), "float32", "cuda")
            for stage, owner in enumerate((first, second))
        ]
        handles = [half.result()[0] for half in halves]
        sizes = [sum(torch.Size(h.shape).numel() * h.dtype.itemsize for h in half.values()) for half in handles]
        found = learner.submit(there.learn, model, handles, rounds, "float32").result()
        expected = one.result()
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert all(
        torch.allclose(tensor, found["adapter"][name], atol=1e-5) for name, tensor in expected["adapter"].items()
    )
    assert all(peak < size / 4 for peak, size in zip(found["peak"], sizes, strict=True))
    assert expected["loaded"][0] > sum(sizes)
