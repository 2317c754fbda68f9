// Rotary position embedding of queries and keys; megakern/ops/rope.py has the formulas.
//
// Writes: q_out and k_out whole (=), contiguous; in place the rotated part of q and k (=). A thread owns one group of N
// pairs (16 bytes of each half) at the same place in several heads of one token: it reads their angles once, and all of a
// pair before it writes any of it. What is not rotated is copied, in groups of the same size, or stays. fp32, bf16, fp16,
// computed in fp32 and rounded once; a position outside the tables gives NaN. No shared memory.
#include <algorithm>

#include "device/checks.h"
#include "device/vector.cuh"

namespace megakern {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 2;  // heads of a thread whose loads are in flight together: two 16-byte loads each

// --- kernels ---

// The heads of q, then those of k, of one token.
template <class T>
struct Heads {
  const T *q, *k;
  T *q_out, *k_out;
  int H;
  int64_t q_head, k_head, q_out_head, k_out_head;

  MK_DEVICE const T* in(int head) const { return head < H ? q + head * q_head : k + (head - H) * k_head; }
  MK_DEVICE T* out(int head) const { return head < H ? q_out + head * q_out_head : k_out + (head - H) * k_out_head; }
};

// Element e of x followed by y.
template <int N>
MK_DEVICE float& of_both(Vector<float, N>& x, Vector<float, N>& y, int e) {
  return e < N ? x[e % N] : y[e % N];
}

// Block (threads along a head, heads, tokens). N: pairs of a group.
template <class T, int N>
MK_KERNEL void __launch_bounds__(kThreads) rope_kernel(Rope p) {
  const int64_t token = int64_t(blockIdx.x) * blockDim.z + threadIdx.z;
  if (token >= p.B * p.T) return;
  const int64_t b = token / p.T, t = token % p.T;
  int64_t row = t;
  if (p.positions) {
    const int64_t at = b * p.position_batch + t * p.position_token;
    row = p.position_dtype == Dtype::i64 ? static_cast<const int64_t*>(p.positions)[at]
                                         : static_cast<const int32_t*>(p.positions)[at];
  }
  const int64_t q_token = b * p.q_batch + t * p.q_token, k_token = b * p.k_batch + t * p.k_token;
  const Heads<T> heads = {static_cast<const T*>(p.q) + q_token,
                          static_cast<const T*>(p.k) + k_token,
                          static_cast<T*>(p.q_out) + (p.in_place ? q_token : token * p.H * p.D),
                          static_cast<T*>(p.k_out) + (p.in_place ? k_token : token * p.Hkv * p.D),
                          p.H, p.q_head, p.k_head, p.in_place ? p.q_head : p.D, p.in_place ? p.k_head : p.D};
  const int groups = ceil_div(p.d, N), rest = p.in_place ? 0 : p.D - 2 * p.d, all = p.H + p.Hkv;
  for (int group = threadIdx.x; group < groups; group += blockDim.x) {
    const int pair = group * N;
    Vector<float, N> c = filled<float, N>(NAN), s = c;
    if (row >= 0 && row < p.Tmax) {
      c = load<N>(p.cos + row * p.cos_stride + pair);
      s = load<N>(p.sin + row * p.sin_stride + pair);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = p.inverse ? -s[i] : s[i];
    // Two vectors hold the N pairs: one of firsts and one of seconds, or neighbours that take turns.
    const int one = p.interleaved ? 2 * pair : pair, other = p.interleaved ? 2 * pair + N : p.d + pair;
    for (int top = threadIdx.y; top < all; top += kHeads * blockDim.y) {
      Vector<T, N> a[kHeads], z[kHeads];
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const int head = top + h * blockDim.y;
        if (head < all) {
          a[h] = load_once<N>(heads.in(head) + one);
          z[h] = load_once<N>(heads.in(head) + other);
        }
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        const int head = top + h * blockDim.y;
        if (head >= all) break;
        Vector<float, N> x = to_float(a[h]), y = to_float(z[h]);
        const auto rotate = [&](float& first, float& second, int i) {
          const float turned = first * c[i] - second * s[i];
          second = second * c[i] + first * s[i];
          first = turned;
        };
#pragma unroll
        for (int i = 0; i < N; ++i) {
          if (!p.interleaved) rotate(x[i], y[i], i);
          else rotate(of_both(x, y, 2 * i), of_both(x, y, 2 * i + 1), i);
        }
        store(heads.out(head) + one, from_float<T>(x));
        store(heads.out(head) + other, from_float<T>(y));
      }
    }
  }
  for (int col = threadIdx.x * N; col < rest; col += blockDim.x * N) {
    for (int head = threadIdx.y; head < all; head += blockDim.y) {
      store(heads.out(head) + 2 * p.d + col, load<N>(heads.in(head) + 2 * p.d + col));
    }
  }
}

// --- launchers ---

void check_heads(Checks& check, const char* name, const void* x, Dtype dtype, int64_t B, int64_t T, int64_t heads, int64_t D,
                 int64_t batch, int64_t token, int64_t head) {
  if (B == 0 || T == 0 || heads == 0) return;
  check.size((std::string("a stride of ") + name).c_str(), std::min({batch, token, head}));
  check.reads(name, x, dtype, (B - 1) * batch + (T - 1) * token + (heads - 1) * head + D);
}

}  // namespace

