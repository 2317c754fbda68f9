"""What each instruction of csrc/device/ptx.cuh and ptx_warp.cuh does, in the emulator and on a GPU where there is one.

The expected values come from formulas in plain PyTorch. All of them are exact: copies, and sums of whole numbers.
"""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch

from tests import simt

MACHINES = ["simt"]
if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
    MACHINES.append("gpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module", params=MACHINES)
def machine(request):
    library = simt.cpu_library() if request.param == "simt" else simt.gpu_library()
    device = "cpu" if request.param == "simt" else "cuda"

    def run(case, tensors, numbers=()):
        """The tensors after the case has run, under every schedule of the emulator."""
        results = []
        for schedule in simt.SCHEDULES if device == "cpu" else (None,):
            if schedule:
                library.schedule(schedule)
            there = [tensor.clone().to(device) for tensor in tensors]
            try:
                library.run(case, there, numbers)
            finally:
                if schedule:
                    library.schedule("forward")
            results.append([tensor.cpu() for tensor in there])
        for result in results[1:]:
            for one, other in zip(results[0], result, strict=True):
                assert same_bits(one, other)
        return results[0]

    run.name = request.param
    return run


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def whole(*shape, dtype=FP32, largest=8):
    return torch.randint(-largest, largest + 1, shape).to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- copies ---


def numbers_of(x, box, at, swizzle):
    """x with the innermost dimension last; box and at innermost first."""
    out = [simt.DTYPES[x.dtype], int(swizzle), x.dim()]
    for i in range(x.dim()):
        out += [x.shape[-1 - i], x.stride(-1 - i) * x.element_size(), box[i], at[i]]
    return [*out, 0]


def box_of(x, box, at):
    """The elements of the box, zeros where it is outside of x, and which are inside."""
    result = torch.zeros(*box[::-1], dtype=x.dtype)
    inside = torch.zeros(*box[::-1], dtype=torch.bool)
    for index in itertools.product(*(range(side) for side in box[::-1])):
        place = [i + a for i, a in zip(index, at[::-1], strict=True)]
        if all(0 <= p < size for p, size in zip(place, x.shape, strict=True)):
            result[index] = x[tuple(place)]
            inside[index] = True
    return result, inside


def in_shared(values, swizzle):
    """Bytes of a box as they lie in shared memory: 16-byte piece c of row r (128 bytes) at piece c ^ (r % 8)."""
    pieces = values.contiguous().view(torch.uint8).reshape(-1, 16)
    if not swizzle:
        return pieces.flatten()
    at = torch.arange(len(pieces))
    rows, columns = at // 8, at % 8
    out = torch.empty_like(pieces)
    out[rows * 8 + (columns ^ (rows % 8))] = pieces
    return out.flatten()


BOXES = [  # shape of x (outermost first), box and coordinates (innermost first), swizzle
    ((100,), (32,), (80,), False),
    ((40, 64), (64, 16), (0, 8), True),
    ((40, 72), (64, 16), (64, 32), True),  # over both ends
    ((40, 64), (64, 16), (-8, -5), True),  # before both starts
    ((40, 64), (24, 9), (5, 3), False),
    ((40, 64), (24, 9), (8, 3), False),
    ((40, 64), (64, 16), (0, -5), True),
    ((3, 20, 64), (64, 8, 2), (0, 16, 1), True),
    ((2, 3, 20, 64), (64, 8, 2, 2), (0, 4, 2, 1), True),
    ((40, 64), (64, 16), (64, 0), True),  # all outside
]


