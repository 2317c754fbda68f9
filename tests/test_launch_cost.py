"""What a call of a C++ launcher costs the CPU: bounded by what PyTorch takes for one tensor, on the same core."""

from __future__ import annotations

import pytest

from benchmarks import launch_cost
from megakern.kernels.cuda import module

pytestmark = pytest.mark.skipif(module._simt is None, reason=module.SIMT_ERROR)

# In calls of torch.empty, 1.24 us on one core of a Xeon. There norms take 4.1 to 4.7 forward, 4.8 backward, gelu 1.5,
# rope 4.4, AdamW 4.9, `mk.rms_norm` 12.1. Before outputs, choices and the way to the launcher were cheaper: norms 6.5
# to 7.5 and 6.7, `mk.rms_norm` 16.5. The bounds leave room for cores that are not idle, on which they vary by a sixth.
MOST = {
    "layer norm": 6.5,
    "rms norm": 6,
    "rms norm + residual": 6.5,
    "layer norm backward": 7,
    "gelu": 2.5,
    "swiglu backward": 4,
    "dropout + residual": 3,
    "rope": 6,
    "row losses": 5.5,
    "loss and gradient": 5,
    "AdamW of one tensor": 7,
    "gradient norm of one tensor": 6,
    "mk.rms_norm, the launcher included": 20,
}


@pytest.mark.slow  # beside other tests on the same cores the ratios mean little
def test_launchers_stay_cheap():
    calls = launch_cost.calls()
    calls = {name: calls[name] for name in (launch_cost.YARDSTICK, *MOST)}
    with launch_cost.without_kernels():
        times = launch_cost.measure(calls, turns=25, repeats=100)  # short turns: one of them has the core to itself
    least = {name: min(turns) for name, turns in times.items()}
    found = {name: least[name] / least[launch_cost.YARDSTICK] for name in MOST}
    assert all(found[name] <= most for name, most in MOST.items()), (found, least)


def test_every_launcher_of_the_benchmark_runs_with_its_kernel_too():
    """Under a schedule that runs threads: the calls are sound, and not cheap because they are refused."""
    for name, call in launch_cost.calls().items():
        assert call() is not None or name.startswith("AdamW"), name  # AdamW works in place
    before = module._simt.schedule()
    with launch_cost.without_kernels():
        assert module._simt.schedule() == "none"
    assert module._simt.schedule() == before
