"""The `torch` backend: PyTorch composites for any device, tuned for CPU."""

from __future__ import annotations


def unavailable() -> str | None:
    return None


def supports(problem) -> str | None:
    return None
