// AdamW over a list of tensors in one launch, in place: each element is read and written once; writes = . The math, and the
// two kinds of master: megakern/ops/adamw.py.
//
// A block does one piece of one tensor, four elements a thread at a time: 16 bytes of fp32, 8 of bf16. A tensor with an
// address off 16 bytes goes element by element. Every product and sum that could be fused is, by name: both kinds of master, and the CPU, get the same bits.
#include <cmath>

#include "device/tensors.cuh"
#include "device/vector.cuh"

namespace megakern {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 4 * kThreads;  // elements of a block at a time

enum Column { kParam, kGrad, kExpAvg, kExpAvgSq, kMaster, kCount, kColumns };

// --- kernels ---

MK_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
MK_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
MK_DEVICE uint32_t bits_of(bf16 x) {
  uint16_t bits;
  memcpy(&bits, &x, 2);
  return bits;
}
// To nearest, ties away from zero: what the low half undoes. A cast would take ties to even.
template <class T>
MK_DEVICE T rounded(float x) {
  if constexpr (std::is_same_v<T, bf16>) {
    const uint16_t high = uint16_t((bits_of(x) + 0x8000u) >> 16);
    bf16 out;
    memcpy(&out, &high, 2);
    return out;
  } else {
    return from_float<T>(x);
  }
}

// Numbers on their way from memory: of fp32, or in half the bytes. They stay as they came until all loads are under way.
template <int N>
struct Raw {
  uint32_t words[N];

  MK_DEVICE void read(const void* base, int64_t at, Dtype dtype) {
    if (dtype == Dtype::f32) take(static_cast<const float*>(base) + at);
    else take(static_cast<const uint16_t*>(base) + at);
  }

  MK_DEVICE Vector<float, N> floats(Dtype dtype) const {
    if (dtype == Dtype::f32) return as<float>();
    return dtype == Dtype::bf16 ? as<bf16>() : as<fp16>();
  }

 private:
  template <class T>
  MK_DEVICE void take(const T* address) {
    const Vector<T, N> v = load_once<N>(address);
    memcpy(words, v.values, sizeof(v.values));
  }
  template <class T>
  MK_DEVICE Vector<float, N> as() const {
    Vector<T, N> v;
    memcpy(v.values, words, sizeof(v.values));
    return to_float(v);
  }
};

template <int N>
MK_DEVICE void write(void* base, int64_t at, Dtype dtype, const Vector<float, N>& v) {
  if (dtype == Dtype::f32) store_once(static_cast<float*>(base) + at, v);
  else if (dtype == Dtype::bf16) store_once(static_cast<bf16*>(base) + at, from_float<bf16>(v));
  else store_once(static_cast<fp16*>(base) + at, from_float<fp16>(v));
}

// One step of elements at .. at + N of the tensor in `row`.
template <int N, class P, Master MASTER>
MK_DEVICE void update(const AdamW& p, const int64_t* row, int64_t at, float scale) {
  P* params = reinterpret_cast<P*>(row[kParam]) + at;
  void *grads = reinterpret_cast<void*>(row[kGrad]), *exp_avgs = reinterpret_cast<void*>(row[kExpAvg]),
       *exp_avg_sqs = reinterpret_cast<void*>(row[kExpAvgSq]), *masters = reinterpret_cast<void*>(row[kMaster]);
  Raw<N> raw_grad, raw_avg, raw_sq;
  raw_grad.read(grads, at, p.grad);
  raw_avg.read(exp_avgs, at, p.moment);
  raw_sq.read(exp_avg_sqs, at, p.moment);
  Vector<float, N> weight;
  if constexpr (MASTER == Master::none) {
    weight = to_float(load_once<N>(params));
  } else if constexpr (MASTER == Master::fp32) {
    weight = load_once<N>(static_cast<const float*>(masters) + at);
  } else {
    const auto high = load_once<N>(params);
    const auto low = load_once<N>(static_cast<const int16_t*>(masters) + at);
#pragma unroll
    for (int i = 0; i < N; ++i) weight[i] = float_of((bits_of(high[i]) << 16) + uint32_t(int32_t(low[i])));
  }
  const Vector<float, N> grad = raw_grad.floats(p.grad);
  Vector<float, N> avg = raw_avg.floats(p.moment), sq = raw_sq.floats(p.moment);
  Vector<P, N> narrow;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float g = grad[i] * scale;
    avg[i] = fmaf(p.beta1, avg[i], p.one_beta1 * g);
    sq[i] = fmaf(p.beta2, sq[i], p.one_beta2 * g * g);
    const float denominator = fmaf(sqrtf(sq[i]), p.correction, p.eps);
    weight[i] = fmaf(weight[i], p.decay, -(p.step_size * avg[i] / denominator));
    narrow[i] = rounded<P>(weight[i]);
  }
  write(exp_avgs, at, p.moment, avg);
  write(exp_avg_sqs, at, p.moment, sq);
  store_once(params, narrow);
  if constexpr (MASTER == Master::fp32) store_once(static_cast<float*>(masters) + at, weight);
  if constexpr (MASTER == Master::low) {
    Vector<int16_t, N> low;
#pragma unroll
    for (int i = 0; i < N; ++i) low[i] = int16_t(uint16_t(bits_of(weight[i])));
    store_once(static_cast<int16_t*>(masters) + at, low);
  }
  if (p.zero_grads) write(grads, at, p.grad, filled<float, N>(0.0f));
}

