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

// --- pointers.cu: for debugging ---

// From now on every launch asks the driver whether each of its tensors is memory of the launch's device, or managed.
void check_pointers(bool on);
void launching_on(int device);  // before each call, in the calling thread

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

// --- linear.cu: the matrix products of a linear layer, with what follows them; sm_90a ---

// Which products, by how the operands lie in memory.
enum class Layout : int {
  nt = 0,     // a (M, K), b (N, K): y = x W^T
  nn = 1,     // a (M, K), b (K, N): dx = dy W
  tn = 2,     // a (K, M), b (K, N): dW = dy^T x
  gated = 3,  // a (M, K), b and b_up (N, K): silu(x Wgate^T) * (x Wup^T)
};

// Of A (M, K) and B (K, N) with sums in fp32:
//   nt      out = act(A B + bias) + residual; pre = A B + bias, rounded, is what act sees
//   gated   out = silu(A B + bias) * (A B_up + bias_up); pre and pre_up are the two, rounded, as silu sees them
//   nn      out = A B + residual; with an activation A B act'(saved); with saved_up the gradients of
//           silu(saved) * saved_up: out that of saved, out_up that of saved_up
//   tn      out = A B; accumulate: out += A B, rounded once; out may be fp32. sums (splits, 4, M), fp32: of A's rows
//           over K, in so many parts; with splits zeros before
// What the line of a layout does not name is null. Of bf16 or fp16, the biases of that or fp32. All rows start on
// multiples of 16 bytes; those of pre, pre_up and out_up lie densely.
struct LinearProduct {
  const void *a, *b, *b_up, *bias, *bias_up, *residual, *saved, *saved_up;
  void *out, *out_up, *pre, *pre_up;
  float* sums;
  Dtype dtype, out_dtype, bias_dtype;
  Layout layout;
  int activation;  // an Activation, or -1
  bool accumulate;
  int64_t M, N, K, a_stride, b_stride, b_up_stride, residual_stride, saved_stride, saved_up_stride, out_stride;
  int tile_rows, tile_cols, cluster;  // one of the tile shapes of linear.cu
  int band;                           // rows of out whose tiles are walked column by column
  int head_start;                     // steps of 64 along K by which the upper half of a cooperative tile is ahead
  int blocks;                         // multiprocessors to use
  // Tiles from number `whole` on are computed in `splits` parts along K, 1 to 32, and added in that order. Without splits
  // whole is the number of tiles (those of a cluster count as one). Scratch for t tiles in parts: parts (t, splits,
  // tile_rows, tile_cols); arrivals (t, 4), zeros. Null if there are none. Split are nt and tn, in tiles of 128 columns
  // without clusters.
  int splits;
  int64_t whole;
  float* parts;
  int* arrivals;
};
void linear_product(const LinearProduct&, Place);

// parts (P, N), fp32: their sum over P is that of the columns of x (M, N), in an order that depends on the shape alone.
struct ColumnSums {
  const void* x;
  float* parts;
  Dtype dtype;
  int64_t M, N, x_stride, P;
};
void column_sums(const ColumnSums&, Place);

// out (N,) = sum of parts (P, N), fp32, over P.
struct PartSums {
  const float* parts;
  void* out;
  Dtype out_dtype;
  int64_t N, P;
};
void part_sums(const PartSums&, Place);
// --- cross_entropy.cu: math and options in megakern/ops/cross_entropy.py ---

// What all its functions take: logits (M, C), targets (M,). C columns of this rank, of which the first `real` are no
// padding; column 0 is number `start` of the vocab_size real columns of all ranks.
struct CrossEntropy {
  const void* logits;
  const int64_t* targets;
  Dtype dtype;
  int64_t M, C, stride, start, real, vocab_size, ignore_index;
  float label_smoothing, z_loss;
};

// loss, lse (M,) of a vocabulary on one rank; both 0 where the target is ignore_index. `threads` of a block, one a row.
struct CrossEntropyRows {
  CrossEntropy rows;
  float *loss, *lse;
  int threads;
};
void cross_entropy_rows(const CrossEntropyRows&, Place);

// The same in parts, for more ranks: 1. peaks (M,) and sums (2 or, with label smoothing, 3, M) of this rank's columns;
// 2. with `highest`, the maximum of the ranks' peaks, sums are made comparable in place; 3. from the sum of the ranks' sums
// loss and lse.
struct CrossEntropyParts {
  CrossEntropy rows;
  float *peaks, *sums;
  int threads;
};
void cross_entropy_parts(const CrossEntropyParts&, Place);
struct CrossEntropyShift {
  CrossEntropy rows;
  const float *peaks, *highest;
  float* sums;
};
void cross_entropy_shift(const CrossEntropyShift&, Place);
struct CrossEntropyFinish {
  CrossEntropy rows;
  const float *highest, *sums;
  float *loss, *lse;
};
void cross_entropy_finish(const CrossEntropyFinish&, Place);

