// Attention: checks of the arguments, and the choice of the kernel by dtype of its matrix products.
#include "attention.h"

#include "checks.h"

namespace megakern {
namespace {

constexpr int64_t kLargestHead = 512;
constexpr Feature kFeatures[] = {kAvx512, kAvx512BFloat16, kTilesOfBFloat16};  // by product

void check_problem(const char* op, const AttentionProblem& a, int dtype, int product) {
  require_dtype(op, dtype);
  require(product >= kInFloat32 && product <= kInTilesOfBFloat16,
          std::string(op) + ": product code must be 0 to 2, got " + std::to_string(product));
  require(product == kInFloat32 || dtype == kBFloat16, std::string(op) + ": products in bf16 need bf16 tensors");
  const std::pair<const char*, int64_t> sizes[] = {{"B", a.B}, {"T", a.T},     {"S", a.S},
                                                   {"H", a.H}, {"Hkv", a.Hkv}, {"D", a.D}};
  for (const auto& [name, size] : sizes) require_positive(op, name, size);
  require_positive(op, "threads", a.threads);
  require(a.H % a.Hkv == 0, std::string(op) + ": Hkv = " + std::to_string(a.Hkv) + " must divide H = " +
                                std::to_string(a.H));
  require(a.D <= kLargestHead, std::string(op) + ": D must be at most " + std::to_string(kLargestHead) + ", got " +
                                   std::to_string(a.D));
  require(std::max(a.T, a.S) < (int64_t(1) << 30), std::string(op) + ": T and S must be below 2^30");
  require(a.dropout_p >= 0 && a.dropout_p < 1, std::string(op) + ": dropout_p must be in [0, 1)");
  require_addressable(op, a.B * std::max(a.T, a.S), a.H * a.D);
}

void check_input(const char* op, const char* name, const AttentionTensor& x, int dtype, int64_t B, int64_t rows,
                 int64_t heads) {
  require_address(op, name, x.data, element_size(dtype));
  require(x.by_sample >= 0 && x.by_row >= 0 && x.by_head >= 0,
          std::string(op) + ": strides of " + name + " must not be negative");
  require_addressable(op, B, std::max<int64_t>(1, x.by_sample));
  require_addressable(op, rows, std::max<int64_t>(1, x.by_row));
  require_addressable(op, heads, std::max<int64_t>(1, x.by_head));
}

// One that is written: no row lies within another.
void check_output(const char* op, const char* name, const AttentionTensor& x, int dtype, int64_t B, int64_t rows,
                  int64_t heads, int64_t D) {
  check_input(op, name, x, dtype, B, rows, heads);
  const auto apart = [&](int64_t count, int64_t stride) { return count == 1 || stride >= D; };
  require(apart(B, x.by_sample) && apart(rows, x.by_row) && apart(heads, x.by_head),
          std::string(op) + ": strides of " + name + " must be at least D = " + std::to_string(D));
}

}  // namespace

void attention_forward(const AttentionProblem& a, const AttentionForward& x, int dtype, int product) {
  const char* op = "attention_forward";
  check_problem(op, a, dtype, product);
  require_feature(op, kFeatures[product]);
  check_input(op, "q", x.q, dtype, a.B, a.T, a.H);
  check_input(op, "k", x.k, dtype, a.B, a.S, a.Hkv);
  check_input(op, "v", x.v, dtype, a.B, a.S, a.Hkv);
  require_address(op, "out", x.out, element_size(dtype));
  require_address(op, "lse", x.lse, 4);
  require(x.out != x.q.data && x.out != x.k.data && x.out != x.v.data, "attention_forward: out must not be an input");
#if defined(__x86_64__)
  if (product == kInTilesOfBFloat16) return attention_forward_amx(a, x, dtype);
  if (product == kInBFloat16) return attention_forward_bf16(a, x, dtype);
  return attention_forward_fp32(a, x, dtype);
#else
  require(false, "attention_forward: compiled for x86-64 only");
#endif
}

void attention_backward(const AttentionProblem& a, const AttentionBackward& x, int dtype, int product) {
  const char* op = "attention_backward";
  check_problem(op, a, dtype, product);
  require_feature(op, kFeatures[product]);
  check_input(op, "dout", x.dout, dtype, a.B, a.T, a.H);
  check_input(op, "q", x.q, dtype, a.B, a.T, a.H);
  check_input(op, "k", x.k, dtype, a.B, a.S, a.Hkv);
  check_input(op, "v", x.v, dtype, a.B, a.S, a.Hkv);
  check_input(op, "out", x.out, dtype, a.B, a.T, a.H);
  require_address(op, "lse", x.lse, 4);
  check_output(op, "dq", x.dq, dtype, a.B, a.T, a.H, a.D);
  check_output(op, "dk", x.dk, dtype, a.B, a.S, a.Hkv, a.D);
  check_output(op, "dv", x.dv, dtype, a.B, a.S, a.Hkv, a.D);
#if defined(__x86_64__)
  if (product == kInTilesOfBFloat16) return attention_backward_amx(a, x, dtype);
  if (product == kInBFloat16) return attention_backward_bf16(a, x, dtype);
  return attention_backward_fp32(a, x, dtype);
#else
  require(false, "attention_backward: compiled for x86-64 only");
#endif
}

}  // namespace megakern
