"""Every function of the compiled kernels, each argument of a sound call spoiled: refused before a launch, with reasons.

Addresses are those of no memory: the emulator's schedule "none" runs no thread, so that a call which is let through
costs nothing but this test.
"""

from __future__ import annotations

import importlib.util
import re
from array import array
from pathlib import Path

import pytest

from benchmarks.launch_cost import without_kernels
from megakern.kernels.cuda import module

pytestmark = pytest.mark.skipif(module._simt is None, reason="megakern._simt is not built: make simt")

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("stubs", ROOT / "csrc/stubs.py")
stubs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stubs)
HEADER = (ROOT / "csrc/api.h").read_text()
FUNCTIONS = stubs.functions(HEADER)
FAR = 1 << 56  # bytes from tensor to tensor: more than any has


def addresses() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """function -> its tensors, and those of them that are written: no const stands before. By the stub's names."""
    structs: dict[str, tuple[set, set]] = {}
    for name, body in re.findall(r"^struct (\w+) \{\n(.*?)^\};", HEADER, re.M | re.S):
        tensors, written = structs.setdefault(name, (set(), set()))
        for constant, kind, names in re.findall(r"(const )?(\w+)\s*(\*?[^;]+);", re.sub(r"//[^\n]*", "", body)):
            for declared in names.split(","):
                label = re.search(r"\w+", declared).group()
                for part, whole in zip(structs.get(kind, ((), ())), (tensors, written), strict=True):
                    whole |= {f"{label}_{each}" for each in part}
                if "*" in declared:
                    tensors.add(label)
                    written |= set() if constant else {label}
    launches = re.findall(r"^void (\w+)\(const (\w+)&, Place\);", HEADER, re.M)
    return tuple({name: structs[struct][i] for name, struct in launches} for i in (0, 1))


TENSORS, WRITTEN = addresses()
F32, BF16, I64 = 0, 1, 5
M, C = 16, 64
ROWS = {"M": M, "C": C}
LOGITS = {"dtype": BF16, **ROWS, "stride": C, "start": 0, "real": C, "vocab_size": C, "ignore_index": -100}
LOGITS = {f"rows_{name}": value for name, value in {**LOGITS, "label_smoothing": 0.1, "z_loss": 0.0}.items()}
NORM = {"dtype": BF16, "weight_dtype": BF16, **ROWS, "threads": 8, "rows": 16, "cluster": 1}
B, T, H, HKV, D = 2, 24, 4, 2, 64
SIZES = {"dtype": BF16, "sizes_B": B, "sizes_T": T, "sizes_S": T, "sizes_H": H, "sizes_Hkv": HKV, "sizes_D": D}
SIZES |= {"left": -1, "right": 0, "scale": 0.125, "features_slope_stride": 0, "features_softcap": 0.0}
SIZES |= {"features_seed": 1, "features_first_sample": 0, "features_first_head": 0, "features_kept": 1.0}
SIZES |= {"features_threshold": -(1 << 31)}


def strides(*names: str) -> dict[str, int]:
    """Of contiguous tensors (B, T, heads, D)."""
    heads = {name: HKV if name in ("k", "v") else H for name in names}
    return {
        f"{name}_strides_{by}": value
        for name in names
        for by, value in (("sample", T * heads[name] * D), ("token", heads[name] * D), ("head", D))
    }


