"""What `mk.patch` swaps and leaves alone, what it says of that, and that `mk.unpatch` leaves no trace. No device."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

import megakern as mk
from megakern.ops.dispatch import UNAVAILABLE
from tests.hugging import FAMILIES, LAYERS, T, batch, gradients, make, transformers

# Modules of each part, of two layers: norms, activations, rotary tables and layers, attentions, heads.
COUNTS = {
    "llama": {"norm": 5, "activation": 2, "rope": 3, "attention": 2, "loss": 1},
    "qwen2": {"norm": 5, "activation": 2, "rope": 3, "attention": 2, "loss": 1},
    "qwen3": {"norm": 9, "activation": 2, "rope": 3, "attention": 2, "loss": 1},
    "mistral": {"norm": 5, "activation": 2, "rope": 3, "attention": 2, "loss": 1},
    "gpt2": {"norm": 5, "activation": 2, "attention": 2, "loss": 1},
}


def picture(model) -> list:
    """All that a patch could change: of each module its class and the objects it holds."""
    return [(type(m), {name: id(value) for name, value in m.__dict__.items()}) for m in model.modules()]


def counts(report) -> dict:
    found: dict[str, int] = {}
    for line in report.swapped:
        found[line.part] = found.get(line.part, 0) + line.count
    return found


def reasons(report, class_name: str) -> list[str]:
    return [line.what for line in report.kept if line.class_name == class_name]


@pytest.mark.parametrize("family", FAMILIES)
def test_patch_and_unpatch(family):
    model = make(family)
    other = type(model)(model.config)  # which shares the config
    before, beside, names = picture(model), picture(other), list(model.state_dict())
    config = model.config
    report = mk.patch(model)
    assert counts(report) == COUNTS[family]
    assert picture(other) == beside and config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "megakern" and list(model.state_dict()) == names
    patched = picture(model)
    assert mk.patch(model) == report and picture(model) == patched, "the same patch again changes nothing"
    assert str(model) == str(other), "names of classes stay"
    model.config.use_cache = False
    mk.unpatch(model)
    assert picture(model) == before and model.config is config
    assert config._attn_implementation == "sdpa" and config.use_cache is False, "what was set in between stays"


def test_each_part_alone_and_none():
    for part in ("norm", "activation", "rope", "attention", "loss"):
        model = make("llama")
        plain = copy.deepcopy(model)
        chosen = {name: name == part for name in COUNTS["llama"]}
        assert counts(mk.patch(model, **chosen)) == {part: COUNTS["llama"][part]}
        for kind in ("left", "packed"):
            inputs = batch(kind)
            losses = [m(**inputs).loss for m in (model, plain)]
            torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
            losses[0].backward(), losses[1].backward()
            torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="nothing to do; leave at least one of norm, activation"):
        mk.patch(make("llama"), **dict.fromkeys(COUNTS["llama"], False))


def test_copies_pickles_and_saved_files(tmp_path):
    model = make("qwen3").eval()
    mk.patch(model)
    inputs = {"input_ids": batch("plain")["input_ids"]}
    expected = model(**inputs).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config is not model.config and twin.config._attn_implementation == "megakern"
        assert torch.equal(twin(**inputs).logits, expected)
        mk.unpatch(twin)
        assert type(twin) is transformers.Qwen3ForCausalLM and twin.config._attn_implementation == "sdpa"
        assert twin.model.config is twin.config
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["Qwen3ForCausalLM"] and loaded.config._attn_implementation == "sdpa"
    assert "megakern" not in (tmp_path / "config.json").read_text()
    torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


# --- what is left alone ---


class TunedNorm(transformers.models.llama.modeling_llama.LlamaRMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class TunedAttention(transformers.models.llama.modeling_llama.LlamaAttention):
    pass


class TunedLlama(transformers.LlamaForCausalLM):
    pass


def test_subclasses_are_left_alone():
    model = make("llama")
    model.model.norm.__class__ = TunedNorm
    report = mk.patch(model)
    assert reasons(report, "TunedNorm") == ["a subclass of LlamaRMSNorm, whose forward may differ"]
    assert counts(report)["norm"] == 4 and type(model.model.norm) is TunedNorm

    model = make("llama")
    model.model.layers[0].self_attn.__class__ = TunedAttention
    report = mk.patch(model)
    assert not {"attention", "rope"} & counts(report).keys() and counts(report)["norm"] == 5
    assert reasons(report, "LlamaAttention") == ["TunedAttention among its layers is a subclass of LlamaAttention"] * 2
    assert model.config._attn_implementation == "sdpa"

    model = make("llama")
    model.__class__ = TunedLlama
    report = mk.patch(model)
    assert reasons(report, "TunedLlama") == ["a subclass of LlamaForCausalLM, whose forward may differ"]
    assert "loss" not in counts(report) and counts(report)["attention"] == LAYERS


def test_what_a_model_needs_more_is_left_alone():
    model = make("llama", hidden_act="gelu_pytorch_tanh")
    report = mk.patch(model)
    assert reasons(report, "LlamaMLP") == ["its activation is GELUTanh, not SiLU"]
    assert [line.what for line in report.swapped if line.class_name == "GELUTanh"] == ["gelu"]

    model = make("llama")
    model.lm_head = nn.Linear(48, 96)
    assert reasons(mk.patch(model), "LlamaForCausalLM") == ["its lm_head has a bias or hooks"]

    model = make("llama", attn_implementation="eager", output_attentions=True)
    report = mk.patch(model)
    wanted = "its config asks for attention probabilities, which are never formed"
    assert reasons(report, "LlamaAttention") == [wanted]
    assert model.eval()(**batch("plain")).attentions[0].shape[:2] == (3, 6)

    model = make("gpt2", add_cross_attention=True)
    report = mk.patch(model)
    assert reasons(report, "GPT2Attention") == ["cross-attention has masks of its own"] and "norm" in counts(report)

    model = make("llama")
    layer = model.model.layers[0].mlp
    layer.forward = layer.forward  # as accelerate's hooks and kernels from the hub do
    report = mk.patch(model)
    assert "its forward was replaced on this instance" in reasons(report, "LlamaMLP")[0]
    assert counts(report)["activation"] == 1


class Adapted(nn.Linear):
    """A layer with a low-rank update, as PEFT puts in a linear layer's place."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, bias=False)
        self.weight = base.weight.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def forward(self, **inputs):
        return self.base_model(**inputs)


