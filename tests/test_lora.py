"""Runs that start from other runs, whole or by adapters: against a dense reference, under tp, resumed, merged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megakern.cli import main
from megakern.config import ConfigError, GPTConfig
from megakern.data.chat import ChatTemplate
from megakern.data.tokenizer import train_bpe
from megakern.inference import load_run
from megakern.layers.dropout import DropoutKey
from megakern.layers.lora import LowRank, add_adapters, merge_adapters
from megakern.model.gpt import GPT
from megakern.ops.dropout import keep_reference
from megakern.parallel.collectives import finish_gradients
from megakern.parallel.context import ParallelContext
from megakern.train import checkpoint
from megakern.train.config import LoraConfig, RunConfig, load_config
from megakern.train.run import new_run
from megakern.train.start import merge_run
from tests import runs
from tests.closeness import assert_close_to_ref

MODELS = {
    "gpt2": GPTConfig(layers=2, width=32, heads=4, vocab_size=257, sequence_length=16),
    "llama": GPTConfig(
        layers=2, width=32, heads=4, kv_heads=2, ffn_size=48, vocab_size=257, sequence_length=16, norm="rmsnorm",
        activation="swiglu", positions="rope", bias=False, tied_embeddings=False,
    ),
}  # fmt: skip
LORA = {"rank": 4, "alpha": 8.0, "targets": ("qkv", "proj", "fc")}


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(257, (2, 16), generator=draw), torch.randint(257, (2, 16), generator=draw)


def adapted(
    model: GPTConfig, parallel: ParallelContext | None = None, *, zero: bool = False, how: dict | None = None, **lora
) -> GPT:
    """With adapters whose B is not zero, the same under every layout: as if trained."""
    parallel = parallel or ParallelContext()
    made = GPT(model, parallel, seed=1, device="meta", **(how or {}))
    add_adapters(made, parallel, **{**LORA, **lora})
    made.materialize("cpu", seed=1)
    for path, layer in made.named_modules():
        if isinstance(layer, LowRank) and not zero:
            whole = torch.randn(layer.b.shape, generator=torch.Generator().manual_seed(len(path))) * 0.1
            b = layer.b.to_local() if isinstance(layer.b, DTensor) else layer.b
            if b.shape != whole.shape:
                whole = whole.chunk(parallel.tp_size)[parallel.tp_rank]
            b.data.copy_(whole)
    return made


def dense(model: GPT, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """logits, loss and the adapters' gradients of explicit weights W + (alpha / r) B A, by autograd in `dtype`."""
    plain = GPT(model.config, seed=1, dtype=dtype)
    leaves, weights = {}, {}
    for path, layer in model.named_modules():
        if isinstance(layer, LowRank):
            a, b = (tensor.detach().to(dtype).requires_grad_() for tensor in (layer.a, layer.b))
            leaves |= {f"{path}.a": a, f"{path}.b": b}
            name = path.rpartition(".")[0] + ".weight"
            weights[name] = plain.get_parameter(name).detach() + LORA["alpha"] / a.shape[0] * (b @ a)
    tokens, targets = batch()
    logits = torch.func.functional_call(plain, weights, (tokens,))
    loss = torch.func.functional_call(plain, weights, (tokens, targets))
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return logits.detach(), loss.detach(), dict(zip(leaves, gradients, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_adapters_are_the_dense_weights(name):
    """Logits, loss and gradients against W + (alpha / r) B A in float64; nothing else has a gradient."""
    model = adapted(MODELS[name])
    tokens, targets = batch()
    loss = model(tokens, targets)
    loss.backward()
    learning = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert {key for key, parameter in model.named_parameters() if parameter.grad is not None} == learning
    wide, same = dense(model, torch.float64), dense(model, torch.float32)
    assert set(wide[2]) == learning and len(learning) == 2 * 2 * (5 if name == "llama" else 4)
    assert_close_to_ref(model(tokens).detach(), wide[0], same[0], name="logits")
    assert_close_to_ref(loss.detach(), wide[1], same[1], name="loss")
    for key in learning:
        assert_close_to_ref(model.get_parameter(key).grad, wide[2][key], same[2][key], name=key)
    merge_adapters(model)
    assert all(not isinstance(module, LowRank) for module in model.modules())
    assert_close_to_ref(model(tokens).detach(), wide[0], same[0], name="merged logits")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_adapters_change_no_bit(name, dtype):
    plain = GPT(MODELS[name], seed=1, compute_dtype=dtype)
    model = adapted(MODELS[name], zero=True)
    model.compute_dtype = dtype
    assert model(*batch()).item() == plain(*batch()).item()


def test_targets_choose_the_layers():
    for targets, layers in ((("qkv",), {"qkv"}), (("proj", "fc"), {"proj", "gate", "up", "fc2"})):
        model = adapted(MODELS["llama"], targets=targets)
        found = {path.split(".")[-2] for path, module in model.named_modules() if isinstance(module, LowRank)}
        assert found == layers


def gradients_of(name: str, sequence_parallel: bool) -> tuple[float, float, dict[str, torch.Tensor]]:
    parallel = ParallelContext.create(tp=2, sequence_parallel=sequence_parallel)
    model = adapted(MODELS[name], parallel)
    loss = model(*batch())
    loss.backward()
    finish_gradients(model.parameters())
    found = {key: p.grad.full_tensor() for key, p in model.named_parameters() if p.grad is not None}
    merge_adapters(model)
    with torch.no_grad():
        merged = model(*batch())
    return loss.item(), merged.item(), found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_are_one(ranks, name, sequence_parallel):
    model = adapted(MODELS[name])
    wide, same = dense(model, torch.float64), dense(model, torch.float32)
    for loss, merged, gradients in ranks.run(gradients_of, 2, name, sequence_parallel):
        assert loss == pytest.approx(float(wide[1]), rel=1e-6)
        assert merged == pytest.approx(float(wide[1]), rel=1e-6)
        assert gradients.keys() == wide[2].keys()
        for key, gradient in gradients.items():
            assert_close_to_ref(gradient, wide[2][key], same[2][key], name=key, floor=4e-6)


# --- dropout ---

KEY = DropoutKey(seed=5, step=3, first_sample=2)


def test_what_adapters_read_is_dropped_by_masks_of_their_own():
    """Against x with the mask multiplied in, by each layer's own numbers; what W reads is whole."""
    p, T = 0.4, 16
    model = adapted(MODELS["llama"], dropout=p)
    block = model.blocks[1]
    x = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(3))
    inner = torch.randn(2, T, 48, generator=torch.Generator().manual_seed(4))
    for name, layer, read in (("qkv", block.attention.qkv, x), ("up", block.mlp.up, x), ("fc2", block.mlp.fc2, inner)):
        seed, K, width = KEY.seed_of(f"lora.{name}"), read.shape[-1], 8 if name == "fc2" else read.shape[-1]
        kept = [
            [keep_reference(p, seed, (row * (K // width) + column // width,), column % width) for column in range(K)]
            for row in range(2 * T, 4 * T)  # of the third and fourth sample
        ]
        mask = torch.tensor(kept, dtype=torch.float32).view(2, T, K) / (1 - p)
        adapter = layer.adapter
        wanted = read @ layer.weight.T + adapter.scale * (read * mask @ adapter.a.T) @ adapter.b.T
        torch.testing.assert_close(layer(read, dropout_key=KEY), wanted, rtol=1e-4, atol=1e-5)
        assert 0.5 < torch.tensor(kept).float().mean() < 0.7
        with pytest.raises(ValueError, match=r"dropout = 0.4 in training mode needs a dropout_key, got None"):
            layer(read)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_of_adapters_is_for_training_alone(name):
    plain, dropping = adapted(MODELS[name]), adapted(MODELS[name], dropout=0.5)
    tokens, targets = batch()
    losses = [dropping(tokens, targets, dropout_key=dataclasses.replace(KEY, step=step)).item() for step in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2] and losses[0] != plain(tokens, targets).item()
    assert torch.equal(dropping.eval()(tokens), plain.eval()(tokens))
    for how in ({"recompute": "full"}, {"recompute": "selective", "recompute_modules": ("attention", "mlp", "norm")}):
        again = adapted(MODELS[name], dropout=0.5, how=how)
        gradients = []
        for model in (dropping.train(), again):
            model.zero_grad()
            model(tokens, targets, dropout_key=KEY).backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True)), how


# --- runs ---


@pytest.fixture(scope="module")
def base(tiny_data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("base") / "run"
    runs.train(run, runs.config_of(tiny_data, MODELS["llama"], steps=3, save_every=0))
    return run


def tuned(data: Path, base: Path, *, master: str = "none", rank: int = 4, **train):
    config = runs.config_of(data, MODELS["llama"], init_from=str(checkpoint.newest(base / "ckpt")), **train)
    optimizer = dataclasses.replace(config.optimizer, master=master)
    return dataclasses.replace(config, lora=LoraConfig(rank=rank, alpha=8.0), optimizer=optimizer)


def test_a_run_of_adapters_from_start_to_merged(tiny_data, base, tmp_path):
    first = runs.open_trainer(tmp_path / "whole", tuned(tiny_data, base, rank=0, steps=6))
    first.train_step()
    trainer = runs.train(tmp_path / "run", tuned(tiny_data, base))
    losses = runs.losses(trainer.run)
    assert losses[0] == runs.losses(tmp_path / "whole")[0]  # the base's own, to the last bit
    assert losses[5] < losses[0]
    manifest = checkpoint.read_manifest(trainer.saved)
    learning = {f"model.{name}" for name, p in trainer.model.named_parameters() if p.requires_grad}
    moments = {name.replace("model.", f"optimizer.{key}.") for name in learning for key in ("exp_avg", "exp_avg_sq")}
    assert set(manifest.tensors) == learning | moments and all(".adapter." in name for name in learning)
    assert manifest.state["base"]["checkpoint"] == "step-00000003"
    frozen = load_run(base).model.state_dict()
    own = {name: value for name, value in trainer.model.state_dict().items() if ".adapter." not in name}
    assert own.keys() == frozen.keys() and all(torch.equal(own[name], frozen[name]) for name in own)

    tokens = batch()[0]
    logits = trainer.model.eval()(tokens).detach()
    loaded = load_run(trainer.run)
    torch.testing.assert_close(loaded.model(tokens), logits, rtol=1e-5, atol=2e-6)
    assert merge_run(trainer.run, tmp_path / "merged").endswith("step-00000006")
    merged = load_run(tmp_path / "merged")
    assert merged.config.lora.rank == 0 and merged.config.train.init_from == ""
    assert torch.equal(merged.model(tokens), loaded.model(tokens))
    with pytest.raises(checkpoint.CheckpointError, match=r"has weights alone .*: megakern train CONFIG"):
        runs.open_trainer(tmp_path / "merged", dataclasses.replace(merged.config, data=trainer.config.data))


@pytest.mark.parametrize("master", ["none", "split"])
def test_resume_of_adapters_is_exact(tiny_data, base, tmp_path, master):
    config = tuned(tiny_data, base, master=master, precision="fp32" if master == "none" else "bf16", micro_batch=2)
    runs.train(tmp_path / "whole", config)
    left_out = shutil.ignore_patterns("ckpt", "metrics.jsonl")
    shutil.copytree(tmp_path / "whole", tmp_path / "half", ignore=left_out)
    shutil.copytree(tmp_path / "whole/ckpt/step-00000003", tmp_path / "half/ckpt/step-00000003")
    runs.train(tmp_path / "half", config)
    last = "step-00000006"
    assert runs.digests(tmp_path / "half")[last] == runs.digests(tmp_path / "whole")[last]


def train_under(folder: Path, config: RunConfig, tp: int, sequence_parallel: bool) -> dict[int, float]:
    parallel = ParallelContext.create(tp=tp, sequence_parallel=sequence_parallel)
    run = folder / f"{tp}-{sequence_parallel}"
    runs.train(run, config, parallel)
    return runs.losses(run)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_train_the_same_under_every_layout(ranks, tiny_data, base, tmp_path, dropout):
    """Three steps: the masks reach the losses from the second on, and the gradient of A, for which B must not be zero,
    from the third."""
    config = tuned(tiny_data, base, save_every=0, steps=3)
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, dropout=dropout))
    wanted = runs.losses(runs.train(tmp_path / "alone", config).run)
    for layout in ((2, False), (2, True), (1, False)):
        found, _ = ranks.run(train_under, 2, tmp_path, config, *layout)
        assert found == pytest.approx(wanted, rel=2e-6), layout


@pytest.mark.parametrize("master", ["none", "fp32", "split"])
def test_whole_weights_start_where_the_other_run_ended(tiny_data, base, tmp_path, master):
    """Also masters: exactly the fp32 weights that were saved, not their rounding."""
    config = tuned(tiny_data, base, rank=0, master=master, precision="fp32" if master == "none" else "bf16")
    trainer = runs.open_trainer(tmp_path / "run", config)
    saved = load_run(base).model.state_dict()
    for name, parameter in trainer.model.named_parameters():
        state = trainer.optimizer.state[parameter]
        if master == "none":
            assert torch.equal(parameter, saved[name]), name
        elif master == "fp32":
            assert torch.equal(state["master"], saved[name]), name
        else:
            bits = (parameter.detach().view(torch.int16).to(torch.int32) << 16) + state["low"].to(torch.int32)
            assert torch.equal(bits.view(torch.float32), saved[name]), name


def test_the_model_is_the_base_s_own(tiny_data, base, tmp_path):
    """A configuration names no model; what it does name is a change of it. The newest checkpoint is fixed by name."""
    path = tmp_path / "tune.toml"
    path.write_text(f'[train]\ninit_from = "{base}"\nsteps = 2\nprecision = "fp32"\n[data]\npath = "{tiny_data}"\n')
    config = load_config(path, ["--model.dropout", "0.1", "--lora.rank", "2"])
    assert config.model == dataclasses.replace(MODELS["llama"], dropout=0.1)
    new = new_run(config, tmp_path / "run", 1)
    assert new.config.train.init_from == str((base / "ckpt/step-00000003").resolve())


def test_what_is_refused(tiny_data, base, tmp_path):
    config = tuned(tiny_data, base)
    lost = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="is neither a run nor a checkpoint of one; name a folder"):
        new_run(lost, tmp_path / "run", 1)
    with pytest.raises(ConfigError, match=r"lora.rank needs train.init_from"):
        dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=""))
    for how, wanted in (
        ({"rank": -1}, "lora.rank must be 0 or more, got -1"),
        ({"alpha": 0.0}, "lora.alpha must be above 0, got 0"),
        ({"dropout": 1.0}, r"lora.dropout must be in \[0, 1\), got 1.0"),
        ({"targets": ("q",)}, r"lora.targets must be some of qkv, proj, fc, got \['q'\]"),
    ):
        with pytest.raises(ConfigError, match=wanted):
            LoraConfig(**how)
    odd = dataclasses.replace(MODELS["llama"], ffn_size=24)
    dropping = dataclasses.replace(config, model=odd, lora=dataclasses.replace(config.lora, dropout=0.1))
    dropping = dataclasses.replace(dropping, parallel=dataclasses.replace(config.parallel, tp=2))
    with pytest.raises(ConfigError, match=r"fc2 reads 24 columns, which parallel\.tp = 2 does not split into .* 8;"):
        new_run(dropping, tmp_path / "run", 2)
    with pytest.raises(ConfigError, match="has no adapters to merge"):
        merge_run(base, tmp_path / "merged")
    adapters = runs.train(tmp_path / "adapters", tuned(tiny_data, base, steps=1)).run
    with pytest.raises(ConfigError, match="exists already, and is not overwritten"):
        merge_run(adapters, base)
    nested = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(adapters)))
    with pytest.raises(ConfigError, match="is a run of adapters; make a whole model of it first"):
        new_run(nested, tmp_path / "run", 1)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    moved = load_config(adapters / "config.toml")
    again = runs.train(other, runs.config_of(tiny_data, MODELS["llama"], steps=4))
    path = adapters / "config.toml"
    path.write_text(path.read_text().replace(moved.train.init_from, str(again.saved)))
    with pytest.raises(checkpoint.CheckpointError, match=r"belong to step-00000003 of .*, but .*step-00000004 has"):
        load_run(adapters)
    shutil.rmtree(other)
    with pytest.raises(checkpoint.CheckpointError, match=r"manifest.json is missing"):
        load_run(adapters)


