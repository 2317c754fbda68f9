// Attention, backward: dq, dk, dv from dout, with probabilities computed again from q, k and lse.
//
// Writes with =. A thread takes a (sample, key-value head) with all query heads of its group, and sums dk and dv of that
// head in fp32 over its blocks of kQueries rows, in order: no atomics, and results that do not depend on the number of
// threads. Per tile five products: scores, dp, dv, dk, dq.
#pragma once

#include "attention_tile.h"

namespace megakern {
namespace {

template <class Product>
struct BackwardTile {
  static constexpr int kGroup = Product::kGroup;
  alignas(64) float scores[kKeys * kQueries];
  alignas(64) float dp[kKeys * kQueries];
  alignas(64) Unit p[kKeys * kQueries / kGroup];        // by key, after dropout
  alignas(64) Unit ds[kKeys * kQueries / kGroup];       // by key
  alignas(64) Unit ds_pairs[kKeys * kQueries / kGroup];  // by pair of keys; not used in fp32
  alignas(64) float lse[kQueries];                      // in units of log2; +inf where nothing is to be seen
  alignas(64) float delta[kQueries];                    // sum of dout out

  const Unit* left_of_dq() const { return kGroup == 1 ? ds : ds_pairs; }

  // p and ds = p (keep dp - delta) from scores and dp.
  void softmax(const QueryBlock& block, int64_t first_key, int64_t keys, float scale) {
    const Vec factor = set1(scale * kLog2E);
    const bool all = block.sees_all(first_key, first_key + keys);
    for (int64_t j = 0; j < keys; j += 2) {
      Vec p_rows[2][kQueryVectors], ds_rows[2][kQueryVectors];
      for (int i = 0; i < 2; ++i) {
        for (int n = 0; n < kQueryVectors; ++n) {
          const int64_t at = (j + i) * kQueries + n * kLanes;
          Vec s = _mm512_fmsub_ps(_mm512_load_ps(scores + at), factor, _mm512_load_ps(lse + n * kLanes));
          if (!all) s = _mm512_mask_blend_ps(block.sees(first_key + j + i, n), set1(-INFINITY), s);
          const Vec value = exp2<Product::kAccuracy>(s);
          Vec dvalue = _mm512_load_ps(dp + at), kept = value;
          if (block.drops()) {
            const Vec keep = block.dropped(set1(1.0f), first_key + j + i, n);
            dvalue = _mm512_mul_ps(dvalue, keep), kept = _mm512_mul_ps(value, keep);
          }
          p_rows[i][n] = kept;
          ds_rows[i][n] = _mm512_mul_ps(value, _mm512_sub_ps(dvalue, _mm512_load_ps(delta + n * kLanes)));
        }
      }
      store_key_pair<Product>(p_rows, j, p, nullptr);
      store_key_pair<Product>(ds_rows, j, ds, ds_pairs);
    }
  }
};

template <class Product, typename T>
class BackwardWorker {
 public:
  static constexpr int kGroup = Product::kGroup;

  BackwardWorker(const AttentionProblem& a, const AttentionBackward& x)
      : a_(a), x_(x), D_(round_up(a.D, Product::kDepthStep)), S_(round_up(a.S, Product::kKeyStep)),
        keys_(S_ * D_ / kGroup), key_columns_(S_ * D_ / kGroup), values_(S_ * D_ / kGroup),
        query_rows_(kQueries * D_ / kGroup),
        queries_(kQueries * D_ / kGroup), query_columns_(kQueries * D_ / kGroup), douts_(kQueries * D_ / kGroup),
        dout_columns_(kQueries * D_ / kGroup), dq_(kQueries * D_), dk_(S_ * D_), dv_(S_ * D_) {}

  void run(int64_t sample, int64_t kv_head) {
    pack_rows<Product>(head_of<T>(x_.k, sample, kv_head), x_.k.by_row, a_.S, a_.S, S_, a_.D, keys_);
    if constexpr (Product::kTiles) {  // k^T (D, S)
      pack_columns<Product>(keys_, S_, D_, values_);
      transpose(values_, D_, S_ / kGroup, D_, key_columns_, S_ / kGroup);
    } else {
      pack_columns<Product>(keys_, S_, D_, key_columns_);
    }
    pack_rows<Product>(head_of<T>(x_.v, sample, kv_head), x_.v.by_row, a_.S, a_.S, S_, a_.D, values_);
    std::fill_n(dk_.floats(), S_ * D_, 0.0f);
    std::fill_n(dv_.floats(), S_ * D_, 0.0f);
    const int64_t group = a_.H / a_.Hkv;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t first = 0; first < a_.T; first += kQueries) rows(sample, head, first);
    T *dk = head_of<T>(x_.dk, sample, kv_head), *dv = head_of<T>(x_.dv, sample, kv_head);
    store_rows(dk_.floats(), D_, a_.S, a_.D, nullptr, a_.scale, dk, x_.dk.by_row);
    store_rows(dv_.floats(), D_, a_.S, a_.D, nullptr, 1.0f, dv, x_.dv.by_row);
  }

