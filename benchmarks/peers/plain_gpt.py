"""A plain PyTorch GPT-2 trained the way nanoGPT trains by default on a CPU: the named peer of bench_train.

Pre-norm blocks, one fused QKV Linear, `scaled_dot_product_attention`, exact GELU, no bias options, tied head, fp32,
eager, `torch.optim.AdamW` over two weight-decay groups, gradient clipping at 1.0: what `karpathy/nanoGPT` does with its
default settings on a machine without a GPU. Written from that description, for timing and for equal-loss checks only.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in self.qkv(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class PlainGPT(nn.Module):
    """tokens (B, T) int64 and targets (B, T) int64 -> mean loss, fp32."""

    def __init__(self, *, layers: int, width: int, heads: int, vocab_size: int, sequence_length: int):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(sequence_length, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 / math.sqrt(2 * layers) if name.endswith(("proj.weight", "fc2.weight")) else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """The weights of a `megakern.GPT` of the same sizes; rows of its vocabulary's padding are left out."""
        self.tokens.weight.copy_(model.embedding.weight[: self.tokens.num_embeddings])
        self.positions.weight.copy_(model.positions.weight)
        for ours, theirs in zip(self.blocks, model.blocks, strict=True):
            heads, width = theirs.attention.heads, self.tokens.embedding_dim
            rows = theirs.attention.qkv.weight.view(heads, 3, width // heads, width)
            ours.attention.qkv.weight.copy_(rows.transpose(0, 1).reshape(3 * width, width))
            ours.attention.qkv.bias.zero_()
            for name in ("fc1", "fc2"):
                getattr(ours, name).load_state_dict(getattr(theirs.mlp, name).state_dict())
            ours.attention.proj.load_state_dict(theirs.attention.proj.state_dict())

    def make_optimizer(self, *, lr: float, weight_decay: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        decay = [p for p in self.parameters() if p.ndim >= 2]
        rest = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=lr, betas=betas)