def test_a_wrapped_model_with_adapters():
    model = make("llama").requires_grad_(False)
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.mlp.up_proj = Adapted(layer.self_attn.q_proj), Adapted(layer.mlp.up_proj)
    wrapped = Wrapper(model)
    plain = copy.deepcopy(wrapped)
    assert counts(mk.patch(wrapped)) == COUNTS["llama"]
    inputs = batch("left")
    for m in (wrapped, plain):
        m(**inputs).loss.backward()
    found, expected = gradients(wrapped), gradients(plain)
    assert sum(gradient is not None for gradient in found.values()) == 4 * LAYERS
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    mk.unpatch(wrapped)
    assert picture(wrapped)[1][0] is transformers.LlamaForCausalLM


def test_models_without_the_head():
    torch.manual_seed(0)
    whole = make("llama")
    report = mk.patch(whole.model)
    assert counts(report) == {name: count for name, count in COUNTS["llama"].items() if name != "loss"}
    classifier = transformers.LlamaForSequenceClassification(make("llama").config)
    plain = copy.deepcopy(classifier)
    report = mk.patch(classifier)
    wanted = "it is no causal language model, or a wrapper of one"
    assert reasons(report, "LlamaForSequenceClassification") == [wanted]
    inputs = {name: value for name, value in batch("right").items() if name != "labels"}
    torch.testing.assert_close(classifier(**inputs).logits, plain(**inputs).logits, rtol=1e-5, atol=1e-5)


# --- errors ---


