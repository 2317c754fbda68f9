"""What the C++ launchers of cross-entropy, AdamW and the gradient norm refuse, and how they say so."""

from __future__ import annotations

from array import array

import pytest
import torch

from megakern.kernels.cuda import module

pytestmark = pytest.mark.skipif(module._simt is None, reason="megakern._simt is not built: make simt")

M, C = 4, 40
CPU = (-1, 0)
F32, BF16, F16 = 0, 1, 2


def rows(**change):
    """The fields of struct CrossEntropy."""
    logits, targets = torch.zeros(M, C), torch.zeros(M, dtype=torch.int64)
    fields = {
        "logits": logits.data_ptr(), "targets": targets.data_ptr(), "dtype": F32, "M": M, "C": C, "stride": C,
        "start": 0, "real": C, "vocab_size": C, "ignore_index": -100, "label_smoothing": 0.0, "z_loss": 0.0,
    }  # fmt: skip
    KEPT.extend((logits, targets))
    return list({**fields, **change}.values())


KEPT: list[torch.Tensor] = []


@pytest.fixture(autouse=True)
def addresses():
    """Tensors stay until the test is over."""
    yield
    KEPT.clear()


def floats(*shape) -> int:
    KEPT.append(torch.zeros(shape))
    return KEPT[-1].data_ptr()


def refuse(message, function, *arguments):
    with pytest.raises(ValueError, match=message):
        getattr(module._simt, function)(*arguments, *CPU)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": 0}, "the address of logits is null"),
        ({"targets": 12}, "the address of targets must be a multiple of 8, got 12"),
        ({"dtype": 4}, r"dtype must be code 0 \(fp32\), 1 \(bf16\) or 2 \(fp16\), got 4"),
        ({"M": -1}, "M must be 0 to 2147483647, got -1"),
        ({"C": 1 << 31}, "C must be 0 to 2147483647, got 2147483648"),
        ({"real": C + 1}, f"real must be 0 to {C}, got {C + 1}"),
        ({"vocab_size": 0}, "vocab_size must be 1 to .*, got 0"),
    ],
)
def test_rows_of_logits(change, message):
    arguments = [*rows(**change), floats(M), floats(M)]
    refuse(f"cross_entropy_rows: {message}", "cross_entropy_rows", *arguments, 128)


def test_plans_and_outputs_of_cross_entropy():
    refuse("threads must be 32 to 512, got 1024", "cross_entropy_rows", *rows(), floats(M), floats(M), 1024)
    refuse("threads must be whole warps", "cross_entropy_rows", *rows(), floats(M), floats(M), 100)
    refuse("the address of lse is null", "cross_entropy_rows", *rows(), floats(M), 0, 128)
    both = (*rows(), 0, 0, floats(M), floats(M, C), C)
    refuse("held must be 0 or 10", "cross_entropy_loss_and_gradient", *both, 128, 3, 1, 0, 1)
    refuse("kept must be 0 to 1024, got -1", "cross_entropy_loss_and_gradient", *both, 128, 0, -1, 0, 1)
    refuse("blocks must be 1 to .*, got 0", "cross_entropy_loss_and_gradient", *both, 128, 0, 1, 0, 0)
    refuse("ahead must be 0 to 1, got 2", "cross_entropy_loss_and_gradient", *both, 128, 0, 1, 2, 1)
    arguments = rows()
    beside = arguments[0] + 4  # one element beside the logits
    refuse(
        "out is written and must not overlap logits", "cross_entropy_gradient", *arguments, floats(M), 0, 0, beside, C
    )
    refuse("the address of factor is null", "scale_unless_one", floats(8), F32, 8, 0)


def step(**change):
    """A legal call of adamw for one bf16 parameter with an fp32 master, but for `change`."""
    row = {name: floats(8) for name in ("param", "grad", "exp_avg", "exp_avg_sq", "master")} | {"count": 8}
    table = array("q", [change.pop(name, value) for name, value in row.items()])
    fields = {
        "table": table.buffer_info()[0], "tensors": 1, "piece": 1024, "param_dtype": BF16, "grad_dtype": F32,
        "moment_dtype": F32, "kind": 1, "grad_scale": 0, "zero_grads": False,
    }  # fmt: skip
    KEPT.append(table)
    assert not change.keys() - fields
    return [*{**fields, **change}.values(), 1.0, 0.9, 0.1, 0.9, 0.1, 1e-3, 1.0, 1e-8]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"param": 1}, "the address of param 0 must be a multiple of 2 and not null, got 1"),
        ({"grad": 6}, "the address of grad 0 must be a multiple of 4 and not null, got 6"),
        ({"exp_avg": 0}, "the address of exp_avg 0 must be a multiple of 4 and not null, got 0"),
        ({"exp_avg_sq": 2}, "the address of exp_avg_sq 0 must be a multiple of 4"),
        ({"master": 2}, "the address of master 0 must be a multiple of 4"),
        ({"count": 0}, "the number of elements of a tensor must be 1 to .*, got 0"),
        ({"table": 0}, "the address of table is null"),
        ({"piece": 1000}, "piece must be 1024 to .*, got 1000"),
        ({"piece": 1500}, "piece must be a multiple of 1024"),
        ({"param_dtype": 3}, r"param must be code 0 \(fp32\), 1 \(bf16\) or 2 \(fp16\), got 3"),
        ({"moment_dtype": F16}, r"moment must be code 0 \(fp32\) or 1 \(bf16\), got 2"),
        ({"kind": 3}, "master must be 0 to 2, got 3"),
        ({"kind": 0}, "bf16 params one of both kinds .*, got 0 for dtype code 1"),
        ({"kind": 2, "param_dtype": F16}, "fp16 params an fp32 one .*, got 2 for dtype code 2"),
        ({"kind": 0, "param_dtype": F32}, "the address of a master must be 0 where there is none"),
    ],
)
def test_adamw(change, message):
    module._simt.adamw(*step(), *CPU)  # sound without the change
    refuse(f"adamw: .*{message}|adamw: {message}", "adamw", *step(**change))


def test_sum_of_squares():
    def call(message, row, piece=1024, count=1, tensors=1):
        table = array("q", row)
        arguments = (table.buffer_info()[0] if row else 0, tensors, piece, count, floats(4), floats(1))
        refuse(f"sum_of_squares: {message}", "sum_of_squares", *arguments)

    address = floats(64)
    call("the address of tensor 0 must be a multiple of 4 and not null, got 0", [0, 8, F32])
    call("the number of elements of a tensor must be 1 to", [address, 0, F32])
    call(r"dtype must be code 0 \(fp32\), 1 \(bf16\) or 2 \(fp16\), got 5", [address, 8, 5])
    call("count must be the number of pieces, 1, got 2", [address, 8, F32], count=2)
    call("piece must be 1 to", [address, 8, F32], piece=0)
    call("the address of table is null", [])
