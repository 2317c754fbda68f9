// What megakern._cpu binds: our C++ kernels for CPUs, on raw addresses.
//
// Addresses are those of tensors that the caller keeps alive; sizes and strides count elements. Every function checks
// its arguments and throws std::invalid_argument (ValueError in Python); without the instructions that it needs
// (bindings.cpp has which), it throws std::runtime_error before it runs one.
// Results do not depend on `threads`, and are the same bits at each run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace megakern {

using Address = std::uintptr_t;  // 0: no tensor

constexpr int kInterface = 5;  // raised with native.py's when what is bound changes: an older module is not used

enum DType : int { kFloat32 = 0, kBFloat16 = 1 };
enum Master : int { kOwn = 0, kWhole = 1, kLowHalf = 2 };  // of a param: itself, fp32, its lower 16 bits
enum Activation : int { kNone = 0, kGelu = 1, kGeluTanh = 2, kReluSquared = 3, kSilu = 4 };

// Names of the instruction sets that this processor has and that a kernel uses: "avx512", "avx512_bf16", "amx_bf16".
std::vector<std::string> features();
enum Feature : int { kAvx512 = 0, kAvx512BFloat16 = 1, kTilesOfBFloat16 = 2 };
// Throws unless this process may use it. The first call, of this or features(), asks Linux for the tiles of AMX.
void require_feature(const char* op, Feature needed);
// For tests: from now on as on a processor that has but the first `count` of them.
void limit_features(int count);

// y = act(z + bias) + residual, z, residual, y (M, N) contiguous. pre = z + bias; pre and y may be z. bias (N,) fp32.
void linear_epilogue(Address z, Address bias, Address residual, Address pre, Address y, int dtype, int activation,
                     int64_t M, int64_t N, int threads);

// out (N,) fp32 = sums over the rows of x (M, N), whose rows are `stride` apart.
void column_sum(Address x, Address out, int dtype, int64_t M, int64_t N, int64_t stride, int threads);

// Products of bf16 matrices with fp32 sums, for processors with "amx_bf16".
struct LinearProblem {
  int64_t M, N, K;
  int64_t x_stride;   // from one row of x (M, K) to the next
  int weight_dtype;   // fp32 is rounded to bf16
  bool transposed;    // weight is (K, N), and not (N, K)
  int activation;
  bool derivative;  // y = act'(pre) (x weight^T): pre is read, and there is no bias and no residual
  int threads;
};
struct WeightGradientProblem {
  int64_t M, N, K;
  int64_t dy_stride, x_stride;
  int dtype;  // of out
  bool add;
  int threads;
};
// y (M, N) = act(x weight^T + bias) + residual, pre = x weight^T + bias if not 0; weight (N, K), K at most 4096. x,
// residual, pre, y bf16; bias (N,) fp32. Transposed: x weight, with weight (K, N).
void linear(const LinearProblem&, Address x, Address weight, Address bias, Address residual, Address pre, Address y);
// out (N, K) = dy^T x, or += with `add`; sums (N,) fp32 = the sums over the rows of dy, if not 0.
void weight_gradient(const WeightGradientProblem&, Address dy, Address x, Address out, Address sums);

// The same for up to 8 rows, in fp32 or bf16, without tiles; no row depends on the others. weight (N, K), residual, pre,
// y contiguous; x, residual, pre, y of `dtype`, weight and bias of that or fp32 (the weight is rounded to `dtype`).
struct LinearRowsProblem {
  int64_t M, N, K;
  int64_t x_stride;  // from one row of x (M, K) to the next
  int dtype, weight_dtype, bias_dtype;
  int activation;
  int threads;
};
void linear_rows(const LinearRowsProblem&, Address x, Address weight, Address bias, Address residual, Address pre,
                 Address y);

// dx = dy act'(x), all contiguous with `elements` elements; dx may be dy or x.
void activation_backward(Address dy, Address x, Address dx, int dtype, int activation, int64_t elements, int threads);

// For each row of logits (M, V), rows `stride` apart: its maximum, the sum of exp(x - maximum), x[column] - maximum, and
// (unless 0) the sum of x - maximum; each (M,) fp32. column (M,) int64 in [0, V).
void cross_entropy_sums(Address logits, Address column, Address peak, Address exponentials, Address target,
                        Address shifted, int dtype, int64_t M, int64_t V, int64_t stride, int threads);

// out = factor exp(logits - lse) - uniform (none if 0), plus at_target at `column`; lse to at_target (M,) fp32. out may
// be logits.
void cross_entropy_gradient(Address logits, Address column, Address lse, Address factor, Address uniform,
                            Address at_target, Address out, int dtype, int64_t M, int64_t V, int64_t stride,
                            int64_t out_stride, int threads);

// y (M, C) = (h - mean) rstd weight + bias with h = x + residual; centre 0: RMSNorm, without mean. x, residual, h, y
// contiguous, h written if there is a residual; weight, bias (C,) fp32, mean, rstd (M,) fp32.
void norm_forward(Address x, Address residual, Address weight, Address bias, Address h, Address y, Address mean,
                  Address rstd, int dtype, int64_t M, int64_t C, float eps, bool centre, int threads);

// dx = gradient of the norm (+ dh); dweight, dbias (C,) fp32. dbias may be 0.
void norm_backward(Address dy, Address dh, Address h, Address weight, Address mean, Address rstd, Address dx,
                   Address dweight, Address dbias, int dtype, int64_t M, int64_t C, bool centre, int threads);

// One step of AdamW for params that share dtypes; params and moments are updated in place, grads become 0 if asked for.
struct AdamwProblem {
  int param_dtype, grad_dtype, moment_dtype;
  int master;
  float scale;  // of the gradients
  float decay, beta1, one_beta1, beta2, one_beta2, step_size, correction, eps;  // megakern/kernels/adamw.py
  bool zero_grads;
  int threads;
};
struct AdamwTensors {
  Address param, grad, exp_avg, exp_avg_sq, master;  // contiguous; master 0 where the param is its own
  int64_t elements;
};
void adamw(const AdamwProblem&, const std::vector<AdamwTensors>& tensors);

struct Elements {  // of a contiguous tensor
  Address data;
  int64_t count;
  int dtype;
};
double sum_of_squares(const std::vector<Elements>& tensors, int threads);

// out, lse of attention; product: how the matrix products are made. dq, dk, dv of attention, from out and lse.
struct AttentionProblem;
struct AttentionForward;
struct AttentionBackward;
void attention_forward(const AttentionProblem&, const AttentionForward&, int dtype, int product);
void attention_backward(const AttentionProblem&, const AttentionBackward&, int dtype, int product);

}  // namespace megakern
