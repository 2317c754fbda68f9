// What megakern._C (NVIDIA GPUs) and megakern._simt (the same sources on a CPU, for tests) bind: a plain struct and one
// function for each kernel launch. No CUDA header here, none of torch: bindings.cpp needs this file alone.
//
// A call from Python passes the struct's fields in their order, then device and stream: module.f(x, y, ..., 0, stream).
// Fields are pointers, enums, integers, floats and bools (arrays and structs of them count one by one). Sizes and strides
// count elements; a stride is the distance of rows, whose elements lie side by side. M rows, C columns. A null pointer is
// an absent optional tensor. The caller keeps all memory alive until the stream has done the work.
//
// Every function checks its arguments (device/checks.h) and throws std::invalid_argument (ValueError), launches on
// `stream` of `device`, and throws std::runtime_error if the launch fails. None allocates or synchronises.
#pragma once

#include <cstdint>

namespace megakern {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, i16 = 3, i32 = 4, i64 = 5 };

struct Place {
  int device;  // -1: the CPU, under simt
  void* stream;
};

// --- activation.cu: gelu, swiglu and their like ---

enum class Activation : int { gelu = 0, gelu_tanh = 1, relu_squared = 2, silu = 3 };

// y = act(x). x, y (M, C), y contiguous; y may be x.
struct ActivationForward {
  const void* x;
  void* y;
  Dtype dtype;
  Activation kind;
  int64_t M, C, x_stride;
};
void activation_forward(const ActivationForward&, Place);

// dx = dy act'(x). All (M, C), dx contiguous; dx may be dy or x.
struct ActivationBackward {
  const void *dy, *x;
  void* dx;
  Dtype dtype;
  Activation kind;
  int64_t M, C, dy_stride, x_stride;
};
void activation_backward(const ActivationBackward&, Place);

// y = silu(gate) up. All (M, C), y contiguous; y may be gate or up.
struct SwigluForward {
  const void *gate, *up;
  void* y;
  Dtype dtype;
  int64_t M, C, gate_stride, up_stride;
};
void swiglu_forward(const SwigluForward&, Place);

// dgate = dy up silu'(gate), dup = dy silu(gate). All (M, C), dgate and dup contiguous; each may be one of the inputs.
struct SwigluBackward {
  const void *dy, *gate, *up;
  void *dgate, *dup;
  Dtype dtype;
  int64_t M, C, dy_stride, gate_stride, up_stride;
};
void swiglu_backward(const SwigluBackward&, Place);

}  // namespace megakern
