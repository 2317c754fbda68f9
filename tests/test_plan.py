"""`megakern plan`: the simulated rank holds what real ranks hold, and what the formulas say. No device needed."""

from __future__ import annotations

import re

import pytest
import torch
from torch.distributed.tensor import DTensor

import megakern as mk
from megakern.cli import main
from megakern.config import ConfigError
from megakern.layers.dropout import DropoutKey
from megakern.parallel.collectives import finish_gradients
from megakern.plan import Plan, plan
from megakern.train.build import make_model, make_optimizer, start_masters
from megakern.train.config import RunConfig, make_config

GIB = 2**30


def settings(*words: str) -> RunConfig:
    return make_config({}, list(words), "test")


SMALL = (
    *("--model.preset", "tiny-llama", "--model.vocab_size", "200", "--model.dropout", "0.1", "--train.batch", "8"),
    *("--parallel.tp", "2", "--parallel.dp", "2", "--train.precision", "bf16", "--train.micro_batch", "2"),
)
LAYOUTS = [
    (),
    ("--parallel.zero", "3", "--optimizer.master", "split", "--optimizer.state_dtype", "bfloat16"),
    ("--lora.rank", "4", "--train.init_from", "base", "--optimizer.master", "split"),
    ("--parallel.replicas", "2", "--parallel.sequence_parallel", "true", "--optimizer.master", "fp32"),
]


def held(config: RunConfig) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer states of this rank after a real backward pass and update."""
    parallel = config.parallel
    context = mk.ParallelContext.create(
        tp=parallel.tp,
        dp=parallel.dp,
        replicas=parallel.replicas,
        sequence_parallel=parallel.sequence_parallel,
    )
    model = make_model(config, context, "cpu")
    optimizer = make_optimizer(model, config)
    start_masters(model, optimizer, config)
    tokens = torch.zeros(2, config.model.sequence_length, dtype=torch.int64)
    model(tokens, tokens, dropout_key=DropoutKey(seed=1, step=0)).backward()
    finish_gradients(model.parameters())
    optimizer.step()
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.ndim]
    parameters = list(model.parameters())
    return tuple(
        sum(storage_bytes(tensor) for tensor in some)
        for some in (parameters, [p.grad for p in parameters if p.requires_grad], states)
    )


def storage_bytes(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


@pytest.mark.parametrize("more", LAYOUTS, ids=["zero1", "zero3-split", "adapters", "replicas-sp"])
def test_the_simulated_rank_holds_what_a_real_one_holds(ranks, more):
    config = settings(*SMALL, *more)
    simulated = plan(config)
    assert (simulated.weights, simulated.gradients, simulated.optimizer) == ranks.run(held, 4, config)[0]
    assert simulated.peak >= simulated.weights + simulated.gradients + simulated.optimizer  # all there at the update


def test_activations_follow_the_formula():
    """With one rank nothing is gathered: what the forward pass keeps is counted, and must be what the formula says."""
    config = settings("--model.preset", "gpt2-124m", "--model.layers", "3", "--train.batch", "2")
    result = plan(config)
    assert result.config.train.precision == "bf16"
    assert result.gathered < 0.02 * result.activations
    assert result.peak > result.weights + result.gradients + result.activations
    assert result.start_peak < result.weights + 300 * 2**20, "filling a tensor takes bounded memory"


@pytest.fixture(scope="module", params=[12, pytest.param(72, marks=pytest.mark.slow)])
def large(request) -> Plan:
    """The 8.3 B model of Megatron-LM on 512 ranks: twelve of its layers, and all 72, which take 25 s."""
    return plan(
        settings(
            *("--model.preset", "megatron-8.3b", "--parallel.tp", "8", "--parallel.dp", "64"),
            *("--train.batch", "256", "--parallel.sequence_parallel", "true", "--train.recompute", "full"),
            *("--parallel.zero", "3", "--train.precision", "bf16", "--model.layers", str(request.param)),
        )
    )


def test_the_8b_model_trains_on_512_ranks_and_no_rank_needs_the_whole_of_it(large):
    model = large.config.model
    whole, positions = 4 * large.parameters, 4 * model.sequence_length * model.width
    held = (whole - positions) / 512 + positions / 64  # positions are the same on all tp ranks
    if model.layers == 72:
        assert large.parameters == pytest.approx(8.3e9, rel=0.01)
    assert large.weights == pytest.approx(held, rel=0.01)
    assert large.optimizer == pytest.approx(2 * held, rel=0.01)
    assert large.start_peak < whole / 512 + 512 * 2**20
    assert large.peak < min(4 * GIB, whole / 7)
    assert large.written == pytest.approx(3 * held, rel=0.01)


def test_a_terminal_shows_what_is_waited_for(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(["plan", *SMALL]) == 0
    assert re.fullmatch(r"\r\x1b\[Ksimulating a training step of \d+ layers \.\.\.\r\x1b\[K", capsys.readouterr().err)


def test_it_does_not_warn_of_what_it_does_with_simulated_tensors(recwarn):
    how = ("--train.recompute", "selective", "--train.recompute_modules", '["attention", "norm"]')
    assert main(["plan", *SMALL, *how]) == 0
    assert not [str(each.message) for each in recwarn]


def test_it_is_printed(capsys):
    assert main(["plan", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "on 4 processes: tp 2 x dp 2" in text
    for name in ("weights", "gradients", "optimizer states", "activations", "peak of a step", "checkpoint"):
        assert f"\n  {name} " in text


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"kv_heads = 2 is not divisible by parallel.tp = 4"):
        plan(settings(*SMALL, "--parallel.tp", "4"))
    with pytest.raises(ConfigError, match=r"train.batch = 8 must be a multiple of parallel.dp = 3"):
        plan(settings(*SMALL, "--parallel.dp", "3"))
