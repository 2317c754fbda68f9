// Activations and SwiGLU, forward and backward; megakern/ops/activation.py has the formulas.
//
// Writes: every output whole (=), contiguous; it may be one of the inputs. Backward computes the activation again.
// Parallel: elementwise (device/elementwise.cuh), a thread owns 16 bytes of each tensor at a time; no shared memory.
// Limits: fp32, bf16, fp16, computed in fp32; any M and C, rows at any distance.
#include "device/activation.cuh"
#include "device/elementwise.cuh"

namespace megakern {

// --- kernels ---

template <class T>
constexpr bool kExact = std::is_same_v<T, float>;

template <class T, int N>
MK_KERNEL void activation_forward_kernel(Elementwise<1, 1> p, Activation kind) {
  with_activation(kind, [&](auto k) {
    elementwise<T, N>(p, [](const float* in, float* out) { out[0] = activate<decltype(k)::value, kExact<T>>(in[0]); });
  });
}

template <class T, int N>
MK_KERNEL void activation_backward_kernel(Elementwise<2, 1> p, Activation kind) {
  with_activation(kind, [&](auto k) {
    elementwise<T, N>(p, [](const float* in, float* out) {
      out[0] = in[0] * slope<decltype(k)::value, kExact<T>>(in[1]);
    });
  });
}

template <class T, int N>
MK_KERNEL void swiglu_forward_kernel(Elementwise<2, 1> p) {
  elementwise<T, N>(p, [](const float* in, float* out) {
    out[0] = activate<Activation::silu, kExact<T>>(in[0]) * in[1];
  });
}

template <class T, int N>
MK_KERNEL void swiglu_backward_kernel(Elementwise<3, 2> p) {
  elementwise<T, N>(p, [](const float* in, float* out) {
    const float share = sigmoid<kExact<T>>(in[1]);
    out[0] = in[0] * in[2] * share * (1.0f + in[1] * (1.0f - share));
    out[1] = in[0] * in[1] * share;
  });
}

// --- launchers ---

// launch(T{}, n, grid): T the C++ type of `dtype`, n a constant, the elements of a piece.
template <int INPUTS, int OUTPUTS, class Launch>
void with_pieces(const Checks& check, const Elementwise<INPUTS, OUTPUTS>& p, Dtype dtype, Launch launch) {
  if (p.M == 0 || p.C == 0) return;
  const bool fit = vectors_fit(p, dtype);
  with_dtype(dtype, [&](auto zero) {
    using T = decltype(zero);
    if (fit) {
      launch(zero, std::integral_constant<int, kVector<T>>(), elementwise_grid(check, p.M, p.C, kVector<T>));
    } else {
      launch(zero, std::integral_constant<int, 1>(), elementwise_grid(check, p.M, p.C, 1));
    }
  });
}

void activation_forward(const ActivationForward& p, Place place) {
  Checks check("activation_forward");
  check.floating(p.dtype);
  check.known("kind", p.kind, Activation::silu);
  check.size("M", p.M), check.size("C", p.C);
  check.reads("x", p.x, p.dtype, p.M, p.C, p.x_stride);
  check.writes("y", p.y, p.dtype, p.M, p.C, p.C, Alias::whole);
  const Elementwise<1, 1> problem = {{p.x}, {p.x_stride}, {p.y}, p.M, p.C};
  with_pieces(check, problem, p.dtype, [&](auto zero, auto n, ElementwiseGrid g) {
    MK_LAUNCH((activation_forward_kernel<decltype(zero), n>), g.grid, g.block, 0, place, problem, p.kind);
  });
}

void activation_backward(const ActivationBackward& p, Place place) {
  Checks check("activation_backward");
  check.floating(p.dtype);
  check.known("kind", p.kind, Activation::silu);
  check.size("M", p.M), check.size("C", p.C);
  check.reads("dy", p.dy, p.dtype, p.M, p.C, p.dy_stride);
  check.reads("x", p.x, p.dtype, p.M, p.C, p.x_stride);
  check.writes("dx", p.dx, p.dtype, p.M, p.C, p.C, Alias::whole);
  const Elementwise<2, 1> problem = {{p.dy, p.x}, {p.dy_stride, p.x_stride}, {p.dx}, p.M, p.C};
  with_pieces(check, problem, p.dtype, [&](auto zero, auto n, ElementwiseGrid g) {
    MK_LAUNCH((activation_backward_kernel<decltype(zero), n>), g.grid, g.block, 0, place, problem, p.kind);
  });
}

void swiglu_forward(const SwigluForward& p, Place place) {
  Checks check("swiglu_forward");
  check.floating(p.dtype);
  check.size("M", p.M), check.size("C", p.C);
  check.reads("gate", p.gate, p.dtype, p.M, p.C, p.gate_stride);
  check.reads("up", p.up, p.dtype, p.M, p.C, p.up_stride);
  check.writes("y", p.y, p.dtype, p.M, p.C, p.C, Alias::whole);
  const Elementwise<2, 1> problem = {{p.gate, p.up}, {p.gate_stride, p.up_stride}, {p.y}, p.M, p.C};
  with_pieces(check, problem, p.dtype, [&](auto zero, auto n, ElementwiseGrid g) {
    MK_LAUNCH((swiglu_forward_kernel<decltype(zero), n>), g.grid, g.block, 0, place, problem);
  });
}

void swiglu_backward(const SwigluBackward& p, Place place) {
  Checks check("swiglu_backward");
  check.floating(p.dtype);
  check.size("M", p.M), check.size("C", p.C);
  check.reads("dy", p.dy, p.dtype, p.M, p.C, p.dy_stride);
  check.reads("gate", p.gate, p.dtype, p.M, p.C, p.gate_stride);
  check.reads("up", p.up, p.dtype, p.M, p.C, p.up_stride);
  check.writes("dgate", p.dgate, p.dtype, p.M, p.C, p.C, Alias::whole);
  check.writes("dup", p.dup, p.dtype, p.M, p.C, p.C, Alias::whole);
  const Elementwise<3, 2> problem = {
      {p.dy, p.gate, p.up}, {p.dy_stride, p.gate_stride, p.up_stride}, {p.dgate, p.dup}, p.M, p.C};
  with_pieces(check, problem, p.dtype, [&](auto zero, auto n, ElementwiseGrid g) {
    MK_LAUNCH((swiglu_backward_kernel<decltype(zero), n>), g.grid, g.block, 0, place, problem);
  });
}

}  // namespace megakern
