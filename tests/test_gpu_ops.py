"""What of the ops only a GPU shows: inductor with Triton kernels inside, CUDA graphs, other streams, the optimizer."""

from __future__ import annotations

import pytest
import torch

import megakern as mk
from megakern.ops.norm import rms_norm_reference
from tests.closeness import assert_close_to_ref

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def draw(*shape, dtype=torch.bfloat16, seed=0, scale=1.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to("cuda", dtype).requires_grad_()


def block(x, weight, gate, up, down, targets):
    """A norm, an MLP and a loss; `backend` comes from the context."""
    h, _ = mk.rms_norm(x, weight, residual=x)
    h = mk.swiglu(mk.linear(h, gate), mk.linear(h, up))
    return mk.cross_entropy(mk.linear(h, down, activation="gelu_tanh", residual=x), targets)


def inputs():
    shapes = [(96, 256), (256,), (512, 256), (512, 256), (256, 512)]
    tensors = [draw(*s, seed=i, scale=1.0 if i == 0 else 0.06) for i, s in enumerate(shapes)]
    return [*tensors, torch.randint(0, 256, (96,), device="cuda")]


def test_inductor_runs_the_triton_kernels_as_its_own():
    """The generated code launches them itself: no op of ours is left in it. Results are those of eager mode."""
    from torch._inductor.utils import run_and_get_code

    arguments = inputs()
    with mk.use_backend("triton"):
        expected = block(*arguments)
        wanted = torch.autograd.grad(expected, arguments[:-1])
        compiled = torch.compile(block, fullgraph=True)
        (loss, gradients), code = run_and_get_code(
            lambda: (loss := compiled(*arguments), torch.autograd.grad(loss, arguments[:-1]))
        )
    text = "\n".join(code)
    kernels = "_norm_forward_rows", "_norm_backward_rows", "_product", "_swiglu_forward", "_cross_entropy_gradient"
    for kernel in kernels:
        assert kernel in text, f"{kernel} is not in the generated code"
    assert "torch.ops.megakern" not in text
    assert_close_to_ref(loss, expected.double().detach(), expected.detach())
    for ours, eager in zip(gradients, wanted, strict=True):
        assert_close_to_ref(ours, eager.double(), eager)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_graph_replays_with_new_inputs(backend):
    """Nothing in forward or backward waits for the GPU or goes to another stream: else capture fails."""
    if reason := mk.explain("rms_norm", draw(2, 8), draw(8)).reasons[backend].partition("no: ")[2]:
        pytest.skip(reason)
    x, weight = draw(64, 512), draw(512, seed=1)
    op = lambda x: mk.rms_norm(x, weight, backend=backend)  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = op(x)
        torch.autograd.grad(y, x, torch.ones_like(y))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = op(x)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    new = draw(64, 512, seed=2)
    with torch.no_grad():
        x.copy_(new)
    graph.replay()
    expected = op(new)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    torch.testing.assert_close(dx, torch.autograd.grad(expected, new, torch.ones_like(expected))[0], rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_launches_go_to_the_current_stream(backend):
    """The input is written late on a stream of its own; a launch on another one would read what was there before."""
    if reason := mk.explain("rms_norm", draw(2, 8), draw(8)).reasons[backend].partition("no: ")[2]:
        pytest.skip(reason)
    x, weight = torch.zeros(256, 1024, device="cuda"), torch.ones(1024, device="cuda")
    mk.rms_norm(x, weight, backend=backend)  # compiled before
    value = draw(256, 1024, dtype=torch.float32).detach()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(value)
        y = mk.rms_norm(x, weight, backend=backend)
    torch.cuda.synchronize()
    assert_close_to_ref(y, rms_norm_reference(value.double(), weight.double()), rms_norm_reference(value, weight))


def test_explain_names_the_kernel_and_its_tiles():
    first = str(mk.explain("rms_norm", draw(4, 1000), draw(1000))).splitlines()[0]
    assert first.startswith("rms_norm on cuda") and first.endswith((": triton", ": cuda"))
    with mk.use_backend("triton"):
        text = str(mk.explain("linear", draw(4096, 1024), draw(4096, 1024)))
    assert "runs: asked for; forward '" in text and "BM=" in text


@pytest.mark.parametrize("options", [{}, {"master": "split"}, {"master": "split", "state_dtype": torch.bfloat16}])
def test_the_optimizer_takes_the_steps_of_the_cpu(options):
    """Three clipped steps over parameters of odd sizes: those of the C++ or PyTorch kernels, to rounding.

    The two norms may differ in their last bit. Then a clipped bf16 gradient may round to its other neighbour, 2^-8
    away, and a step, which is at most lr, by as much of itself.
    """
    dtype = torch.bfloat16 if "master" in options else torch.float32
    steps, lr = 3, 0.01
    near = {"rtol": 2**-7, "atol": steps * lr * 2**-7} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    shapes = [(3,), (129, 65), (1,), (70000,)]
    runs = {}
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]
        optimizer = mk.AdamW(params, lr=lr, weight_decay=0.1, **options)
        for _ in range(steps):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
            mk.clip_grad_norm_(params, 1.0)
            optimizer.step()
        runs[device] = [p.detach().cpu().float() for p in params]
    for ours, expected in zip(runs["cuda"], runs["cpu"], strict=True):
        torch.testing.assert_close(ours, expected, **near)
