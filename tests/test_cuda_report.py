"""What `make gates` reads from ptxas, and what it refuses. The log is that of nvcc 13.0; no compiler is needed here."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import cuda_report
from benchmarks.cuda_report import Need

pytestmark = pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt is not installed (binutils)")

LOG = """\
ptxas warning : Registers are spilled to local memory in function '_ZN8megakern10two_kernelEPf', 520 bytes spill stores, 1012 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8megakern10one_kernelIfEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN8megakern10one_kernelIfEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 1024 bytes smem, 360 bytes cmem[0]
ptxas info    : Compile time = 10.721 ms
ptxas info    : Compiling entry function '_ZN8megakern10two_kernelEPf' for 'sm_80'
ptxas info    : Function properties for _ZN8megakern10two_kernelEPf
    576 bytes stack frame, 520 bytes spill stores, 1012 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 592 bytes cumulative stack size, 360 bytes cmem[0]
ptxas info    : Compile time = 82.041 ms
ptxas info    : Function properties for _ZN8megakern1fEfPf
    0 bytes stack frame, 240 bytes spill stores, 268 bytes spill loads
ptxas warning : Registers are spilled to local memory in function '_ZN8megakern1fEfPf', 208 bytes spill stores, 236 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8megakern10one_kernelIfEEvPT_' for 'sm_90a'
ptxas info    : Function properties for _ZN8megakern10one_kernelIfEEvPT_
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 12 registers, used 1 barriers, 1024 bytes smem
"""  # noqa: E501 - as ptxas prints it
ONE, TWO = Need(10, 0, 0, 1024), Need(32, 760, 592, 0)


BUDGET = {
    "nvcc": "13.0",
    "kernels": {
        "sm_80": {"file one_kernel<float>": vars(ONE), "file two_kernel": vars(TWO)},
        "sm_90a": {"file one_kernel<float>": vars(Need(12, 0, 0, 1024))},
    },
}


def test_each_kernel_of_each_architecture_is_read():
    needs = cuda_report.measure({"file": LOG})
    assert needs["sm_80"] == {"file one_kernel<float>": ONE, "file two_kernel": TWO}
    assert needs["sm_90a"] == {"file one_kernel<float>": Need(12, 0, 0, 1024)}
    assert needs["sm_100"] == {}


def test_a_source_without_kernels_has_none():
    assert cuda_report.read("ptxas info    : 0 bytes gmem\n") == {}


def test_the_budget_is_kept_or_the_rise_is_named():
    assert cuda_report.complaints({"file": LOG}, BUDGET, "13.0") == []
    worse = LOG.replace("Used 12 registers", "Used 13 registers").replace(
        "0 bytes stack frame, 0 bytes spill", "8 bytes stack frame, 8 bytes spill"
    )
    assert cuda_report.complaints({"file": worse}, BUDGET, "13.0") == [
        "sm_80 file one_kernel<float>: spill rose from 0 to 8",
        "sm_80 file one_kernel<float>: stack rose from 0 to 8",
        "sm_90a file one_kernel<float>: registers rose from 12 to 13",
        "sm_90a file one_kernel<float>: spill rose from 0 to 8",
        "sm_90a file one_kernel<float>: stack rose from 0 to 8",
    ]
    assert "the budget is for nvcc 13.0, this is 13.1" in cuda_report.complaints({"file": LOG}, BUDGET, "13.1")[0]
    gone = LOG[: LOG.index("ptxas info    : Compiling entry function '_ZN8megakern10two_kernelEPf'")]
    assert "sm_80 file two_kernel: in the budget, but gone; --update" in cuda_report.complaints(
        {"file": gone}, BUDGET, "13.0"
    )
    assert "sm_80 new one_kernel<float>: not in the budget; add it with --update" in cuda_report.complaints(
        {"file": LOG, "new": LOG}, BUDGET, "13.0"
    )


@pytest.mark.parametrize("note", ["C7514", "C7517", "C7519"])
def test_a_note_about_wgmma_fails_though_the_code_is_small(note):
    line = f"ptxas info    : ({note}) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    assert cuda_report.complaints({"file": f"{line}\n{LOG}"}, BUDGET, "13.0") == [f"file.cu: {line}"]


SASS = """
\t\tFunction : _ZN8megakern14product_kernelIfEEvPT_
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
\t\tFunction : _ZN8megakern14product_kernelIiEEvPT_
        /*0000*/                   HMMA.16816.F32.BF16 R24, R8, R24, R24 ;
\t\tFunction : _ZN8megakern17column_sums_kernelEPf
        /*0000*/                   FADD R0, R1, R2 ;