// out (M, C) = scale d(row loss)/d(logits); may be the logits. scale: null for 1, stride 0 for one number.
struct CrossEntropyGradient {
  CrossEntropy rows;
  const float *lse, *scale;
  int64_t scale_stride;
  void* out;
  int64_t out_stride;
};
void cross_entropy_gradient(const CrossEntropyGradient&, Place);

// loss and out at once, for a vocabulary on one rank. The plan, made by megakern/kernels/cuda/cross_entropy.py: threads of a
// block, chunks of 16 bytes of a row that each holds in registers (0 or 10) and keeps in shared memory, those of the next
// row that it fetches ahead, at most as many as it keeps, and blocks, which share the rows.
struct CrossEntropyLossAndGradient {
  CrossEntropy rows;
  const float* scale;
  int64_t scale_stride;
  float* loss;
  void* out;
  int64_t out_stride;
  int threads, held, kept, ahead, blocks;
};
void cross_entropy_loss_and_gradient(const CrossEntropyLossAndGradient&, Place);

// x (count,) = factor x, for one factor on the device; where that is 1, x is not read.
struct ScaleUnlessOne {
  void* x;
  Dtype dtype;
  int64_t count;
  const float* factor;
};
void scale_unless_one(const ScaleUnlessOne&, Place);

// --- adamw.cu: math and masters in megakern/ops/adamw.py ---

enum class Master : int { none = 0, fp32 = 1, low = 2 };

// One step of many tensors, in place. `table`, in the host's memory and read before the call returns: for each tensor the
// addresses of param, grad, exp_avg, exp_avg_sq and master (0 without), then its number of elements. All are contiguous.
// A block does `piece` elements of a tensor, a multiple of 1024.
// grad_scale: one number on the device that multiplies the gradients, or null. zero_grads: leave zeros in the gradients.
// decay = 1 - lr weight_decay; step_size = lr / (1 - beta1^t); correction = 1 / sqrt(1 - beta2^t).
struct AdamW {
  const int64_t* table;
  int64_t tensors, piece;
  Dtype param, grad, moment;
  Master master;
  const float* grad_scale;
  bool zero_grads;
  float decay, beta1, one_beta1, beta2, one_beta2, step_size, correction, eps;
};
void adamw(const AdamW&, Place);

// --- grad_norm.cu ---

// out = the sum of the squares of all elements. `table`, in the host's memory and read before the call returns: for each
// tensor its address, number of elements and Dtype. sums (count,): room for the pieces of `piece` elements that each tensor
// is cut into, the last one shorter.
struct SumOfSquares {
  const int64_t* table;
  int64_t tensors, piece, count;
  float *sums, *out;
};
void sum_of_squares(const SumOfSquares&, Place);

// --- norm.cu: LayerNorm (mean not null) and RMSNorm ---

// y = (h - mean) rstd weight + bias, h = x + residual (h is not written without a residual). All (M, C), y and h contiguous.
// A row is held by `threads` threads of each block of its cluster, `rows` rows a block; threads 0: in chunks, a row a block.
struct NormForward {
  const void *x, *residual, *weight, *bias;
  void *y, *h;
  float *mean, *rstd;
  Dtype dtype, weight_dtype;
  int64_t M, x_stride, residual_stride;
  int C;
  float eps;
  int threads, rows, cluster;
};
void norm_forward(const NormForward&, Place);

// dx = dh + the gradient of h; dweight, dbias (C,); dbias_parts null: no bias. dx contiguous. Scratch: parts x C sums each.
struct NormBackward {
  const void *dy, *dh, *h, *weight;
  const float *mean, *rstd;
  void *dx, *dweight, *dbias;
  float *dweight_parts, *dbias_parts;
  Dtype dtype, weight_dtype;
  int64_t M, dy_stride, dh_stride, h_stride;
  int C, threads, rows, cluster, parts, stages;
};
void norm_backward(const NormBackward&, Place);

// --- rope.cu: rotary position embedding ---

// q (B, T, H, D) and k (B, T, Hkv, D), each of three strides, elements of a head side by side, to contiguous outputs. cos, sin
// (Tmax, d), fp32. positions (B, T) of two strides, int32 or int64, or null for 0 .. T - 1. inverse: by minus the angle.
// in_place: q_out is q and k_out is k, of the same strides; an element of one is none of the other.
struct Rope {
  const void *q, *k;
  void *q_out, *k_out;
  const float *cos, *sin;
  const void* positions;
  Dtype dtype, position_dtype;
  int64_t B, T, Tmax;
  int H, Hkv, D, d;
  int64_t q_batch, q_token, q_head, k_batch, k_token, k_head, cos_stride, sin_stride, position_batch, position_token;
  bool interleaved, inverse, in_place;
};
void rope(const Rope&, Place);

