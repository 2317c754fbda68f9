// The problem that the attention kernels solve, and the kernels by dtype of their matrix products.
#pragma once

#include <algorithm>
#include <cstdint>

#include "api.h"

namespace megakern {

struct AttentionTensor {  // (B, rows, heads, D); the last stride is 1; what is written does not overlap
  Address data;
  int64_t by_sample, by_row, by_head;
};

// megakern/ops/attention.py has the formulas. left, right: visible keys beside the own one, negative without a limit.
struct AttentionProblem {
  int64_t B, T, S, H, Hkv, D;
  int64_t left, right;
  float scale;
  double dropout_p;
  int32_t dropout_threshold;
  uint64_t seed;
  int64_t first_sample, first_head;
  int threads;
};

struct AttentionForward {
  AttentionTensor q, k, v;
  Address out, lse;  // out (B, T, H, D), lse (B, H, T) fp32, contiguous
};

struct AttentionBackward {
  AttentionTensor dout, q, k, v, out;
  Address lse;  // contiguous
  AttentionTensor dq, dk, dv;
};

// How the matrix products are made; bf16 ones need bf16 tensors.
enum Product : int { kInFloat32 = 0, kInBFloat16 = 1, kInTilesOfBFloat16 = 2 };

// dtype is that of the tensors; the products are made as the name says.
void attention_forward_fp32(const AttentionProblem&, const AttentionForward&, int dtype);
void attention_forward_bf16(const AttentionProblem&, const AttentionForward&, int dtype);
void attention_backward_fp32(const AttentionProblem&, const AttentionBackward&, int dtype);
void attention_backward_bf16(const AttentionProblem&, const AttentionBackward&, int dtype);
void attention_forward_amx(const AttentionProblem&, const AttentionForward&, int dtype);
void attention_backward_amx(const AttentionProblem&, const AttentionBackward&, int dtype);

}  // namespace megakern