"""


def test_a_kernel_for_wgmma_must_have_it():
    told = cuda_report.without_wgmma(SASS, "product_kernel")
    assert told == ["sm_90a product_kernel<int>: no HGMMA in its machine code"]
    assert cuda_report.without_wgmma(SASS.replace("HMMA.16816", "HGMMA.64x64x16"), "product_kernel") == []
    assert cuda_report.without_wgmma(SASS, "attention_kernel") == [
        "attention_kernel: not in the machine code for sm_90a"
    ]
    sources = {path.stem for path in (cuda_report.ROOT / "csrc").glob("*.cu") if "wgmma_" in path.read_text()}
    assert sources | {"linear"} == set(cuda_report.WGMMA)  # of linear.cu it is in product.cuh


def test_a_softmax_that_waits_for_the_product_beside_it_is_named():
    scores, both, exp = "WARPGROUP.DEPBAR.LE gsb0, 0x1 ;", "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "MUFU.EX2 R1, R1 ;"

    def code(*lines: str, D=128, keys=8, featured=0) -> str:
        tile = f"NS_13AttentionTileILi{D}ELi128ELi{keys}EEELb{featured}E"
        return "\n".join([f"Function : _ZN8megakern24attention_forward_kernelI6__half{tile}EEvNS_4PlanE", *lines])

    def complaints(*texts: str) -> list[str]:
        return cuda_report.without_overlap("\n".join(texts), "attention_forward_kernel")

    good = code(both, exp, scores, exp, exp, "FADD R1, R1, R2 ;", exp, exp, both, exp, D=64)
    moved = code(both, exp, scores, both, exp, exp, exp, exp, both)
    kernel = "sm_90a attention_forward_kernel<__half, AttentionTile<128, 128, 8>, false>"
    told = [f"{kernel}: 0 of 4 exponentials of a thread run beside the product"]
    assert complaints(good) == [] and complaints(moved, good) == told
    assert complaints(code(both, exp, exp, exp, exp)) == told
    assert "3 of 4" in complaints(code(scores, exp, exp, exp, both, exp))[0]
    assert complaints(code(scores, both, exp, exp, exp, exp, D=256, featured=1)) == []
    assert len(complaints(code(scores, both, exp, exp, exp, exp, D=256))) == 1


@pytest.mark.parametrize(
    "D, rows, featured, held",
    [(64, 128, 0, True), (64, 128, 1, True), (128, 64, 0, True), (128, 80, 0, True), (128, 64, 1, False),
     (256, 64, 0, False)],
)  # fmt: skip
def test_exponentials_of_the_backward_pass_too(D, rows, featured, held):
    """Up to where registers suffice; of its waits the first alone stands before exponentials."""
    scores, both, exp = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MUFU.EX2 R1, R1"
    head = f"Function : _ZN8megakern25attention_backward_kernelI6__halfLi{D}ELi{rows}ELb{featured}EEEvNS_4PlanE"
    wanted = 40 if rows == 80 else 32

    def complaints(*lines: str) -> list[str]:
        return cuda_report.without_overlap("\n".join([head, *lines]), "attention_backward_kernel")

    assert complaints(scores, *[exp] * wanted, both, scores, both) == []
    named = f"sm_90a attention_backward_kernel<__half, {D}, {rows}, {'true' if featured else 'false'}>"
    told = [f"{named}: 5 of {wanted} exponentials of a thread run beside the product"]
    assert complaints(scores, *[exp] * 5, both, *[exp] * 40, scores, both) == (told if held else [])


def test_a_loop_over_lanes_around_a_copy_fails():
    assert cuda_report.with_loops_over_lanes(SASS) == []
    looped = SASS.replace("HMMA.16816", "UTMALDG.2D [UR16], [UR30] ;\n /*0010*/ @P0 BRA.U.ANY `(.L_x_206) ;")
    assert cuda_report.with_loops_over_lanes(looped) == ["sm_90a product_kernel<int>: a loop over lanes around a copy"]


def test_names_lose_what_every_kernel_has():
    mangled = ["_ZN8megakern10one_kernelIfEEvPT_", "_ZN8megakern12_GLOBAL__N_13twoILi3EEEvPf"]
    assert cuda_report.demangle(mangled) == ["one_kernel<float>", "(anonymous namespace)::two<3>"]


def test_one_source_is_updated_and_the_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_report, "BUDGET", tmp_path / "budget.json")
    other = {"other kernel": vars(ONE)}
    before = {arch: {"file gone_kernel": vars(TWO), **other} for arch in ("sm_80", "sm_90a", "sm_100")}
    cuda_report.budget.write(cuda_report.BUDGET, "nvcc", "13.0", before)
    needs = cuda_report.measure({"file": LOG})
    after = cuda_report.updated(needs, ("file",))
    assert after["sm_80"] == {"file one_kernel<float>": vars(ONE), "file two_kernel": vars(TWO), **other}
    assert after["sm_100"] == other
    assert cuda_report.updated(needs, ())["sm_100"] == {}