template <class P, Master MASTER, class List>
MK_KERNEL __launch_bounds__(kThreads) void adamw_kernel(const MK_GRID_CONSTANT AdamW p, const MK_GRID_CONSTANT List list,
                                                   int piece) {
  const int tensor = list.owner(int(blockIdx.x));
  const int64_t* row = list.rows[tensor];
  const int64_t start = int64_t(int(blockIdx.x) - list.first[tensor]) * piece, left = row[kCount] - start;
  const int64_t end = start + (left < piece ? left : piece);
  const float scale = p.grad_scale ? *p.grad_scale : 1.0f;
  const bool aligned = (row[kParam] | row[kGrad] | row[kExpAvg] | row[kExpAvgSq] | row[kMaster]) % 16 == 0;
  const int64_t whole = aligned ? start + (end - start) / 4 * 4 : start;
  for (int64_t at = start + 4 * int(threadIdx.x); at < whole; at += kTile) update<4, P, MASTER>(p, row, at, scale);
  for (int64_t at = whole + int(threadIdx.x); at < end; at += kThreads) update<1, P, MASTER>(p, row, at, scale);
}

// --- launchers ---

template <class P, Master MASTER>
void step(const Checks& check, const AdamW& p, Place place) {
  each_list<kColumns, kCount>(check, p.table, p.tensors, p.piece, [&](const auto& list, int pieces, int64_t) {
    using List = std::decay_t<decltype(list)>;
    MK_LAUNCH(adamw_kernel<P, MASTER, List>, dim3(pieces), dim3(kThreads), 0, place, p, list, int(p.piece));
  });
}

constexpr const char* kNames[] = {"param", "grad", "exp_avg", "exp_avg_sq", "master"};

void check_tensors(const Checks& check, const AdamW& p) {
  for (int64_t tensor = 0; tensor < p.tensors; ++tensor) {
    const int64_t* row = p.table + tensor * kColumns;
    check_address(check, "param", tensor, row[kParam], size_of(p.param));
    check_address(check, "grad", tensor, row[kGrad], size_of(p.grad));
    check_address(check, "exp_avg", tensor, row[kExpAvg], size_of(p.moment));
    check_address(check, "exp_avg_sq", tensor, row[kExpAvgSq], size_of(p.moment));
    if (p.master != Master::none) check_address(check, "master", tensor, row[kMaster], p.master == Master::fp32 ? 4 : 2);
    else check.require(row[kMaster] == 0, "the address of a master must be 0 where there is none");
    check.size("the number of elements of a tensor", row[kCount], 1);
    const int64_t sizes[] = {size_of(p.param), size_of(p.grad), size_of(p.moment), size_of(p.moment),
                             p.master == Master::none ? 0 : p.master == Master::fp32 ? 4 : 2};
    static_assert(kParam == 0 && kGrad == 1 && kExpAvg == 2 && kExpAvgSq == 3 && kMaster == 4);
    for (int i = 1; i < kMaster + (p.master != Master::none); ++i) {
      for (int j = 0; j < i; ++j) {
        check_apart(check, tensor, kNames[i], row[i], row[kCount] * sizes[i], kNames[j], row[j], row[kCount] * sizes[j]);
      }
    }
  }
}

}  // namespace

void adamw(const AdamW& p, Place place) {
  Checks check("adamw");
  check.floating(p.param, "param");
  check.floating(p.grad, "grad");
  check.require(p.moment == Dtype::f32 || p.moment == Dtype::bf16, "moment must be code 0 (fp32) or 1 (bf16), got " +
                                                                       std::to_string(int(p.moment)));
  check.known("master", p.master, Master::low);
  check.require((p.param == Dtype::f32) == (p.master == Master::none) &&
                    (p.param != Dtype::f16 || p.master == Master::fp32),
                "fp32 params have no master (code 0), fp16 params an fp32 one (1), bf16 params one of both kinds (1, 2), got " +
                    std::to_string(int(p.master)) + " for dtype code " + std::to_string(int(p.param)));
  check.size("tensors", p.tensors);
  check.size("piece", p.piece, kTile, int64_t(1) << 30);
  check.require(p.piece % kTile == 0, "piece must be a multiple of " + std::to_string(kTile));
  if (p.grad_scale) check.reads("grad_scale", p.grad_scale, Dtype::f32, 1);
  if (p.tensors == 0) return;
  check.require(p.table, "the address of table is null");
  check_tensors(check, p);
  if (p.param == Dtype::f32) step<float, Master::none>(check, p, place);
  else if (p.param == Dtype::f16) step<fp16, Master::fp32>(check, p, place);
  else if (p.master == Master::fp32) step<bf16, Master::fp32>(check, p, place);
  else step<bf16, Master::low>(check, p, place);
}

}  // namespace megakern