TABLES = [array("q", [FAR * i for i in range(1, 6)] + [C]), array("q", [FAR, C, F32])]
TABLES = [(table, table.buffer_info()[0]) for table in TABLES]
# A sound call of each function, but for its addresses; "absent": tensors that are not there.
SOUND: dict[str, dict] = {
    "activation_forward": {"dtype": BF16, "kind": 0, **ROWS, "x_stride": C},
    "activation_backward": {"dtype": BF16, "kind": 0, **ROWS, "dy_stride": C, "x_stride": C},
    "swiglu_forward": {"dtype": BF16, **ROWS, "gate_stride": C, "up_stride": C},
    "swiglu_backward": {"dtype": BF16, **ROWS, "dy_stride": C, "gate_stride": C, "up_stride": C},
    "linear_product": {
        "absent": {"b_up", "bias_up", "saved", "saved_up", "out_up", "pre_up", "sums", "parts", "arrivals"},
        "dtype": BF16, "out_dtype": BF16, "bias_dtype": BF16, "layout": 0, "activation": 0, "accumulate": False,
        "M": 128, "N": 128, "K": 64, "a_stride": 64, "b_stride": 64, "b_up_stride": 0, "residual_stride": 128,
        "saved_stride": 0, "saved_up_stride": 0, "out_stride": 128, "tile_rows": 128, "tile_cols": 128, "cluster": 1,
        "band": 2048, "head_start": 0, "blocks": 8, "splits": 1, "whole": 1,
    },
    "column_sums": {"dtype": BF16, "M": M, "N": C, "x_stride": C, "P": 1},
    "part_sums": {"out_dtype": BF16, "N": C, "P": 4},
    "cross_entropy_rows": {**LOGITS, "threads": 128},
    "cross_entropy_parts": {**LOGITS, "threads": 128},
    "cross_entropy_shift": LOGITS,
    "cross_entropy_finish": LOGITS,
    "cross_entropy_gradient": {**LOGITS, "scale_stride": 1, "out_stride": C},
    "cross_entropy_loss_and_gradient": {
        **LOGITS, "scale_stride": 1, "out_stride": C, "threads": 128, "held": 0, "kept": 1, "ahead": 1, "blocks": 8,
    },
    "scale_unless_one": {"dtype": BF16, "count": C},
    "adamw": {
        "table": TABLES[0][1], "tensors": 1, "piece": 1024, "param": BF16, "grad": F32, "moment": F32, "master": 1,
        "zero_grads": True, "decay": 1.0, "beta1": 0.9, "one_beta1": 0.1, "beta2": 0.9, "one_beta2": 0.1,
        "step_size": 1e-3, "correction": 1.0, "eps": 1e-8,
    },
    "sum_of_squares": {"table": TABLES[1][1], "tensors": 1, "piece": 1024, "count": 1},
    "norm_forward": {**NORM, "x_stride": C, "residual_stride": C, "eps": 1e-5},
    "norm_backward": {**NORM, "dy_stride": C, "dh_stride": C, "h_stride": C, "parts": 1, "stages": 2},
    "rope": {
        "dtype": BF16, "position_dtype": I64, "B": B, "T": T, "Tmax": T, "H": H, "Hkv": HKV, "D": D, "d": D // 2,
        "q_batch": T * H * D, "q_token": H * D, "q_head": D, "k_batch": T * HKV * D, "k_token": HKV * D, "k_head": D,
        "cos_stride": D // 2, "sin_stride": D // 2, "position_batch": T, "position_token": 1, "interleaved": False,
        "inverse": False, "in_place": False,
    },
    "dropout": {
        "dtype": BF16, **ROWS, "x_stride": C, "residual_stride": C, "seed": 1, "offset": 0, "length": M, "distance": M,
        "threshold": 0, "scale": 2.0,
    },
    "attention_forward": {
        **SIZES, "absent": {"q_offsets", "k_offsets"}, "sequences": 0, **strides("q", "k", "v"), "section": 2,
        "blocks": 8, "tile_rows": 128, "tile_keys": 128, "pairs": 0,
    },
    "attention_backward": {
        **SIZES, "absent": {"q_offsets", "k_offsets", "row_keys"}, "lines": B * H, "sequences": 0,
        **strides("q", "k", "v", "dout", "out"), "section": 2, "tile_rows": 128, "from_registers": False,
    },
    "attention_decode": {
        **SIZES, "absent": {"table", "lengths"}, **strides("q", "k", "v"), "pages": 0, "page_size": 0,
        "table_columns": 0, "table_stride": 0, "splits": 2,
    },
}  # fmt: skip

