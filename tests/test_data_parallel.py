"""Data parallelism beside one process: losses, gradients and weights for every (tp, dp), ZeRO stage and replicas."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import megakern as mk
from megakern.layers.dropout import DropoutKey
from megakern.parallel.blocks import blocks_of, local_of
from megakern.parallel.data import begin_pass, release, shard_data_parallel
from tests.runs import FAMILIES

STEPS, BATCH, T = 10, 8, 16


def full(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole of each tensor, put together from the blocks of all ranks; replicas must be the same bit for bit."""
    parts = {name: [(b, b.of(local_of(t)).clone()) for b in blocks_of(name, t)] for name, t in tensors.items()}
    ranks = [None] * dist.get_world_size() if dist.is_initialized() else [parts]
    if dist.is_initialized():
        dist.all_gather_object(ranks, parts)
    whole = {name: torch.full(t.shape, torch.nan, dtype=t.dtype) for name, t in tensors.items()}
    for rank in ranks:
        for name, blocks in rank.items():
            for block, value in blocks:
                where = tuple(slice(o, o + n) for o, n in zip(block.offsets, block.shape, strict=True))
                known = whole[name][where]
                assert known.isnan().all() or torch.equal(known, value), f"replicas of {name} differ"
                whole[name][where] = value
    return whole


def batch(step: int) -> torch.Tensor:
    """(BATCH, T + 1): counting texts with noise, which a model can learn in part."""
    g = torch.Generator().manual_seed(step)
    text = torch.randint(0, 60, (BATCH, 1), generator=g) + torch.arange(T + 1) * torch.randint(
        1, 4, (BATCH, 1), generator=g
    )
    noise = torch.rand(BATCH, T + 1, generator=g) < 0.1
    return torch.where(noise, torch.randint(0, 60, (BATCH, T + 1), generator=g), text % 60)


def build(name: str, parallel: mk.ParallelContext, zero: int, compute: torch.dtype, recompute: str = "none") -> mk.GPT:
    model = mk.GPT(FAMILIES[name], parallel, device="meta", compute_dtype=compute, recompute=recompute)
    shard_data_parallel(model, parallel, model.blocks, zero=zero)
    model.materialize("cpu", seed=11)
    return model


def backward(model: mk.GPT, parallel: mk.ParallelContext, step: int, passes: int, zero: int) -> torch.Tensor:
    """Gradients of a whole step -> its loss, the mean over dp."""
    dp, rows = parallel.size("dp"), BATCH // passes // parallel.size("dp")
    total = torch.zeros(())
    for index in range(passes):
        first = (index * dp + parallel.rank("dp")) * rows
        text = batch(step)[first : first + rows]
        begin_pass(model, zero=zero, last=index + 1 == passes)
        key = DropoutKey(seed=11, step=step, first_sample=first)
        loss = model(text[:, :-1], text[:, 1:], dropout_key=key) / passes
        loss.backward()
        total += loss.detach()
    mk.finish_gradients(model.parameters())
    if parallel.group("dp") is not None:
        dist.all_reduce(total, group=parallel.group("dp"))
    return total / dp


def train(
    name: str,
    tp: int,
    dp: int,
    zero: int = 2,
    replicas: int = 1,
    passes: int = 1,
    compute: torch.dtype = torch.float32,
    sequence_parallel: bool = False,
    recompute: str = "none",
) -> dict:
    """STEPS steps. "update": what one step of Adam without memory and with a large eps adds, in full: -lr g / eps."""
    parallel = mk.ParallelContext.create(tp=tp, dp=dp, replicas=replicas, sequence_parallel=sequence_parallel)
    model = build(name, parallel, zero, compute, recompute)
    start = full(dict(model.named_parameters()))
    backward(model, parallel, 0, passes, zero)
    gradients = full({key: parameter.grad for key, parameter in model.named_parameters()})
    norm = mk.clip_grad_norm_(model.parameters(), float("inf")).item()
    mk.AdamW(model.parameters(), lr=1e4, betas=(0.0, 0.0), eps=1e4, weight_decay=0.0).step()
    update = {key: value - start[key] for key, value in full(dict(model.named_parameters())).items()}
    model = build(name, parallel, zero, compute, recompute)
    optimizer = mk.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(STEPS):
        losses.append(backward(model, parallel, step, passes, zero).item())
        mk.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    end = full(dict(model.named_parameters()))
    return {"start": start, "gradients": gradients, "norm": norm, "update": update, "losses": losses, "end": end}


