"""On which GPUs C++ products and attention are chosen, and what `mk.explain` says elsewhere. No GPU needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import megakern as mk
from megakern.kernels import cuda
from megakern.kernels.cuda import attention, module
from megakern.kernels.cuda import configs as cuda_configs
from megakern.kernels.cuda import linear as cxx
from megakern.kernels.triton import tile_config
from megakern.ops.dispatch import UNAVAILABLE
from megakern.ops.linear import chosen_backend
from megakern.ops.mlp import swiglu_backend

tile_for = attention.tile_for
ALL = "by nvcc 13.0 for sm_80, sm_90a, sm_100"


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(capability, built)`: a machine with such a GPU and such a build of megakern._C, where nothing can run."""

    def stand_in(capability: tuple[int, int], built: str) -> None:
        for backend in ("cuda", "triton"):
            monkeypatch.setitem(UNAVAILABLE, backend, None)
        for place in (cuda, module):
            monkeypatch.setattr(place, "_C", SimpleNamespace(built=built))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
        monkeypatch.setattr(tile_config, "recorded_generation", capability[0])
        monkeypatch.setattr(cxx, "multiprocessors", lambda device: 132)
        cuda._unsuited_gpu.cache_clear()

    yield stand_in
    cuda._unsuited_gpu.cache_clear()


def explained(N: int, K: int, op: str = "linear") -> tuple[mk.Explanation, str]:
    """-> what explain says of a bf16 layer, and the backend that the layer itself takes."""
    with FakeTensorMode():
        x, weight, up = (torch.empty(rows, K, dtype=torch.bfloat16, device="cuda") for rows in (4096, N, N))
        if op == "linear_swiglu":
            return mk.explain(op, x, weight, up), swiglu_backend(x, weight, up)
        return mk.explain(op, x, weight), chosen_backend(x, weight, None, None)


@pytest.mark.parametrize("op", ["linear", "linear_swiglu"])
@pytest.mark.parametrize("N", [4096, 4097])  # with sizes that sm_90a would refuse too, the GPU is the reason to name
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_than_hopper_take_triton(gpu, capability, N, op):
    gpu(capability, ALL)
    said, taken = explained(N, 1024, op)
    assert said.chosen == taken == "triton"
    name = "sm_{}{}".format(*capability)
    assert said.reasons["cuda"] == f"no: its C++ kernel is for sm_90a alone (TMA and wgmma), this GPU is {name}"
    role = "forward" if op == "linear" else "gate and up, a product each"
    assert said.reasons["triton"].startswith(f"runs: first supported in order of speed; {role} '")


@pytest.mark.parametrize("op", ["linear", "linear_swiglu"])
def test_hopper_takes_the_cxx_product_where_rows_are_whole_16_bytes(gpu, op):
    gpu((9, 0), ALL)
    said, taken = explained(4096, 1024, op)
    assert said.chosen == taken == "cuda"
    assert "TMA and wgmma, warp-specialised" in said.reasons["cuda"] and said.reasons["triton"] == "could run; slower"
    said, taken = explained(4096, 1028, op)
    assert said.chosen == taken == "triton" and "K must be a multiple of 8, got 1028" in said.reasons["cuda"]


def test_hopper_with_a_module_for_older_gpus_takes_triton(gpu):
    gpu((9, 0), "by nvcc 13.0 for sm_80")
    said, taken = explained(4096, 1024)
    assert said.chosen == taken == "triton"
    assert said.reasons["cuda"] == "no: its C++ kernel is for sm_90a, and megakern._C was built by nvcc 13.0 for sm_80"


def explained_loss(V: int = 50257, K: int = 1024, dtype: torch.dtype = torch.bfloat16) -> str:
    with FakeTensorMode():
        x, weight = (torch.empty(rows, K, dtype=dtype, device="cuda") for rows in (8192, V))
        targets = torch.empty(8192, dtype=torch.int64, device="cuda")
        said = mk.explain("linear_cross_entropy", x, weight, targets)
    assert said.chosen == "cuda"
    return said.reasons["cuda"]


