"""Where tensors lie in memory, for those who allocate them."""

from megakern.kernels.torch.native import use_huge_pages

__all__ = ["use_huge_pages"]
