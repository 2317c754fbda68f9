"""Triton kernels without a GPU: machine code for each architecture, the budget's judgement, inductor's graph."""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -r requirements-dev.txt")

import triton
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

from benchmarks import compile_report, launch_cost_triton
from benchmarks.compile_cases import SHORT
from benchmarks.compile_report import Need
from megakern.kernels import triton as backend
from megakern.kernels.triton import attention_configs, configs
from megakern.kernels.triton import norm as triton_norm
from megakern.ops import activation, attention, cross_entropy, dropout, linear, norm, rope  # noqa: F401 - they define the ops
from megakern.ops.dispatch import Problem

NEED = Need(registers=40, spill=0, shared=1024, tensor_core="HGMMA")


def judged(need: Need, *, name="kernel", budget_name="kernel", triton_version=triton.__version__, **config):
    kernels, config = {"sm_90": {budget_name: vars(NEED)}}, configs.Config("a", {}, 4, **{"spills": "known", **config})
    return compile_report.complaints(
        {"sm_90": {name: need}}, {"triton": triton_version, "kernels": kernels}, False, lambda arch, name: config
    )


def test_a_budget_is_kept_or_the_rise_is_named():
    assert judged(NEED) == []
    assert judged(Need(39, 0, 512, "HGMMA")) == []
    assert judged(Need(41, 0, 1024, "HGMMA")) == ["sm_90 kernel: registers rose from 40 to 41"]
    assert judged(Need(40, 8, 1024, "HGMMA")) == ["sm_90 kernel: spill rose from 0 to 8"]
    assert "spills 8 bytes, and its configuration does not say why" in judged(Need(40, 8, 1024, "HGMMA"), spills="")[0]
    assert judged(Need(40, 0, 1040, "HGMMA")) == ["sm_90 kernel: shared rose from 1024 to 1040"]
    assert judged(Need(40, 0, 1024, "HMMA")) == ["sm_90 kernel: tensor core 'HMMA', was 'HGMMA'"]
    assert "more than a block may have" in judged(Need(40, 0, 300000, "HGMMA"))[0]
    assert judged(NEED, name="new") == [
        "sm_90 new: not in the budget; add it with --update",
        "sm_90 kernel: in the budget, but gone; --update",
    ]
    assert "install that one" in judged(NEED, triton_version="3.5.0")[0]


def test_programs_that_share_a_multiprocessor_must_fit_it():
    need = Need(65, 0, 1024, "")  # 72 registers of each of 128 threads
    assert [need.resident(4, arch) for arch in (80, 90)] == [7, 7]
    assert Need(32, 0, 0, "").resident(1, 90) == 32 and Need(32, 0, 0, "").resident(4, 90) == 16
    assert [Need(32, 0, 80 << 10, "").resident(4, arch) for arch in (80, 90)] == [2, 2]
    assert [Need(32, 0, 55 << 10, "").resident(4, arch) for arch in (80, 90)] == [2, 4]
    assert judged(NEED, resident=12) == []
    assert judged(NEED, resident=13) == ["sm_90 kernel: 12 programs fit a multiprocessor, its configuration needs 13"]


def test_a_kernel_compiles_for_each_architecture_and_is_read():
    launch = compile_report.launches("rms_norm 128 bf16")["rms_norm 128 bf16 norm_forward_rows forward-rows"]
    for arch in compile_report.ARCHITECTURES:
        need = compile_report.compile_for(launch, arch)
        assert 16 <= need.registers <= 128 and need.spill == 0 and need.tensor_core == ""


def test_every_op_and_dtype_is_in_the_committed_budget():
    budget = json.loads(compile_report.BUDGET.read_text())
    for arch in compile_report.ARCHITECTURES:
        names = budget["kernels"][f"sm_{arch}"]
        for op in set(configs.OPS) - {"linear_swiglu"}:  # whose kernels are those of linear and swiglu
            kinds = {word for name in names if name.startswith(f"{op} ") for word in name.split()}
            assert {"bf16", "fp16", "fp32"} <= kinds, f"{op} is not in the budget of sm_{arch} for every dtype"