def test_the_loss_takes_the_cxx_product_on_hopper_and_says_why_elsewhere(gpu):
    """Elsewhere its other kernels stay the fastest: the products alone are PyTorch's. Any vocabulary will do."""
    gpu((9, 0), ALL)
    assert "TMA and wgmma" in explained_loss() and "; x W^T of 5341 rows in tiles of " in explained_loss()
    for said, why in [
        (
            explained_loss(K=1028),
            "its C++ kernel copies rows of whole 16 bytes, so K must be a multiple of 8, got 1028",
        ),
        (explained_loss(dtype=torch.float32), "its C++ kernels take bfloat16, float16, not torch.float32"),
    ]:
        assert f"matrix products by PyTorch (linear: {why}); the loss as cross_entropy" in said
    gpu((8, 0), ALL)
    why = "its C++ kernel is for sm_90a alone (TMA and wgmma), this GPU is sm_80"
    assert f"matrix products by PyTorch (linear: {why}); " in explained_loss()
    gpu((9, 0), "by nvcc 13.0 for sm_90")
    assert (
        "(linear: its C++ kernel is for sm_90a, and megakern._C was built by nvcc 13.0 for sm_90);" in explained_loss()
    )


def attention_refusal(D: int, dtype: torch.dtype, S: int = 8) -> str:
    with FakeTensorMode():
        q, k, v = (torch.empty(1, n, 2, D, dtype=dtype, device="cuda") for n in (8, S, S))
        return mk.explain("attention", q, k, v).reasons["cuda"]


@pytest.mark.parametrize(
    "D, dtype, S, reason",
    [
        (264, torch.bfloat16, 8, "multiples of 8 up to 256, got 264"),
        (64, torch.float32, 8, "its C++ kernels take bfloat16, float16, not torch.float32"),
        (64, torch.bfloat16, 0, "wants at least one query and one key"),
    ],
)
def test_attention_names_the_gpu_before_what_another_call_could_change(gpu, D, dtype, S, reason):
    gpu((8, 0), ALL)
    of_gpu = "no: its C++ kernel is for sm_90a alone (TMA and wgmma), this GPU is sm_80"
    assert attention_refusal(D, dtype, S) == attention_refusal(64, torch.bfloat16) == of_gpu
    gpu((9, 0), ALL)
    assert reason in attention_refusal(D, dtype, S)
    assert "TMA and wgmma" in attention_refusal(64, torch.bfloat16)


@pytest.mark.parametrize("scale, softcap", [(None, 0.0), (0.3, 0.0), (0.0, 0.0), (-0.125, 0.0), (0.3, 2.0)])
@pytest.mark.parametrize("T", [2047, 2048])
def test_attention_names_the_tile_that_its_launcher_takes(gpu, monkeypatch, T, scale, softcap):
    """Of 192 queries from 2048 on, for a scale above 0 without a cap; else of 128."""
    gpu((9, 0), ALL)
    with FakeTensorMode():
        q, k, v = (torch.empty(1, T, 1, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        said = mk.explain("attention", q, k, v, scale=scale, softcap=softcap).reasons["cuda"]
    taken = []
    monkeypatch.setattr(attention, "tile_for", lambda *problem: taken.append(tile_for(*problem)) or taken[0])
    monkeypatch.setattr(attention, "call", lambda *arguments: None)
    q, k, v = (torch.empty(1, T, 1, 64, dtype=torch.bfloat16) for _ in range(3))
    scale = 0.125 if scale is None else scale
    attention.attention_forward(q, k, v, None, None, None, (-1, 0), scale, softcap, 0.0, (0, 0, 0), False)
    assert taken[0].queries == (192 if T == 2048 and scale > 0 and softcap == 0 else 128)
    assert f"forward: TMA and wgmma, {taken[0]}, " in said


@pytest.mark.parametrize("D, dtype", [(264, torch.bfloat16), (64, torch.float32), (64, torch.bfloat16)])
def test_paged_attention_names_a_gpu_of_small_blocks_first(gpu, monkeypatch, D, dtype):
    gpu((8, 9), ALL)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_configs, "kind_of", lambda device: cuda_configs.Kind(99 << 10, False))
    with FakeTensorMode():
        q, pages = (torch.empty(1, n, 2, D, dtype=dtype, device="cuda") for n in (1, 16))
        table, lengths = (torch.empty(*shape, dtype=torch.int32, device="cuda") for shape in ((1, 1), (1,)))
        said = mk.explain("paged_attention", q, pages, pages, table, lengths)
    wanted = "no: its C++ kernel wants 166912 bytes of shared memory, this GPU has 101376"
    assert said.reasons["cuda"] == wanted