ANY = {"rows_ignore_index", "seed", "features_seed", "features_first_sample", "features_first_head"}
ANY |= {"threshold", "features_threshold", "device", "stream"}
"""Whole numbers that are all legal, or that a launch refuses."""
UNUSED = {"sequences", "pages", "page_size", "table_columns", "table_stride", "b_up_stride", "saved_stride"}
UNUSED |= {"saved_up_stride"}
"""Those of tensors that are absent from the sound calls."""
OPTIONAL = {  # a call without one of these is sound too
    "norm_forward": {"residual", "bias", "mean"},
    "norm_backward": {"dh", "mean", "dbias"},
    "linear_product": {"bias", "residual", "pre"},
    "cross_entropy_gradient": {"scale"},
    "cross_entropy_loss_and_gradient": {"scale"},
    "adamw": {"grad_scale"},
    "rope": {"positions"},
    "dropout": {"residual"},
    "attention_forward": {"features_slopes"},
    "attention_backward": {"features_slopes", "turns"},
    "attention_decode": {"features_slopes"},
}
IN_PLACE = {  # outputs that may be an input, whole
    "activation_forward": {("y", "x")},
    "activation_backward": {("dx", "dy"), ("dx", "x")},
    "swiglu_forward": {("y", "gate"), ("y", "up")},
    "swiglu_backward": {(out, x) for out in ("dgate", "dup") for x in ("dy", "gate", "up")},
    "cross_entropy_gradient": {("out", "rows_logits")},
    "cross_entropy_loss_and_gradient": {("out", "rows_logits")},
    "dropout": {("out", "x"), ("out", "residual")},
}


def arguments(function: str) -> dict[str, object]:
    """Of the sound call, by name."""
    known = {"device": -1, "stream": 0, **SOUND[function]}
    absent = known.get("absent", ())
    return {
        name: known[name] if name in known else 0 if name in absent else (i + 1) * FAR
        for i, (name, _) in enumerate(FUNCTIONS[function])
    }


def call(function: str, **spoiled) -> str:
    """Why it is refused; "" if it is not."""
    with without_kernels():
        try:
            getattr(module._simt, function)(*{**arguments(function), **spoiled}.values())
        except ValueError as error:
            assert str(error).startswith(f"{function}: "), error
            return str(error).removeprefix(f"{function}: ")
    return ""


def tensors(function: str) -> list[str]:
    """Those that are there, but for lists in the host's memory."""
    values = arguments(function)
    return [name for name in values if name in TENSORS[function] and values[name] and name != "table"]