void rope(const Rope& p, Place place) {
  Checks check("rope");
  check.floating(p.dtype);
  for (const auto& [name, size] : {std::pair("B", p.B), {"T", p.T}}) check.size(name, size);
  check.size("H", p.H), check.size("Hkv", p.Hkv), check.size("D", p.D, 1);
  check.size("d", p.d, 1, p.D / 2);
  check_heads(check, "q", p.q, p.dtype, p.B, p.T, p.H, p.D, p.q_batch, p.q_token, p.q_head);
  check_heads(check, "k", p.k, p.dtype, p.B, p.T, p.Hkv, p.D, p.k_batch, p.k_token, p.k_head);
  check.reads("cos", p.cos, Dtype::f32, p.Tmax, p.d, p.cos_stride);
  check.reads("sin", p.sin, Dtype::f32, p.Tmax, p.d, p.sin_stride);
  if (p.positions) {
    const bool known = p.position_dtype == Dtype::i32 || p.position_dtype == Dtype::i64;
    check.require(known, "positions must be dtype code 4 (int32) or 5 (int64)");
    check_heads(check, "positions", p.positions, p.position_dtype, p.B, p.T, 1, 1, p.position_batch, p.position_token, 0);
  }
  check.size("Tmax", p.Tmax, p.positions ? 0 : p.T);
  if (p.in_place) {  // heads of q and k may take turns in memory: that no element is both is for the caller to see
    check.require(p.q_out == p.q && p.k_out == p.k, "in place q_out must be q, and k_out k");
  } else {
    check.writes("q_out", p.q_out, p.dtype, p.B * p.T, p.H * p.D, p.H * p.D);
    check.writes("k_out", p.k_out, p.dtype, p.B * p.T, p.Hkv * p.D, p.Hkv * p.D);
  }
  const int64_t tokens = p.B * p.T, all = int64_t(p.H) + p.Hkv;
  if (tokens == 0 || all == 0) return;

  with_dtype(p.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t bytes = sizeof(T), odd = p.q_batch | p.q_token | p.q_head | p.k_batch | p.k_token | p.k_head | p.D | p.d;
    const bool fit = odd * bytes % 16 == 0 && p.d % kVector<T> == 0 && vectors_fit(p.q, 0) && vectors_fit(p.k, 0) &&
                     vectors_fit(p.q_out, 0) && vectors_fit(p.k_out, 0) && vectors_fit(p.cos, p.cos_stride * 4) &&
                     vectors_fit(p.sin, p.sin_stride * 4);
    const int groups = fit ? p.d / kVector<T> : p.d;
    const int x = std::min(groups, 32), y = int(std::min<int64_t>(ceil_div<int64_t>(all, kHeads), kThreads / x));
    const int z = std::min(64, kThreads / (x * y));
    const dim3 grid(check.blocks(ceil_div<int64_t>(tokens, z))), block(x, y, z);
    if (fit) MK_LAUNCH((rope_kernel<T, kVector<T>>), grid, block, 0, place, p);
    else MK_LAUNCH((rope_kernel<T, 1>), grid, block, 0, place, p);
  });
}

}  // namespace megakern