@pytest.fixture(scope="module")
def alone():
    """`alone(name)` -> the run of one process."""
    runs = {}

    def get(name: str, compute: torch.dtype = torch.float32) -> dict:
        if (name, compute) not in runs:
            runs[name, compute] = train(name, 1, 1, compute=compute)
        return runs[name, compute]

    return get


def assert_alike(got: dict, expected: dict) -> None:
    assert expected["losses"][-1] < 0.95 * expected["losses"][0], "the model must learn for this test to see anything"
    for key, value in expected["start"].items():
        assert torch.equal(got["start"][key], value), f"initial {key}"
        for kind, scale in (("gradients", 1.0), ("update", -1.0)):
            atol = 2e-6 if kind == "gradients" else 5e-6  # a norm's weight of 1 is rounded when the update is added
            torch.testing.assert_close(
                got[kind][key],
                scale * expected["gradients"][key],
                rtol=1e-3,
                atol=atol,
                msg=lambda m, k=key: f"{k}: {m}",
            )
        torch.testing.assert_close(
            got["end"][key], expected["end"][key], rtol=1e-2, atol=5e-4, msg=lambda m, k=key: f"{k}: {m}"
        )
    assert got["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("tp", "dp"), [(2, 2), *(pytest.param(*size, marks=pytest.mark.slow) for size in [(2, 1), (1, 2), (1, 4), (4, 1)])]
)
def test_every_layout_trains_like_one_process(ranks, alone, name, tp, dp):
    for result in ranks.run(train, tp * dp, name, tp, dp):
        assert_alike(result, alone(name))


@pytest.mark.parametrize(
    ("tp", "dp", "replicas"), [(2, 2, 2), *(pytest.param(1, dp, 2, marks=pytest.mark.slow) for dp in (2, 4))]
)
def test_replicas_train_like_one_process(ranks, alone, tp, dp, replicas):
    for result in ranks.run(train, tp * dp, "gpt2", tp, dp, 2, replicas, 2):
        assert_alike(result, alone("gpt2"))


@pytest.mark.parametrize(
    ("tp", "dp", "replicas"),
    [(1, 2, 1), pytest.param(2, 2, 1, marks=pytest.mark.slow), pytest.param(1, 4, 2, marks=pytest.mark.slow)],
)
def test_zero_stages_agree_bit_for_bit(ranks, alone, tp, dp, replicas):
    """Also with accumulation: 1 sums before it reduces, 2 and 3 after, so only those are the same to the last bit."""
    runs = {
        (zero, passes): ranks.run(train, tp * dp, "gpt2", tp, dp, zero, replicas, passes)[0]
        for zero in (1, 2, 3)
        for passes in (1, 2)
    }
    for result in runs.values():
        assert_alike(result, alone("gpt2"))
    for a, b in (((1, 1), (2, 1)), ((3, 1), (2, 1)), ((3, 2), (2, 2))):
        assert runs[a]["losses"] == runs[b]["losses"], f"zero and passes {a} and {b}"
        assert all(torch.equal(runs[a]["end"][key], runs[b]["end"][key]) for key in runs[a]["end"])


@pytest.mark.parametrize("zero", [1, 3])
def test_with_sequence_parallelism_and_recompute(ranks, alone, zero):
    for result in ranks.run(train, 4, "llama", 2, 2, zero, 1, 2, torch.float32, True, "full"):
        assert_alike(result, alone("llama"))


def test_bf16_compute_follows_one_process(ranks, alone):
    wide, narrow = alone("llama"), alone("llama", torch.bfloat16)
    result = ranks.run(train, 2, "llama", 1, 2, 2, 1, 2, torch.bfloat16)[0]
    error = max(abs(a - b) for a, b in zip(narrow["losses"], wide["losses"], strict=True))
    assert result["losses"] == pytest.approx(wide["losses"], abs=2 * error + 2e-3)
    assert all(value.dtype == torch.float32 for value in result["gradients"].values())
    ours, theirs, exact = (
        torch.cat([v.flatten() for v in run["gradients"].values()]) for run in (result, narrow, wide)
    )
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm() + 1e-3 * exact.norm()


COLLECTIVES = {  # torch before 2.13 has the second name only
    "all_gather": ("all_gather_single", "all_gather_into_tensor"),
    "reduce_scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
    "all_reduce": ("all_reduce",),
}


class Calls:
    """Counts the collectives that torch's FSDP2 makes, within the block."""

    def __enter__(self) -> Calls:
        self.counts, self.dtypes, self._kept = dict.fromkeys(COLLECTIVES, 0), set(), {}
        for kind, names in COLLECTIVES.items():
            name = next(name for name in names if hasattr(dist, name))
            self._kept[name] = getattr(dist, name)
            setattr(dist, name, self._counting(kind, self._kept[name]))
        return self

    def _counting(self, kind: str, function):
        def call(*arguments, **options):
            self.counts[kind] += 1
            self.dtypes |= {t.dtype for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor)}
            return function(*arguments, **options)

        return call

    def __exit__(self, *_) -> None:
        for name, function in self._kept.items():
            setattr(dist, name, function)