// --- dropout.cu ---

// out = x keep / (1 - p) + residual, (M, C), out contiguous. keep: the mask of megakern/ops/dropout.py; row i is logical
// row offset + i / length * distance + i % length. threshold and scale are those of p. out may be x or residual.
struct Dropout {
  const void *x, *residual;
  void* out;
  Dtype dtype;
  int64_t M, C, x_stride, residual_stride, seed, offset, length, distance;
  int threshold;
  float scale;
};
void dropout(const Dropout&, Place);

// --- attention_forward.cu: math in megakern/ops/attention.py ---

struct AttentionSizes {
  int64_t B, T, S, H, Hkv, D;
};

// From a sample, a token, a head to the next.
struct AttentionStrides {
  int64_t sample, token, head;
};

// Beside scale, mask and softmax. slopes: of ALiBi, fp32 (H,) with stride 0, or a row for each sample; null: none. softcap 0:
// none. The rest is of dropout, as in megakern/ops/attention.py: kept 1 / (1 - p), threshold -2^31 where p is 0.
struct AttentionFeatures {
  const float* slopes;
  int64_t slope_stride;
  float softcap;
  int64_t seed, first_sample, first_head;
  int threshold;
  float kept;
};

// Blocks in clusters of two, which bring keys and values once for both: none; two query heads of one head of keys, where it
// has an even number; two tiles of queries, where their number is even and each query sees all keys, not packed.
enum class AttentionPairs : int { none = 0, heads = 1, tiles = 2 };

// q, out (B, T, H, D), k, v (B, S, Hkv, D), out contiguous, lse (B, H, T) fp32. A query sees at most `left` keys before and
// `right` after the one beside it; -1: no limit. Packed, with B 1: offsets (sequences + 1,) of the queries and the keys
// of each sequence; else null. tile: one of attention_forward.cu's. section: heads in flight at a time; blocks: at most so many.
struct AttentionForward {
  const void *q, *k, *v;
  const int32_t *q_offsets, *k_offsets;
  void* out;
  float* lse;
  Dtype dtype;
  AttentionSizes sizes;
  int64_t sequences;
  AttentionStrides q_strides, k_strides, v_strides;
  int64_t left, right, section, blocks;
  int tile_rows, tile_keys;
  AttentionPairs pairs;
  float scale;
  AttentionFeatures features;
};
void attention_forward(const AttentionForward&, Place);

// --- attention_backward.cu: math in megakern/ops/attention.py ---

// dq, dk, dv, contiguous, of q, k, v, dout, out (B, T, H, D) as above and lse (B, H, T). Packed sequences: B = 1, int32 offsets of
// `sequences` + 1 elements; null: none. tile_rows: the queries R of a tile, of those that attention_backward.cu has for D. Scratch,
// with `lines` = B H tiles, tiles: T / R rounded up, packed T / R rounded down + sequences: dq_sums (lines, R, 64, 128 or 256),
// statistics (lines, 2, R); with dropout row_keys (lines, R), else null; for the same bits at each run turns (lines,), else null.
// section: heads of keys in flight. from_registers: without turns, threads add dq to its sums, not by way of shared memory.
struct AttentionBackward {
  const void *q, *k, *v, *dout, *out;
  const float* lse;
  void *dq, *dk, *dv;
  float *dq_sums, *statistics;
  int64_t* row_keys;
  int* turns;
  int64_t lines;
  const int *q_offsets, *k_offsets;
  int64_t sequences;
  Dtype dtype;
  AttentionSizes sizes;
  AttentionStrides q_strides, k_strides, v_strides, dout_strides, out_strides;
  int64_t left, right, section;
  int tile_rows;
  bool from_registers;
  float scale;
  AttentionFeatures features;
};
void attention_backward(const AttentionBackward&, Place);

// --- attention_decode.cu: few queries, many keys; math in megakern/ops/attention.py and paged_attention.py ---

// q, out (B, T, H, D), out contiguous, lse (B, H, T) fp32. Keys: k, v (B, S, Hkv, D); or pages (pages, page_size, Hkv, D)
// with the page's stride in place of the sample's, table (B, table_columns) of their numbers and lengths (B,), S unused.
// splits: pieces of the keys; above 1 parts (splits, B, T, H, D) and part_lse (splits, B, H, T) are room for their results.
struct AttentionDecode {
  const void *q, *k, *v;
  const int32_t *table, *lengths;
  void* out;
  float *lse, *parts, *part_lse;
  Dtype dtype;
  AttentionSizes sizes;
  AttentionStrides q_strides, k_strides, v_strides;
  int64_t pages, page_size, table_columns, table_stride, left, right, splits;
  float scale;
  AttentionFeatures features;
};
void attention_decode(const AttentionDecode&, Place);

}  // namespace megakern
