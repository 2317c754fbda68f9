// What megakern._cpu binds: our C++ kernels for CPUs, on raw addresses.
//
// Addresses are those of tensors that the caller keeps alive; sizes and strides count elements. Every function checks
// its arguments and throws std::invalid_argument (ValueError in Python), and needs the features that features() names.
// Results do not depend on `threads`, and are the same bits at each run.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace megakern {

using Address = std::uintptr_t;  // 0: no tensor

enum DType : int { kFloat32 = 0, kBFloat16 = 1 };
enum Activation : int { kNone = 0, kGelu = 1, kGeluTanh = 2, kReluSquared = 3, kSilu = 4 };

// Names of the instruction sets that this processor has and that a kernel uses: "avx512", "avx512_bf16".
std::vector<std::string> features();

// y = act(z + bias) + residual, z, residual, y (M, N) contiguous. pre = z + bias; pre and y may be z. bias (N,) fp32.
void linear_epilogue(Address z, Address bias, Address residual, Address pre, Address y, int dtype, int activation,
                     int64_t M, int64_t N, int threads);

// out (N,) fp32 = sums over the rows of x (M, N), whose rows are `stride` apart.
void column_sum(Address x, Address out, int dtype, int64_t M, int64_t N, int64_t stride, int threads);

// dx = dy act'(x), all contiguous with `elements` elements; dx may be dy or x.
void activation_backward(Address dy, Address x, Address dx, int dtype, int activation, int64_t elements, int threads);

// out, lse of attention; product: the dtype of the matrix products. dq, dk, dv of attention, from out and lse.
struct AttentionProblem;
struct AttentionForward;
struct AttentionBackward;
void attention_forward(const AttentionProblem&, const AttentionForward&, int dtype, int product);
void attention_backward(const AttentionProblem&, const AttentionBackward&, int dtype, int product);

}  // namespace megakern