 private:
  void rows(int64_t sample, int64_t head, int64_t first) {
    const QueryBlock block(a_, sample, head, first);
    pack_queries(block, sample, head);
    float* dq = dq_.floats();
    std::fill_n(dq, kQueries * D_, 0.0f);
    const int64_t width = D_ / kGroup, end = round_up(block.keys.high, Product::kKeyStep);
    for (int64_t j = block.keys.low / Product::kKeyStep * Product::kKeyStep; j < end; j += kKeys) {
      const int64_t keys = std::min<int64_t>(kKeys, end - j);
      const Left key_rows{keys_ + j * width, width, 1}, value_rows{values_ + j * width, width, 1};
      product<Product, kSet>(key_rows, queries_, kQueries, tile_.scores, kQueries, keys, kQueries, width);
      product<Product, kSet>(value_rows, douts_, kQueries, tile_.dp, kQueries, keys, kQueries, width);
      tile_.softmax(block, j, keys, a_.scale);
      const Left p{tile_.p, kQueries / kGroup, 1}, ds{tile_.ds, kQueries / kGroup, 1};
      product<Product, kAdd>(p, dout_columns_, D_, dv_.floats() + j * D_, D_, keys, D_, kQueries / kGroup);
      product<Product, kAdd>(ds, query_columns_, D_, dk_.floats() + j * D_, D_, keys, D_, kQueries / kGroup);
      if constexpr (Product::kTiles) {  // dq^T (D, kQueries) += k^T ds^T
        product<Product, kAdd>(Left{key_columns_ + j / kGroup, S_ / kGroup, 1}, tile_.ds_pairs, kQueries, dq, kQueries,
                               D_, kQueries, keys / kGroup);
      } else {
        product<Product, kAdd>(Left{tile_.left_of_dq(), 1, kQueries}, key_columns_ + j / kGroup * D_, D_, dq, D_,
                               kQueries, D_, keys / kGroup);
      }
    }
    if constexpr (Product::kTiles) {
      transpose(dq_, kQueries, D_, kQueries, rows_of_dq_, D_);
      dq = rows_of_dq_.floats();
    }
    T* out = head_of<T>(x_.dq, sample, head) + first * x_.dq.by_row;
    store_rows(dq, D_, block.count, a_.D, nullptr, a_.scale, out, x_.dq.by_row);
  }

  void pack_queries(const QueryBlock& block, int64_t sample, int64_t head) {
    const int64_t width = D_ / kGroup;
    const T* q = head_of<T>(x_.q, sample, head) + block.first * x_.q.by_row;
    pack_rows<Product>(q, x_.q.by_row, block.count, a_.T - block.first, kQueries, a_.D, query_rows_);
    transpose(query_rows_, width, kQueries, width, queries_, kQueries);
    pack_columns<Product>(query_rows_, kQueries, D_, query_columns_);
    const T* dout = head_of<T>(x_.dout, sample, head) + block.first * x_.dout.by_row;
    pack_rows<Product>(dout, x_.dout.by_row, block.count, a_.T - block.first, kQueries, a_.D, query_rows_);
    transpose(query_rows_, width, kQueries, width, douts_, kQueries);
    pack_columns<Product>(query_rows_, kQueries, D_, dout_columns_);
    const T* out = head_of<T>(x_.out, sample, head) + block.first * x_.out.by_row;
    const float* lse = reinterpret_cast<const float*>(x_.lse) + (sample * a_.H + head) * a_.T + block.first;
    for (int64_t i = 0; i < kQueries; ++i) {
      if (block.first + i + kAhead < a_.T) fetch_row(out + (i + kAhead) * x_.out.by_row, a_.D);
      const bool real = i < block.count && lse[i] != -INFINITY;
      tile_.lse[i] = real ? lse[i] * kLog2E : INFINITY;
      Vec sum = _mm512_setzero_ps();
      for (int64_t d = 0; real && d < a_.D; d += kLanes) {
        const Mask m = first_lanes(a_.D - d);
        sum = fma(load(dout + i * x_.dout.by_row + d, m), load(out + i * x_.out.by_row + d, m), sum);
      }
      tile_.delta[i] = _mm512_reduce_add_ps(sum);
    }
  }

  const AttentionProblem& a_;
  const AttentionBackward& x_;
  const int64_t D_, S_;  // padded
  Scratch keys_, key_columns_, values_, query_rows_, queries_, query_columns_, douts_, dout_columns_, dq_, dk_, dv_,
      rows_of_dq_{Product::kTiles ? kQueries * D_ : 1};
  BackwardTile<Product> tile_;
};

template <class Product, typename T>
void attention_backward(const AttentionProblem& a, const AttentionBackward& x) {
#pragma omp parallel num_threads(a.threads)
  {
    [[maybe_unused]] const typename Product::Config config{};
    BackwardWorker<Product, T> worker(a, x);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.B * a.Hkv; ++i) worker.run(i / a.Hkv, i % a.Hkv);
  }
}

}  // namespace
}  // namespace megakern