def test_another_tokenizer_is_refused(tiny_data, base, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    train_bpe(["a b c"], 260).save(other / "tokenizer.json")
    config = tuned(tiny_data, base)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(other)))
    with pytest.raises(ConfigError, match=r"has another tokenizer \(.*\) than the data"):
        new_run(config, tmp_path / "run", 1)


def test_commands(tiny_data, base, tmp_path, capsys):
    """merge-lora makes a run that eval takes; what it lacks is named."""
    adapters = runs.train(tmp_path / "run", tuned(tiny_data, base, steps=1)).run
    assert main(["ckpt", "merge-lora", str(adapters)]) == 2
    assert "ckpt merge-lora: name what to make with --out" in capsys.readouterr().err
    assert main(["ckpt", "merge-lora", str(base), "--out", str(tmp_path / "merged")]) == 2
    assert "has no adapters to merge" in capsys.readouterr().err
    assert main(["ckpt", "merge-lora", str(adapters), "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    shown = []
    for run in (adapters, tmp_path / "merged"):
        assert main(["eval", str(run), "--data", str(tiny_data)]) == 0
        shown.append(capsys.readouterr().out.split("\n", 1)[1])
    assert shown[0] == shown[1] and "held-out loss" in shown[0]


@pytest.mark.slow
def test_verify_takes_a_run_of_adapters(tiny_data, base, tmp_path, capsys):
    adapters = runs.train(tmp_path / "run", tuned(tiny_data, base, steps=1)).run
    words = ["verify", str(adapters), "--steps", "2", "--layouts", "tp=2", "dp=2", "--precisions", "fp32"]
    assert main(words) == 0, capsys.readouterr().out


@pytest.mark.slow
def test_a_converted_model_learns_conversations(tmp_path, capsys):
    """A Llama of transformers: imported, tuned by adapters on conversations in its own template, merged, exported."""
    library = tokenizers.Tokenizer.from_str(json.dumps(train_bpe(["user assistant hello you"], 270).content()))
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    theirs = PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|im_end|>", chat_template=template)
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    config = LlamaConfig(vocab_size=len(theirs), max_position_embeddings=64, num_key_value_heads=2, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "hf")
    lines = tmp_path / "talk.jsonl"
    lines.write_text(
        "".join(json.dumps({"prompt": f"say {i % 7}", "response": str(i % 7) * 2}) + "\n" for i in range(50))
    )
    tune = tmp_path / "tune.toml"
    tune.write_text("[lora]\nrank = 4\n[train]\nsteps = 30\nbatch = 2\n[optimizer]\nlr = 1e-2\n")
    step = {name: str(tmp_path / name) for name in ("hf", "base", "data", "run", "merged", "back")}
    for words in (
        ["convert", step["hf"], "--out", step["base"]],
        ["prepare", "--chat", str(lines), "--tokenizer", f"{step['base']}/tokenizer.json", "--out", step["data"]],
        ["train", str(tune), "--out", step["run"], "--nproc", "1", "--data.path", step["data"], "--train.init_from",
         step["base"], "--train.precision", "fp32"],
        ["ckpt", "merge-lora", step["run"], "--out", step["merged"]],
        ["convert", step["merged"], "--out", step["back"]],
    ):  # fmt: skip
        assert main(words) == 0, (words, capsys.readouterr())
    losses = runs.losses(tmp_path / "run")
    assert losses[29] < losses[0] - 0.1
    tuned_run, talk = load_run(tmp_path / "run"), [{"role": "user", "content": "say 3"}]
    ids = theirs.apply_chat_template(talk, return_dict=False, add_generation_prompt=True)
    assert ids == ChatTemplate.load(tmp_path / "run").encode(talk, tuned_run.tokenizer, add_generation_prompt=True)
    assert tuned_run.stop_tokens == (0, library.token_to_id("<|im_end|>"))
    again, ids = LlamaForCausalLM.from_pretrained(tmp_path / "back").eval(), torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, tuned_run.model(ids), rtol=1e-4, atol=1e-5)