def possible(generation: int):
    """(kernel, dtype or case, configuration), by name: all that the tables may choose on a generation."""
    for dtype in backend.DTYPES:
        short = SHORT[dtype]
        for C in (1 << i for i in range(7, 17)):
            for which, centre, residual in product(("forward", "backward"), (True, False), (True, False)):
                yield from (
                    (f"norm_{which}", short, c.name)
                    for c in configs._norm_choice(which, C, dtype, centre, residual).options
                )
        yield from (("cross_entropy_forward", short, c.name) for c in configs.CROSS_ENTROPY)
        yield from (("cross_entropy_gradient", short, c.name) for c in configs.CROSS_ENTROPY_GRADIENT)
        for transposed, heavy, accumulate in product((True, False), repeat=3):
            found = configs.linear(8192, 8192, dtype, transposed, heavy, accumulate, generation)
            yield from (("product", short, c.name) for c in found)
        for role, BD in attention_configs.ATTENTION:
            kernel = f"attention_{role.replace(' ', '_').replace('-', '_')}"
            if BD != 32 or dtype == torch.bfloat16:  # others: of 16 and 64, the same tiles
                found = attention_configs._attention_choice(role, BD, dtype, 512, 512, "causal", generation).options
                yield from ((kernel, f"attention {BD} {short}", c.name) for c in found)
        for BD, rows in product((16, 32, 64, 128, 256), (16, 32, 64)):
            name = attention_configs.attention_decode(rows, BD, dtype).name
            yield "attention_decode", f"attention decode {BD} {short}", name


def test_every_configuration_of_the_tables_is_in_the_committed_budget():
    budget = json.loads(compile_report.BUDGET.read_text())["kernels"]
    for arch in compile_report.ARCHITECTURES:
        compiled = set()
        for name in budget[f"sm_{arch}"]:
            *case, kernel, config = name.rstrip("'").split()
            of = kernel.removesuffix("_rows").removesuffix("_chunks"), config
            compiled |= {(*of, word) for word in case} | {(*of, " ".join(case[:n])) for n in range(len(case) + 1)}
        for kernel, case, config in possible(arch // 10):
            assert (kernel, config, case) in compiled, f"sm_{arch}: no case of {kernel} {config!r} for {case}"


def test_a_launch_gives_the_driver_the_arguments_and_machine_code_for_their_alignment():
    weight, x = torch.ones(64), torch.ones(3 * 64 + 1)
    kernel = triton_norm._norm_forward_rows
    before = dict(kernel.device_caches)
    with launch_cost_triton.without_gpu() as driver:
        for offset, loaded in ((0, 1), (0, 1), (1, 2), (0, 2)):
            rows = x[offset : offset + 192].view(3, 64)
            y, *_ = triton_norm.norm_forward(rows, weight, None, None, 1e-5, False)
            assert driver.loaded == loaded, "code for rows at a multiple of 16 bytes is not for other rows"
            grid, arguments = driver.last[:3], driver.last[9:]
            assert grid == (1, 1, 1)  # 16 rows of 128 padded columns
            given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments[:10]]
            assert given[0] == rows.data_ptr() and given[2] == weight.data_ptr() and given[4] == y.data_ptr()
            assert given[8:10] == [3, 64]
        assert driver.launches == 4
    assert kernel.device_caches == before, "what the stand-in loaded must be gone with it"


def test_every_launcher_of_the_launch_cost_benchmark_starts_its_kernels():
    with launch_cost_triton.without_gpu() as driver:
        for name, call in launch_cost_triton.calls().items():
            before = driver.launches
            assert call() is not None
            wanted = 0 if name == launch_cost_triton.YARDSTICK else 2 if "backward" in name else 1
            assert driver.launches - before == wanted, name


# --- what the backend refuses, and why ---


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"op": "sort"}, "there is no Triton kernel for this op in this version"),
        ({"dtype": torch.float64}, "Triton kernels take float16, bfloat16 and float32, not torch.float64"),
        ({"device": "mps"}, "Triton kernels run on NVIDIA GPUs, not on 'mps' tensors"),
        ({"device": "cpu"}, "Triton kernels take CPU tensors only in the interpreter"),
        ({"capability": (7, 5)}, "need compute capability 8.0 or newer, this GPU has 7.5"),
        ({}, None),
    ],
)
def test_a_refusal_says_why(changes, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: changes.get("capability", (9, 0)))
    fields = {"op": "rms_norm", "device": "cuda", "dtype": torch.bfloat16, "sizes": {"C": 64}, **changes}
    fields.pop("capability", None)
    found = backend.supports(Problem(**fields))
    assert found is None if reason is None else reason in found