def count(zero: int, replicas: int, passes: int, compute: torch.dtype) -> tuple[dict, set]:
    """The collectives of one step over dp = 4."""
    parallel = mk.ParallelContext.create(dp=4, replicas=replicas)
    model = build("gpt2", parallel, zero, compute)
    backward(model, parallel, 0, 1, zero)
    model.zero_grad()
    with Calls() as calls:
        for index in range(passes):
            begin_pass(model, zero=zero, last=index + 1 == passes)
            text = batch(1)[:1]
            model(text[:, :-1], text[:, 1:], dropout_key=DropoutKey(seed=1, step=1)).backward()
    return calls.counts, calls.dtypes


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_collectives_of_a_step_are_what_the_module_says(ranks, zero, replicas):
    """Three groups: two blocks and the rest. Three micro-batches."""
    groups, k = 3, 3
    counts, dtypes = ranks.run(count, 4, zero, replicas, k, torch.bfloat16)[0]
    assert counts["all_gather"] == (2 * k * groups if zero == 3 else groups)
    assert counts["reduce_scatter"] == (groups if zero == 1 else k * groups)
    assert counts["all_reduce"] == (groups if replicas > 1 else 0)  # once a step, whatever the stage
    assert dtypes == {torch.float32}  # fp32 weights travel as they are, gradients always


def sizes() -> dict:
    """What a rank holds after construction, with dp = 4 and with dp = 1."""
    parallel = mk.ParallelContext.create(dp=4)
    model = build("gpt2", parallel, 2, torch.float32)
    held = sum(parameter.to_local().numel() for parameter in model.parameters())
    with torch.no_grad():
        model.eval()(batch(0)[:, :-1])
    gathered = any(not isinstance(parameter, DTensor) for parameter in model.parameters())
    release(model)
    again = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    whole = mk.ParallelContext.create(tp=4)
    plain = mk.GPT(FAMILIES["gpt2"], whole, device="meta")
    shard_data_parallel(plain, whole, plain.blocks, zero=3)
    wrapped = any(isinstance(module, FSDPModule) for module in plain.modules())
    return {"held": held, "gathered": gathered, "again": again, "wrapped": wrapped}


def test_a_rank_holds_its_shard_and_dp_of_one_wraps_nothing(ranks):
    total = sum(parameter.numel() for parameter in mk.GPT(FAMILIES["gpt2"], device="meta").parameters())
    results = ranks.run(sizes, 4)
    assert sum(result["held"] for result in results) == total
    for result in results:
        assert result["held"] < 0.3 * total
        assert result["gathered"]
        assert result["again"]
        assert not result["wrapped"]


def layout(dp: int, tp: int, replicas: int) -> list:
    context = mk.ParallelContext.create(tp=tp, dp=dp, replicas=replicas)
    sizes = [context.size(dim) for dim in ("pp", "dp", "cp", "tp")]
    ranks_of_dp = dist.get_process_group_ranks(context.group("dp"))
    seconds = context.group("dp")._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    return [sizes, context.rank("dp"), ranks_of_dp, seconds]


@pytest.mark.parametrize(("dp", "tp", "replicas"), [(4, 1, 2), (2, 2, 2), (2, 2, 1)])
def test_dp_is_the_whole_of_replicas_and_shards(ranks, dp, tp, replicas):
    for rank, (sizes_of, place, group, seconds) in enumerate(ranks.run(layout, 4, dp, tp, replicas)):
        assert sizes_of == [1, dp, 1, tp]
        assert place == rank // tp
        assert group == list(range(rank % tp, 4, tp))
        assert seconds == 60  # that of the default group


def wrong_replicas() -> str:
    with pytest.raises(ValueError) as error:
        mk.ParallelContext.create(dp=4, replicas=3)
    return str(error.value)


def test_wrong_sizes_are_named(ranks):
    expected = "replicas = 3 does not divide dp = 4; choose one that does"
    assert ranks.run(wrong_replicas, 4) == [expected] * 4
    model = mk.GPT(FAMILIES["gpt2"], device="meta")
    with pytest.raises(ValueError, match="zero must be 1, 2 or 3, got 4"):
        shard_data_parallel(model, mk.ParallelContext(), model.blocks, zero=4)