def accepted(function: str, changes) -> list:
    return [change for change in changes if not call(function, **change)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_sound_calls_are_accepted(function):
    for name in OPTIONAL.get(function, ()):
        assert call(function, **{name: 0}) == "", name
    for out, other in IN_PLACE.get(function, ()):
        assert call(function, **{out: arguments(function)[other]}) == "", (out, other)
    assert call(function) == ""


@pytest.mark.parametrize("function", FUNCTIONS)
def test_addresses(function):
    """None, one that is no multiple of an element's size, and one that is no address."""
    values, names = arguments(function), tensors(function)
    assert accepted(function, [{name: 0} for name in set(names) - OPTIONAL.get(function, set())]) == []
    assert accepted(function, [{name: values[name] + 1} for name in names]) == []
    assert accepted(function, [{name: -8} for name in names]) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_codes_sizes_and_strides(function):
    """Negative, beyond any memory or no known code, and beyond 64 bits."""
    spoiled = [
        {name: value}
        for name, kind in FUNCTIONS[function]
        if kind == "int" and name not in ANY | UNUSED | TENSORS[function]
        for value in (-2, 9 if "dtype" in name else 1 << 60, 1 << 70)
    ]
    assert accepted(function, spoiled) == []


@pytest.mark.parametrize("function", ["linear_product", "attention_forward", "attention_backward", "attention_decode"])
def test_rows_that_tma_reads_are_apart(function):
    """Elsewhere a stride of 0 is one row for all."""
    others = UNUSED | {"features_slope_stride"}
    names = [name for name, _ in FUNCTIONS[function] if "stride" in name and name not in others]
    assert len(names) >= 4 and accepted(function, [{name: 0} for name in names]) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_outputs_overlap_nothing(function):
    """Each output in the place of every other tensor, or, where that is legal, 16 bytes behind it."""
    values, names, found = arguments(function), tensors(function), {}
    for out in WRITTEN[function] & set(names):
        for other in set(names) - {out}:
            beside = 16 if (out, other) in IN_PLACE.get(function, ()) else 0
            found[out, other] = call(function, **{out: values[other] + beside})
    assert {pair: why for pair, why in found.items() if not re.search("must not overlap|overlaps", why)} == {}


@pytest.mark.parametrize("function", ["adamw", "sum_of_squares"])
def test_tensors_of_a_list_overlap_nothing(function):
    """Each address of a row in the place of the one before it; an output in that of a tensor."""
    table, address = TABLES[function == "sum_of_squares"]
    if function == "sum_of_squares":
        for out in ("sums", "out"):
            assert call(function, **{out: table[0]}).startswith(f"tensor 0 overlaps {out}; give it memory of its own")
        return
    assert table.buffer_info()[0] == address
    for column, name in enumerate(("grad", "exp_avg", "exp_avg_sq", "master"), start=1):
        before, table[column] = table[column], table[column - 1] + 8
        found = call(function)
        table[column] = before
        assert re.match(rf"{name} 0 overlaps \w+; give it memory of its own", found), (name, found)
    assert call(function) == ""


BLOCKS = "takes [0-9]+ blocks, and a grid has at most 2147483647; pass fewer rows at a time"
WIDE, MANY = 1 << 16, 1 << 14
ALL_HEADS = {f"sizes_{name}": MANY for name in ("B", "H", "Hkv")} | {"sizes_T": 1 << 12, "sizes_S": 1 << 12}
ALL_HEADS |= {f"{name}_strides_{by}": D for name in ("q", "k", "v") for by in ("sample", "token", "head")}
GRIDS = {  # more than a grid has room for, or than numbers of rows in 32 bits; the other kernels' blocks walk on
    "activation_forward": ({"M": 1 << 40}, BLOCKS),
    "activation_backward": ({"M": 1 << 40}, BLOCKS),
    "swiglu_forward": ({"M": 1 << 40}, BLOCKS),
    "swiglu_backward": ({"M": 1 << 40}, BLOCKS),
    "dropout": ({"M": 1 << 40}, BLOCKS),
    "rope": ({"B": 1 << 33, "T": 16, "H": 0, "Hkv": 1, "position_batch": 1}, BLOCKS),
    "norm_forward": ({"M": 1 << 40}, BLOCKS),
    "norm_backward": ({"parts": 1 << 16}, "parts must be 1 to 65535, got 65536"),
    "column_sums": ({"N": 1 << 40}, BLOCKS),
    "part_sums": ({"N": 1 << 40}, BLOCKS),
    "scale_unless_one": ({"count": 1 << 48}, BLOCKS),
    "cross_entropy_rows": ({"rows_M": 1 << 31}, "M must be 0 to 2147483647, got 2147483648"),
    "cross_entropy_parts": ({"rows_M": 1 << 31}, "M must be 0 to 2147483647, got 2147483648"),
    "cross_entropy_gradient": (
        {
            "rows_M": (1 << 31) - 1,
            "out_stride": WIDE,
            **{f"rows_{n}": WIDE for n in ("C", "real", "stride", "vocab_size")},
        },
        BLOCKS,
    ),
    "linear_product": ({"M": (1 << 31) - 1}, "M must be 1 to 2147482624, got 2147483647"),
    "attention_forward": (ALL_HEADS, "tiles must be 1 to 1073741824, got 8589934592"),
    "attention_backward": (
        {
            **ALL_HEADS,
            "lines": 1 << 33,
            **{f"{name}_strides_{by}": D for name in ("dout", "out") for by in ("sample", "token", "head")},
        },
        "lines must be 1 to 2147483647, got 8589934592",
    ),
    "attention_decode": ({**ALL_HEADS, "sizes_T": 1 << 8}, BLOCKS),
}


@pytest.mark.parametrize("function", GRIDS)
def test_grids_and_numbers_of_32_bits(function):
    spoiled, message = GRIDS[function]
    assert re.match(message, call(function, **spoiled)), call(function, **spoiled)


def test_lists_of_more_pieces_than_a_grid_has_blocks():
    for function, column in (("adamw", 5), ("sum_of_squares", 1)):
        table, _ = TABLES[function == "sum_of_squares"]
        before, table[column] = table[column], 1 << 46
        count = {"count": (1 << 36) % (1 << 31)} if function == "sum_of_squares" else {}
        found = call(function, **count)
        table[column] = before
        assert re.match(f"{BLOCKS}|count must be the number of pieces, 68719476736, got 0", found), found