def test_without_a_gpu_or_triton_the_backend_is_unavailable(monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs an NVIDIA GPU" in backend.unavailable()
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "triton is not installed; install it with: pip install 'megakern[gpu]'" in backend.unavailable()


# --- the graph of a compiled model ---


class _Driver:
    """Stands for the GPU that Triton asks for its architecture when a kernel is traced."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def graph_of(function, *inputs) -> list:
    """The launches in the joint graph of `function`, in order, as inductor is given them."""
    graph = aot_export_joint_simple(function, inputs, trace_joint=True)
    assert not any("megakern" in str(node.target) for node in graph.graph.nodes), "an op was left whole"
    return [node for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]


def kernel_of(node) -> str:
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    return kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__


def traced(function, *inputs) -> list[str]:
    return [kernel_of(node) for node in graph_of(function, *inputs)]


@pytest.fixture
def fake(monkeypatch):
    """Makes fake tensors that want gradients; calls of ops are traced, nothing runs."""
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
    with FakeTensorMode():
        yield partial(torch.empty, requires_grad=True)


def test_inductor_sees_the_kernels_of_a_norm(fake):
    def function(x, weight):
        y, h, *_ = torch.ops.megakern.norm.default(x, weight, weight, x, 1e-5, True, "triton")
        return y.relu(), h

    kernels = traced(function, fake(5, 300), fake(300))
    assert [name.lstrip("_") for name in kernels] == ["norm_forward_rows", "norm_backward_rows", "sum_parts"]


def test_inductor_sees_the_other_kernels(fake):
    ops = torch.ops.megakern
    table, targets = fake(8, 4, requires_grad=False), torch.empty(6, dtype=torch.int64)

    def function(x, q, table, targets):
        gated = ops.swiglu.default(ops.activation.default(x, "gelu", "triton"), x, "triton")
        dropped = ops.dropout.default(gated, x, 0.1, 7, [0, 1, 1], "triton")
        loss, _ = ops.cross_entropy.default(dropped, targets, -100, 0.1, 0.0, 40, "", "triton")
        turned, _ = ops.rope.default(q, q, table, table, None, False, False, "triton")
        return loss, turned

    kernels = [name.lstrip("_") for name in traced(function, fake(6, 40), fake(1, 6, 2, 16), table, targets)]
    forward = ["activation_forward", "swiglu_forward", "dropout", "cross_entropy_forward", "rope"]
    backward = ["rope", "cross_entropy_gradient", "dropout", "swiglu_backward", "activation_backward"]
    assert kernels == forward + backward


def test_inductor_sees_the_kernels_of_a_linear_layer(fake):
    def function(x, weight, bias):
        y, _ = torch.ops.megakern.linear.default(x, weight, bias, None, "silu", True, "triton")
        return (y,)

    kernels = [name.lstrip("_") for name in traced(function, fake(6, 40), fake(24, 40), fake(24))]
    assert kernels == ["product", "activation_backward", "product", "product", "column_sums", "sum_parts"]


def test_inductor_sees_the_kernels_of_attention(fake):
    def function(q, k, v):
        how = ([-1, 0], 0.3, 0.0, 0.1, [7, 0, 0], True, "triton")
        out, lse = torch.ops.megakern.attention.default(q, k, v, None, None, None, *how)
        return out, lse

    kernels = [name.lstrip("_") for name in traced(function, fake(2, 9, 4, 16), *(fake(2, 9, 2, 16) for _ in "kv"))]
    assert kernels == ["attention_forward", "attention_query_gradient", "attention_key_value_gradient"]


def test_inductor_sees_the_kernels_of_packed_attention_and_what_they_write(fake):
    """Offsets, from which addresses are computed, are not among it."""
    ends = fake(4, dtype=torch.int32, requires_grad=False)

    def function(q, k, v, ends):
        how = ([-1, 0], 0.3, 0.0, 0.1, [7, 0, 0], True, "triton")
        return torch.ops.megakern.attention.default(q, k, v, ends, ends, None, *how)

    kernels, written = [], []
    for node in graph_of(function, fake(9, 4, 16), *(fake(9, 2, 16) for _ in "kv"), ends):
        kernels.append(kernel_of(node).lstrip("_"))
        written.append(list(node.kwargs["tensors_to_clone"]))
    assert kernels == ["attention_forward", "attention_query_gradient", "attention_key_value_gradient"]
    assert written == [["out", "lse"], ["dq", "log", "delta"], ["dk", "dv"]]
