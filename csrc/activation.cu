// Activations and SwiGLU, forward and backward; megakern/ops/activation.py has the formulas.
//
// Writes: every output whole (=), contiguous; it may be one of the inputs. Backward computes the activation again.
// Parallel: elementwise (device/elementwise.cuh), a thread owns 16 bytes of each tensor at a time; no shared memory.
// Limits: fp32, bf16, fp16, computed in fp32; any M and C, rows at any distance.
#include "device/elementwise.cuh"

namespace megakern {

// --- kernels ---

// 1 / (1 + exp(-x))
MK_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// act(x) and act'(x). NaN stays NaN.
struct Gelu {
  static MK_DEVICE float value(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); }
  static MK_DEVICE float slope(float x) {
    return 0.5f * (1.0f + erff(x * 0.70710678f)) + x * expf(-0.5f * x * x) * 0.39894228f;
  }
};

struct GeluTanh {
  // (1 + tanh(u)) / 2 = sigmoid(2 u), without the cancellation; u = sqrt(2 / pi) (x + 0.044715 x^3)
  static MK_DEVICE float share(float x) { return sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }
  static MK_DEVICE float value(float x) { return x * share(x); }
  static MK_DEVICE float slope(float x) {
    const float s = share(x);
    return s + x * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * x * x);
  }
};

struct ReluSquared {
  static MK_DEVICE float value(float x) { return x < 0.0f ? 0.0f : x * x; }
  static MK_DEVICE float slope(float x) { return x < 0.0f ? 0.0f : 2.0f * x; }
};

struct Silu {
  static MK_DEVICE float value(float x) { return x * sigmoid(x); }
  static MK_DEVICE float slope(float x) {
    const float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
  }
};

// f(Gelu{}) and so on: one branch a thread, instead of four kernels to compile.
template <class F>
MK_DEVICE void with_activation(Activation kind, F f) {
  switch (kind) {
    case Activation::gelu: return f(Gelu{});
    case Activation::gelu_tanh: return f(GeluTanh{});
    case Activation::relu_squared: return f(ReluSquared{});
    case Activation::silu: return f(Silu{});
  }
}

template <class T, int N>
MK_KERNEL void activation_forward_kernel(Elementwise<1, 1> p, Activation kind) {
  with_activation(kind, [&](auto act) {
    elementwise<T, N>(p, [=](const float* in, float* out) { out[0] = act.value(in[0]); });
  });
}

template <class T, int N>
MK_KERNEL void activation_backward_kernel(Elementwise<2, 1> p, Activation kind) {
  with_activation(kind, [&](auto act) {
    elementwise<T, N>(p, [=](const float* in, float* out) { out[0] = in[0] * act.slope(in[1]); });
  });
}

template <class T, int N>
MK_KERNEL void swiglu_forward_kernel(Elementwise<2, 1> p) {
  elementwise<T, N>(p, [](const float* in, float* out) { out[0] = Silu::value(in[0]) * in[1]; });
}

template <class T, int N>
MK_KERNEL void swiglu_backward_kernel(Elementwise<3, 2> p) {
  elementwise<T, N>(p, [](const float* in, float* out) {
    out[0] = in[0] * in[2] * Silu::slope(in[1]);
    out[1] = in[0] * Silu::value(in[1]);
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