def store_refusal(at, dtype):
    """What the emulator says of a store that starts here. An H200 ended both kinds with an illegal instruction: the
    boxes at (5, 3), which others have met too, and at (-8, -5). It loads them.
    """
    if at[0] * dtype.itemsize % 16:
        return "its innermost coordinate must be on a multiple of 16 bytes"
    return "must not be negative" if min(at) < 0 else None


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("shape, box, at, swizzle", BOXES)
def test_boxes(machine, shape, box, at, swizzle, dtype):
    if dtype == FP32:  # 128 bytes are half as many
        half = lambda sides: (sides[0] // 2 if sides[0] != 5 else 5, *sides[1:])  # noqa: E731
        shape, box, at = (*shape[:-1], shape[-1] // 2), half(box), half(at)
    x = torch.randn(*shape).to(dtype)
    values, inside = box_of(x, box, at)
    expected = in_shared(values, swizzle)
    numbers = numbers_of(x, box, at, swizzle)
    _, out = machine("tma_load", [x, torch.full((expected.numel(),), 0xEE, dtype=torch.uint8)], numbers)
    assert same_bits(out, expected)

    tile = whole(*box[::-1], dtype=dtype)
    if refusal := store_refusal(at, dtype):
        if machine.name == "gpu":  # no kernel could run after it
            return
        for case in ("tma_store", "tma_add"):
            with pytest.raises(RuntimeError, match=refusal):
                machine(case, [in_shared(tile, swizzle), x], numbers)
        return
    after = x.clone()
    for index in inside.nonzero().tolist():
        after[tuple(i + a for i, a in zip(index, at[::-1], strict=True))] = tile[tuple(index)]
    _, y = machine("tma_store", [in_shared(tile, swizzle), x], numbers)
    assert same_bits(y, after)

    if len(shape) == 2:
        x = whole(*shape, dtype=dtype)
        after = x.clone()
        for index in inside.nonzero().tolist():
            after[tuple(i + a for i, a in zip(index, at[::-1], strict=True))] += tile[tuple(index)]
        _, y = machine("tma_add", [in_shared(tile, swizzle), x], numbers)
        assert same_bits(y, after)


@pytest.mark.parametrize(
    "start, length, row", [(0, 13, 0), (0, 1, 0), (0, 40, 32), (13, 27, 0), (13, 27, 16), (39, 1, 0)]
)
def test_rows_of_one_packed_sequence(machine, start, length, row):
    """The map of csrc/device/attention.cuh, head_map, which begins `rows` tokens before the tensor: rows of a sequence
    are read and written, those of the next are zeros and stay. On a GPU the tensor has an allocation of its own, so
    that nothing of ours lies before it.
    """
    T, rows, token, inside = 40 if machine.name == "simt" else 1 << 18, 16, 128, min(16, length - row)
    x = torch.randn(T, 64).to(BF16)
    tile = whole(rows, 64, dtype=BF16)
    dimensions = [(64, 2, 64, 0), (rows, token, rows, rows - inside), (T + rows, token, 1, start + row + inside),
                  (1, T * token, 1, 0)]  # fmt: skip
    numbers = [simt.DTYPES[BF16], 1, 4, *itertools.chain(*dimensions), rows * token]
    mine = slice(start + row, start + row + inside)
    expected = torch.zeros_like(tile)
    expected[:inside] = x[mine]
    _, out = machine("tma_load", [x, torch.full((rows * token,), 0xEE, dtype=torch.uint8)], numbers)
    assert same_bits(out, in_shared(expected, True))
    after = x.clone()
    after[mine] = tile[:inside]
    _, y = machine("tma_store", [in_shared(tile, True), x], numbers)
    assert same_bits(y, after)


def test_rows_of_bytes(machine):
    x, before = torch.randn(200), whole(200)
    before[:8] = -x[:8]
    out = machine("bulk", [x, torch.zeros(200), before, before], [800])
    assert same_bits(out[1], x)
    assert same_bits(out[2], before + x) and same_bits(out[3], before + x)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("by_barrier", [False, True])
def test_cp_async(machine, size, by_barrier):
    threads = 64
    x = torch.randint(1, 256, (2 * threads * size,), dtype=torch.uint8)
    expected = x.clone().view(2, threads, size)
    for t in range(threads):
        expected[1, t, t % (size + 1) :] = 0
    _, y = machine("cp_async", [x, torch.zeros_like(x)], [size, threads, by_barrier])
    assert same_bits(y, expected.flatten())


# --- barriers ---


def test_phases_of_an_mbarrier(machine):
    x = torch.tensor([1.0, 2.0, 3.0, 7.0])
    _, seen = machine("mbarrier", [x, torch.full((8,), -1, dtype=torch.int32)])
    assert seen.tolist() == [1, 1, 1, 1, 1, 7, 1, 0]


def test_named_barriers_and_registers(machine):
    (y,) = machine("named_barriers", [torch.zeros(32)], [5])
    assert y.tolist() == [i + 10.0 for i in range(32)]


def test_cluster(machine):
    x = whole(16, 32)
    outputs = [torch.zeros(2, 16, 32), torch.full((2,), -1, dtype=torch.int32), torch.zeros(2, 64), torch.zeros(2, 64)]
    _, y, ranks, stored, loaded = machine("cluster", [x, *outputs])
    assert torch.equal(y, (x + 100).expand(2, 16, 32))
    assert ranks.tolist() == [0, 1]
    assert torch.equal(stored, x.flatten()[:64] + torch.tensor([[1000.0], [0.0]]))  # by the other block
    assert torch.equal(loaded, torch.stack([x.flatten()[:64], x.flatten()[256:320]]))


# --- a warp ---


def pairs(values):
    """Neighbours along the last dimension as one 32-bit word each."""
    return values.contiguous().view(torch.int32)


def test_matrices_between_shared_memory_and_registers(machine):
    x, r = (torch.randint(-(1 << 15), 1 << 15, (4, 8, 8), dtype=torch.int16) for _ in range(2))
    # A lane's word i: row lane / 4, columns 2 (lane % 4) and the next of matrix i.
    registers = lambda m: pairs(m).reshape(4, 32).T.contiguous()  # noqa: E731
    result = machine("matrices", [x, registers(r), torch.zeros(2, 32, 4).int(), torch.zeros(2, 4, 8, 8).short()])
    assert torch.equal(result[2][0], registers(x))
    assert torch.equal(result[2][1], registers(x.transpose(1, 2)))
    assert torch.equal(result[3][0], r)
    assert torch.equal(result[3][1], r.transpose(1, 2))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_mma(machine, dtype):
    a, b, c = whole(16, 16, dtype=dtype), whole(16, 8, dtype=dtype), whole(16, 8, largest=100)
    g, t = torch.arange(32) // 4, 2 * (torch.arange(32) % 4)
    a_words = torch.stack([pairs(torch.stack([a[g + 8 * (i % 2), t + 8 * (i // 2) + e] for e in (0, 1)], 1))[:, 0]
                           for i in range(4)], 1)  # fmt: skip
    b_words = torch.stack([pairs(torch.stack([b[t + 8 * i + e, g] for e in (0, 1)], 1))[:, 0] for i in range(2)], 1)
    in_lanes = lambda d: torch.stack([d[g + 8 * (i // 2), t + i % 2] for i in range(4)], 1)  # noqa: E731
    *_, d = machine("mma", [a_words, b_words, in_lanes(c)], [simt.DTYPES[dtype]])
    assert same_bits(d, in_lanes(c + a.float() @ b.float()))


WGMMA = [  # dtype, N, A is M-major, B is N-major, A from registers: those of the kernels
    (BF16, 64, 0, 0, 0), (BF16, 64, 0, 1, 0), (BF16, 64, 1, 0, 0), (BF16, 64, 1, 1, 0), (BF16, 80, 0, 0, 0),
    (BF16, 112, 0, 0, 0), (BF16, 128, 0, 0, 0), (BF16, 128, 0, 1, 0), (BF16, 128, 1, 1, 0),
    (BF16, 160, 0, 0, 0), (BF16, 160, 0, 1, 0), (BF16, 160, 1, 1, 0), (BF16, 176, 0, 0, 0),
    (BF16, 256, 0, 0, 0), (BF16, 256, 0, 1, 0), (BF16, 256, 1, 1, 0), (BF16, 64, 0, 0, 1), (BF16, 64, 0, 1, 1),
    (BF16, 128, 0, 1, 1), (BF16, 192, 0, 1, 1), (BF16, 256, 0, 1, 1), (FP16, 64, 1, 0, 0), (FP16, 128, 0, 1, 0),
    (FP16, 176, 0, 0, 0), (FP16, 256, 0, 0, 0), (FP16, 128, 0, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype, N, a_major_m, b_major_n, from_registers", WGMMA)
def test_wgmma(machine, dtype, N, a_major_m, b_major_n, from_registers):
    a, b, c = whole(64, 64, dtype=dtype), whole(64, N, dtype=dtype), whole(64, N, largest=100)
    t, i = torch.arange(128)[:, None], torch.arange(N // 2)
    row = 16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2)
    col = 8 * (i // 4) + 2 * (t % 4) + i % 2
    a_there = a.T.contiguous() if a_major_m else a
    b_there = b if b_major_n else b.T.contiguous()
    numbers = [simt.DTYPES[dtype], N, a_major_m, b_major_n, from_registers]
    *_, d = machine("wgmma", [a_there, b_there, c[row, col].contiguous()], numbers)
    assert same_bits(d, (c + a.float() @ b.float())[row, col].contiguous())


def test_lanes(machine):
    threads = 96
    x = torch.randint(-50, 50, (threads,), dtype=torch.int32)
    warps, lane = x.view(-1, 32), torch.arange(32)
    words = ((warps % 3 == 0).long() << lane).sum(1, keepdim=True).to(torch.int32)
    spread = lambda column: column.expand(-1, 32)  # noqa: E731
    expected = [
        warps[:, (lane * 7 + 3) % 32], warps[:, lane ^ 5], warps[:, torch.where(lane >= 3, lane - 3, lane)],
        warps[:, torch.where(lane < 26, lane + 6, lane)], spread(words),
        spread((warps == x[0]).any(1, keepdim=True)).int(), torch.ones(3, 32).int(),
        spread(warps.sum(1, keepdim=True)), spread(warps.max(1, keepdim=True).values), warps[:, 31 - lane] * 2 + 1,
    ]  # fmt: skip
    start = torch.tensor([5, -1000], dtype=torch.int32)
    _, out, counters = machine("lanes", [x, torch.zeros(10, threads).int(), start], [threads])
    for i, values in enumerate(expected):
        assert torch.equal(out[i].view(-1, 32), values.int()), i
    assert counters.tolist() == [5 + int(x.sum()), int(x.max())]


def test_one_lane_is_elected(machine):
    (out,) = machine("elect", [torch.zeros(2, 96).int()], [96])
    assert (out.view(2, 3, 32).sum(2) == 1).all() and torch.equal(*out)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])  # of 2 bytes: up to two accesses of 16
def test_loads_and_stores(machine, size):
    threads = 40
    x = torch.randint(-(1 << 15), 1 << 15, (threads * size,), dtype=torch.int16)
    _, y = machine("vectors", [x, torch.zeros(5, threads * size, dtype=torch.int16)], [size, threads])
    assert torch.equal(y[: 5 if size == 8 else 3], x.expand(5 if size == 8 else 3, -1))


def test_rounding(machine):
    """All fp16 and bf16 values, the midpoints between neighbours, and what lies beside those."""
    bits = torch.arange(1 << 16, dtype=torch.int32)
    for dtype in (BF16, FP16):
        values = bits.to(torch.int16).view(dtype).float()
        beside = torch.tensor([-1, 0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001])
        x = (values.view(torch.int32)[:, None] + beside).flatten().to(torch.int32).view(FP32)
        y, back = torch.zeros(x.numel(), dtype=torch.int16), torch.full_like(x, 7.0)
        _, y, back = machine("convert", [x, y, back], [x.numel(), simt.DTYPES[dtype]])
        expected = x.to(dtype)
        nan = expected.isnan()
        assert torch.equal(y[~nan], expected.view(torch.int16)[~nan])
        assert (y[nan] == 0x7FFF).all()
        assert torch.equal(back[~nan], expected.float()[~nan])
        assert back[nan].isnan().all()


def test_approximations(machine):
    x = torch.cat([torch.linspace(0.01, 20, 5000), torch.logspace(-6, 6, 2000)])
    _, y = machine("approximations", [x, torch.zeros(7, x.numel())], [x.numel()])
    wide = x.double()
    exact = [wide.exp2(), wide.log2(), 1 / wide, wide.rsqrt(), wide.tanh(), wide.exp(), wide.log()]
    # Of log2 2^-22 absolute: 2^-20 of 1/4. exp(x) is 2^y of a y below 128, half an ulp of which is 2^-18: it is off by
    # ln(2) 2^-18, and by as much again by the rounding of log2(e).
    bounds = [2**-22, 2**-20, 2**-22, 2**-22, 2**-10.9, 2**-17.5, 2**-20]
    for ours, value, bound in zip(y, exact, bounds, strict=True):
        finite = value < 3e38  # what fp32 holds, and not just so
        error = (ours.double() - value).abs() / value.abs().clamp(min=0.25)
        assert error[finite].max() <= bound, math.log2(error[finite].max())
        assert ours[value > 3.5e38].isinf().all()


NO_INSTRUCTION = {"pin", "opaque", "forget_uses"}  # the compiler's alone
CHECKS = {"check_shared_end", "check_global"}  # of the emulator alone
PARTS = {"shuffle_words", "access", "dynamic_shared_memory"}  # of others in cuda.cuh
THROUGH_VECTORS = {"load_streaming", "store_whole", "store_streaming", "from_float_pair"}  # device/vector.cuh
WAITS = {"yield_thread", "fence_device"}  # show in kernels with more blocks: planted*.cu, tests/test_simt*.py


def test_every_instruction_has_a_test_here():
    device = simt.CSRC / "device"
    names = set()
    for file in ("ptx.cuh", "ptx_warp.cuh", "ptx_math.cuh", "cuda.cuh"):
        text = (device / file).read_text()
        names |= set(re.findall(r"^MK_DEVICE [^(;{=]*?(\w+)\(", text, re.M))
        names |= set(re.findall(r"^MK_(?:MATH|MATRIX_LOAD|MATRIX_STORE)\((\w+), \"", text, re.M))
    assert {"tma_load_3d", "wgmma_rs", "stmatrix_x4_transposed", "rcp_approx", "ballot"} < names
    tests = simt.CSRC / "simt" / "tests"
    golden = "".join((tests / file).read_text() for file in ("golden.cu", "golden_wgmma.cu", "rows.cu"))
    untested = {name for name in names if not re.search(rf"\b{name}\b", golden)}
    assert untested == NO_INSTRUCTION | CHECKS | PARTS | THROUGH_VECTORS | WAITS
    vectors = (device / "vector.cuh").read_text()
    assert all(f"{name}(" in vectors for name in THROUGH_VECTORS)
