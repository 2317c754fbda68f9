"""How many bytes of activations a training step keeps from forward to backward: formulas, checked against real tensors.

Letters: s tokens of a sequence, b sequences of a micro-batch, h width, a heads, f inner MLP size, t tp, e bytes of the
compute dtype. u = t under sequence parallelism, else 1: what the residual stream is divided by.

Korthikanti et al. (arXiv 2205.05198, equations 1 to 6) count a GPT-2 block of f = 4h in 16 bits as

    sbh (10 + 24/t + 5as/(ht))        and with sequence parallelism        (sbh/t) (34 + 5as/h)

Ours, term by term, for e = 2, a heads of size h/a and as many key-value heads:

                            theirs          ours
    inputs of two norms     4 sbh           4 sbh/u
    outputs of two norms    4 sbh           4 sbh/u         read by qkv and by fc1
    dropout of two branches 2 sbh           0               the mask is computed again from its key
    q, k, v                 6 sbh/t         6 sbh/t
    softmax, its dropout    5 as^2 b/t      4 as b/t        the op keeps the log-sum-exp (fp32) in place of the scores,
                                                            the mask and the dropped scores
    input of proj           2 sbh/t         2 sbh/t         also what the attention op keeps as its output
    fc1's output, fc2's     16 sbh/t        16 sbh/t        pre-activation and activation
    norm statistics         0               16 sb/u         mean and 1/deviation of each token, fp32, twice (RMSNorm: 8)

So with the mask's and the scores' terms added, and the log-sum-exp and the statistics (small: 8/h and 2a/h of an sbh)
taken away, ours are theirs. A gated MLP keeps gate, up and their product: 3 ef in place of 2 ef. With qk_norm the
unnormed qkv are kept beside the normed q and k. Weights are cast to the compute dtype where they are read, twice, and
are no activations.

    selective   "attention": qkv in place of q, k, v; no log-sum-exp.  "mlp": nothing of f.  "norm": no norm outputs
    full        the block's input alone, e sbh/u
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megakern.config import RECOMPUTE, RECOMPUTE_DEFAULT, RECOMPUTE_MODULES, GPTConfig, require


@dataclass(frozen=True)
class ActivationBytes:
    """Bytes on one rank, for one micro-batch in flight."""

    layer: dict[str, int]
    """What each layer keeps, by what it is."""
    outside: dict[str, int]
    """What embedding, final norm and loss keep."""
    layers: int
    again: int
    """What is there for a while beside it: a layer's recomputed activations, while backward is in that layer."""

    @property
    def per_layer(self) -> int:
        return sum(self.layer.values())

    @property
    def kept(self) -> int:
        """At the end of forward."""
        return self.layers * self.per_layer + sum(self.outside.values())

    @property
    def total(self) -> int:
        """At the largest: kept, and one layer computed again. Gradients of activations come on top for a moment."""
        return self.kept + self.again


def activation_bytes(
    config: GPTConfig,
    batch: int,
    *,
    tokens: int | None = None,
    tp: int = 1,
    sequence_parallel: bool = False,
    recompute: str = "none",
    recompute_modules: Iterable[str] = RECOMPUTE_DEFAULT,
    element: int = 2,
) -> ActivationBytes:
    """What a forward pass of `batch` sequences of `tokens` (None: the model's length) keeps on one of `tp` ranks.

    element: bytes of the compute dtype. The other arguments are those of `GPT` and `ParallelContext`.
    Raises ConfigError for a layout or a name that they would refuse.
    """
    tokens = config.sequence_length if tokens is None else tokens
    config.check_tensor_parallel(tp)
    require(recompute in RECOMPUTE, f"recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
    modules = frozenset(recompute_modules if recompute == "selective" else ())
    require(
        modules <= set(RECOMPUTE_MODULES),
        f"recompute_modules must be some of {', '.join(RECOMPUTE_MODULES)}, got {', '.join(sorted(modules))}",
    )
    require(
        not sequence_parallel or tokens % tp == 0,
        f"{tokens} tokens are not divisible by tp = {tp}, which sequence parallelism needs",
    )
    rows = batch * tokens
    own_rows = rows // tp if sequence_parallel else rows
    everything = _layer(config, rows, own_rows, tp, element, frozenset())
    stream = own_rows * config.width * element
    layer = {"layer input": stream} if recompute == "full" else _layer(config, rows, own_rows, tp, element, modules)
    again = max(0, sum(everything.values()) - sum(layer.values()))
    return ActivationBytes(layer, _outside(config, rows, own_rows, tp, element), config.layers, again)


def _layer(
    config: GPTConfig, rows: int, own_rows: int, tp: int, element: int, modules: frozenset[str]
) -> dict[str, int]:
    norms = 1 if config.parallel_residual else 2
    stream = own_rows * config.width * element
    head = config.size_of_head * rows * element // tp  # one whole-model head's share of a rank
    query, keys = config.heads * head, config.key_value_heads * head
    statistics = norms * own_rows * (8 if config.norm == "layernorm" else 4)
    kept = {"norm inputs": norms * stream, "norm statistics": statistics}
    if "norm" not in modules:
        kept["norm outputs"] = norms * stream
    kept["q, k, v"] = query + 2 * keys
    if config.qk_norm and "attention" not in modules:
        kept["q, k before their norm"] = query + keys
        kept["norm statistics"] += 4 * rows * (config.heads + config.key_value_heads) // tp
    if "attention" not in modules:
        kept["log-sum-exp"] = 4 * config.heads * rows // tp
    kept["attention output"] = query
    if "mlp" not in modules:
        kept["mlp inner"] = (3 if config.activation == "swiglu" else 2) * rows * config.size_of_ffn * element // tp
    return kept


def _outside(config: GPTConfig, rows: int, own_rows: int, tp: int, element: int) -> dict[str, int]:
    """The loss makes the gradients of its input and of the head in forward, and keeps those instead of logits."""
    kept = {"token ids": rows * 8}
    if tp > 1:
        kept["token rows and mask"] = rows * (8 + 1)
    kept["final norm"] = own_rows * (config.width * element + (8 if config.norm == "layernorm" else 4))
    kept["gradient of the loss's input"] = rows * config.width * element
    kept["gradient of the head"] = config.padded_vocab_size // tp * config.width * 4
    return kept
