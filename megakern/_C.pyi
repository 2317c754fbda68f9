"""CUDA kernels on raw addresses. Written by csrc/stubs.py from csrc/api.h, which says what each does."""

built: str
"""The compiler and architectures."""

def activation_forward(
    x: int,
    y: int,
    dtype: int,
    kind: int,
    M: int,
    C: int,
    x_stride: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def activation_backward(
    dy: int,
    x: int,
    dx: int,
    dtype: int,
    kind: int,
    M: int,
    C: int,
    dy_stride: int,
    x_stride: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def swiglu_forward(
    gate: int,
    up: int,
    y: int,
    dtype: int,
    M: int,
    C: int,
    gate_stride: int,
    up_stride: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def swiglu_backward(
    dy: int,
    gate: int,
    up: int,
    dgate: int,
    dup: int,
    dtype: int,
    M: int,
    C: int,
    dy_stride: int,
    gate_stride: int,
    up_stride: int,
    device: int,
    stream: int,
    /,
) -> None: ...
