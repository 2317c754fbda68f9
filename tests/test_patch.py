"""A patched Hugging Face model gives the numbers of the unpatched one: losses, gradients, logits, generated text.

Float64 copies of the unpatched models are the reference. No device needed.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import megakern as mk
from megakern.kernels.torch import linear_cross_entropy
from megakern.patching import attention as hook
from tests.closeness import FLOOR, assert_close_to_ref
from tests.hugging import FAMILIES, T, V, batch, gradients, make, reference_loss, transformers, wide


def assert_same_training(patched, plain, inputs, *, ours=None) -> None:
    """Loss and every gradient, against float64. `ours`: what the patched model is given, if not the same."""
    reference = wide(plain)
    expected = reference_loss(reference, inputs)
    expected.backward()
    theirs, out = plain(**inputs).loss, patched(**(ours or inputs))
    theirs.backward()
    out.loss.backward()
    floor = FLOOR[plain.dtype]  # the loss itself is fp32, made of logits in the model's dtype
    assert_close_to_ref(out.loss, expected.detach(), theirs.detach(), name="loss", floor=floor)
    wide_gradients, their_gradients = gradients(reference), gradients(plain)
    for name, gradient in gradients(patched).items():
        assert_close_to_ref(gradient, wide_gradients[name], their_gradients[name], name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family, dtype):
    plain = make(family).to(dtype)
    patched = copy.deepcopy(plain)
    mk.patch(patched)
    for kind in ("plain", "left", "right", "packed"):
        inputs = batch(kind)
        assert_same_training(patched, plain, inputs)
        assert patched(**inputs).logits is None, "in training the logits are not made"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_sequences_are_apart_though_a_cache_is_the_default(family):
    """Without the patch a new cache, which a config asks for by default, keeps masks from seeing the packing."""
    plain = make(family)
    patched = copy.deepcopy(plain)
    mk.patch(patched)
    apart = batch("packed")
    inputs = {name: value for name, value in apart.items() if name != "use_cache"}
    assert_same_training(patched, plain, apart, ours=inputs)
    assert abs(plain(**inputs).loss - plain(**apart).loss) > 1e-3, "nothing to see here any more"
    assert patched.eval()(**inputs).loss.item() == pytest.approx(plain(**apart).loss.item(), abs=1e-5)


def test_packed_by_the_arguments_of_flash_attention():
    plain = make("qwen2")
    patched = copy.deepcopy(plain)
    mk.patch(patched)
    inputs = batch("packed", rows=1)
    offsets = torch.tensor([0, 7, 8, T], dtype=torch.int32)
    more = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 16, "max_length_k": 16}
    assert_same_training(patched, plain, inputs, ours={**inputs, **more})


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_without_labels_and_in_evaluation(family):
    plain = make(family).eval()
    patched = copy.deepcopy(plain)
    mk.patch(patched)
    for kind in ("plain", "left", "right", "packed"):
        inputs = batch(kind)
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        with torch.no_grad():
            expected, theirs, ours = (m(**inputs) for m in (wide(plain), plain, patched))
        assert_close_to_ref(ours.logits[real], expected.logits[real], theirs.logits[real])
        assert expected.logits.std() > 0.3, "logits near zero would show nothing"
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), abs=1e-5)


def test_masks_that_are_no_padding_run_as_without_the_patch():
    plain = make("llama").eval()
    patched = copy.deepcopy(plain)
    mk.patch(patched)
    tokens = batch("plain")["input_ids"]
    holes = torch.ones(3, T, dtype=torch.long)
    holes[0, 5:9] = 0
    holes[1, :2] = 0
    free = torch.rand(3, 1, T, T, generator=torch.Generator().manual_seed(0)) < 0.5
    for mask in (holes, free | torch.eye(T, dtype=torch.bool)):
        with torch.no_grad():
            expected, ours = (m(tokens, attention_mask=mask).logits for m in (plain, patched))
        seen = torch.ones(3, T, dtype=torch.bool) if mask.ndim == 4 else mask.bool()
        torch.testing.assert_close(ours[seen], expected[seen], rtol=1e-5, atol=1e-5)


def test_which_masks_reach_our_attention():
    """The mask function alone: None, offsets, or a bool mask for what is neither."""
    call = {"batch_size": 2, "q_length": 4, "kv_length": 4, "allow_is_causal_skip": True}
    ones = torch.ones(2, 4, dtype=torch.bool)
    assert hook.mask(**call) is None
    assert hook.mask(**call, attention_mask=ones) is None
    left = ones.clone()
    left[1, :1] = False
    assert hook.mask(**call, attention_mask=left)[0, 0].tolist() == [[0, 4, 5, 5, 8], [0, 4, 4, 5, 8]]
    hole = ones.clone()
    hole[0, 2] = False
    assert hook.mask(**call, attention_mask=hole).shape == (2, 1, 4, 4)
    beside = {**call, "q_length": 1, "q_offset": 3}
    assert hook.mask(**beside) is None and hook.mask(**beside, attention_mask=ones) is None
    assert hook.mask(**beside, attention_mask=left).tolist() == [[[[True] * 4]], [[[False, True, True, True]]]]
    several = {**call, "q_offset": 3, "kv_length": 7}
    assert hook.mask(**several)[0, 0].tolist() == [[0, 4, 8], [0, 7, 14]]
    assert hook.mask(**{**beside, "kv_length": 6}).shape == (2, 1, 1, 6), "a static cache has room to spare"
    assert hook.mask(2, 4, 4).shape == (2, 1, 4, 4), "without allow_is_causal_skip it may not be causal"


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_over_caches(family):
    plain = make(family).eval()
    patched = copy.deepcopy(plain)
    mk.patch(patched)
    inputs = batch("left")
    prompts = {name: inputs[name][:, T - 10 :] for name in ("input_ids", "attention_mask")}
    for cache in (None, "static"):
        how = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
        expected, ours = (m.generate(**prompts, **how) for m in (plain, patched))
        assert torch.equal(expected, ours), cache
        assert len(ours[:, 10:].unique()) > 3, "few tokens over and over would show little"
    rows = {"input_ids": prompts["input_ids"][1:]}  # no padding: our attention beside the cache, at once or in pieces
    for how in ({}, {"prefill_chunk_size": 4}, {"num_beams": 2}):
        expected, ours = (m.generate(**rows, **how, max_new_tokens=8, do_sample=False) for m in (plain, patched))
        assert torch.equal(expected, ours), how


def test_a_mask_made_by_a_larger_model_around_this_one():
    """PyTorch's mask function says None of a first call with room to spare in the cache: keys stand at the start."""
    model = make("llama")
    layer = model.model.layers[0].self_attn
    q, k = torch.randn(1, 6, 4, 8), torch.randn(1, 2, 9, 8)
    expected = transformers.AttentionInterface()["sdpa"](layer, q, k, k, None)[0]
    torch.testing.assert_close(hook.attend(layer, q, k, k, None)[0], expected)