def test_errors():
    with pytest.raises(TypeError, match=r"patch: model must be a torch.nn.Module that holds a Llama, .* got NoneType"):
        mk.patch(None)
    with pytest.raises(ValueError, match=r"patch: there is no Llama, .* and GPT-2 in this Linear"):
        mk.patch(nn.Linear(2, 2))
    bert = transformers.BertModel(transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    before = picture(bert)
    with pytest.raises(ValueError, match="in this BertModel; it is left as it was"):
        mk.patch(bert)
    assert picture(bert) == before
    model = make("llama")
    for nothing in (model, None):
        with pytest.raises(ValueError, match=r"unpatch: nothing in this \w+ is patched; mk.patch"):
            mk.unpatch(nothing)
    with pytest.raises(ValueError, match="patch: unknown backend 'cudnn'; the backends are"):
        mk.patch(model, backend="cudnn")
    if UNAVAILABLE["cuda"] is not None:
        with pytest.raises(ValueError, match="patch: backend 'cuda' was asked for, but "):
            mk.patch(model, backend="cuda")
    mk.patch(model, rope=False)
    inner = type(model)
    model.__class__ = type("FSDPLlama", (inner,), {})
    with pytest.raises(ValueError, match="unpatch: FSDPLlama was made of a patched class later on"):
        mk.unpatch(model)
    model.__class__ = inner
    with pytest.raises(ValueError, match=r"patched already, with norm, .* and backend=None; mk.unpatch"):
        mk.patch(model)
    compiled = torch.compile(make("llama"), backend="eager")
    with pytest.raises(ValueError, match=r"compiled already; call mk\.patch first, torch.compile after it"):
        mk.patch(compiled)


def test_what_attention_cannot_give_is_an_error():
    model = make("llama")
    mk.patch(model)
    with pytest.raises(ValueError, match=r"output_attentions was asked for, but .* never formed; mk\.unpatch"):
        model(**batch("plain"), output_attentions=True)
    attend = transformers.AttentionInterface()["megakern"]
    q = torch.zeros(1, 2, 3, 8)
    for name in ("s_aux", "position_bias", "cache"):
        with pytest.raises(ValueError, match=f"megakern: attention cannot take {name}"):
            attend(model.model.layers[0].self_attn, q, q, q, None, **{name: q})


def test_an_old_or_absent_transformers(monkeypatch):
    model = make("llama")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.3.0")  # not the object imported at first
    with pytest.raises(ImportError, match=r"transformers 5\.4 or newer is needed, this is 5\.3\.0"):
        mk.patch(model)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"patch: transformers is not installed; pip install 'megakern\[hf\]'"):
        mk.patch(model)


# --- backends and compilers ---


def test_the_backend_is_that_of_all_swapped_ops(monkeypatch):
    from megakern.ops import dispatch

    model, asked = make("gpt2"), set()
    mk.patch(model, backend="torch")
    resolve = dispatch.resolve

    def spy(problem, backend=None):
        asked.add((problem.op, backend))
        return resolve(problem, backend)

    for name in ("norm", "activation", "attention", "linear_cross_entropy"):
        monkeypatch.setattr(f"megakern.ops.{name}.resolve", spy)
    model(**batch("left")).loss.backward()
    assert asked == {(op, "torch") for op in ("layer_norm", "gelu", "attention", "linear_cross_entropy")}
    q = torch.zeros(1, 4, 6, 8)
    assert mk.explain(mk.attention, q, q, q).chosen == "torch"


def test_half_precision_on_a_cpu():
    for dtype in (torch.float16, torch.float64):
        model = make("llama").to(dtype)
        plain = copy.deepcopy(model)
        mk.patch(model)
        losses = [m(**batch("left")).loss.double() for m in (model, plain)]
        torch.testing.assert_close(*losses, rtol=2e-3, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_compiled_whole(family):
    model = make(family)
    mk.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    offsets = torch.tensor([0, 7, 8, T], dtype=torch.int32)
    packed = {**batch("packed", rows=1), "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    for inputs in (batch("plain"), packed, batch("left")) if family == "llama" else (batch("left"),):
        inputs["use_cache"] = False
        expected = model(**inputs).loss
        expected.backward()
        wanted = gradients(model)
        loss = compiled(**inputs).loss
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients(model), wanted, rtol=1e-5, atol=1e-6)
    hole = inputs["attention_mask"].clone()
    hole[1, 5] = 0
    with pytest.raises(RuntimeError, match="this attention_mask has a hole, which a compiled model cannot take"):
        compiled(**{**inputs, "attention_mask": hole})