def test_the_logits_are_never_all_there(monkeypatch):
    """Elements of the largest tensor with the vocabulary as last dim, forward and backward, inside of our op too."""
    monkeypatch.setitem(linear_cross_entropy.CHUNK_BYTES, "cpu", 7 * V * 4)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim > 1 and out.shape[-1] == V:
                largest[-1] = max(largest[-1], out.numel())
            return out

    chunks = linear_cross_entropy._Problem.chunks

    def watched(problem):
        for chunk, logits in chunks(problem):
            largest[-1] = max(largest[-1], logits.numel())
            yield chunk, logits

    monkeypatch.setattr(linear_cross_entropy._Problem, "chunks", watched)
    plain = make("llama")
    patched = copy.deepcopy(plain)
    mk.patch(patched)
    for model in (patched, plain):
        largest.append(0)
        with Watch():
            model(**batch("left")).loss.backward()
    assert largest == [7 * V, 3 * T * V]


# --- dropout of attention ---


def test_dropout_of_attention():
    model = make("gpt2", attn_pdrop=0.3)
    mk.patch(model)
    inputs = batch("right")

    def loss(seed):
        torch.manual_seed(seed)
        return model(**inputs).loss

    assert loss(1) == loss(1) and loss(1) != loss(2)
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0))
    layer = model.transformer.h[0].attn
    torch.manual_seed(0)
    draws = torch.stack([hook.attend(layer, q, k, v, None, dropout=0.3)[0] for _ in range(1000)])
    error = draws.mean(0) - hook.attend(layer, q, k, v, None)[0]
    assert draws.std(0).max() > 0.1, "nothing was dropped"
    assert error.abs().max() < 6 * draws.std(0).max() / 1000**0.5, "the mean over draws is the value without dropout"


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """Layers computed again give the same numbers, dropout included."""
    model = make("gpt2", attn_pdrop=0.3, resid_pdrop=0.1)
    mk.patch(model)
    inputs, found = batch("left"), []
    for _ in range(2):
        torch.manual_seed(5)
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-7)


# --- what asks for logits gets them ---


def test_tuples_and_kept_logits_have_them():
    model = make("llama")
    mk.patch(model)
    inputs = batch("plain")
    loss, logits = model(**inputs, return_dict=False)[:2]
    assert logits.shape == (3, T, V) and loss.ndim == 0
    assert model(inputs["input_ids"], logits_to_keep=2).logits.shape == (3, 2, V)
    patched = model(**inputs, output_hidden_states=True)
    assert len(patched.hidden_states) == 3 and patched.loss.item() == pytest.approx(loss.item(), abs=1e-5)


def test_a_loss_function_or_hook_of_the_users_own_is_kept():
    model = make("llama")
    mk.patch(model)
    inputs = batch("plain")
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert model(**inputs).logits is not None and seen == [(3, T, V)]
    handle.remove()
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7
    assert model(**inputs).loss.item() == 7


def test_the_number_of_items_divides_the_loss():
    model = make("llama")
    mk.patch(model)
    inputs = batch("right")
    counted = (inputs["labels"][:, 1:] != -100).sum()
    mean = model(**inputs).loss
    for items in (7, torch.tensor(7)):
        torch.testing.assert_close(model(**inputs, num_items_in_batch=items).loss, mean * counted / 7)
    moved = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(**inputs, shift_labels=moved).loss, mean)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family):
    plain = make(family)
    patched = copy.deepcopy(plain)
    mk.patch(patched)
    inputs = batch("left")
    reference = wide(plain)
    expected = reference_loss(reference, inputs)
    expected.backward()
    losses = []
    for model in (patched, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(model(**inputs).loss)
        losses[-1].backward()
    assert_close_to_ref(losses[0], expected, losses[1], name="loss", floor=2e-3)
    found = [gradients(model) for model in (patched, reference, plain)]
    for name in found[0]:
        assert_close_to_ref(*(each[name] for each in found), name=name, floor=8e-3)
