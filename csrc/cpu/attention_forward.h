// Attention, forward: out and lse, without ever holding more than one tile of scores (flash attention).
//
// Writes with =. A thread takes a (sample, key-value head): its keys and values are packed once and serve all query
// heads of the group; then blocks of kQueries rows walk over the keys they see, with a running maximum and sum
// (arXiv 1805.02867). Threads share nothing, so results do not depend on their number.
#pragma once

#include "attention_tile.h"

namespace megakern {
namespace {

template <class Product>
struct ForwardTile {
  static constexpr int kGroup = Product::kGroup;
  alignas(64) float scores[kKeys * kQueries];
  alignas(64) Unit p[kKeys * kQueries / kGroup];  // by pair of keys (fp32: by key)
  alignas(64) float keep_old[kQueries];           // factor on what was summed before this tile
  Vec maximum[kQueryVectors], sum[kQueryVectors];

  void start() {
    for (int n = 0; n < kQueryVectors; ++n) maximum[n] = set1(kNoMaximum), sum[n] = _mm512_setzero_ps();
  }

  // Scores in units of log2, the ones that are not seen -inf; then probabilities, not yet divided by their sum.
  void softmax(const QueryBlock& block, int64_t first_key, int64_t keys, float scale) {
    const Vec factor = set1(scale * kLog2E);
    const bool all = block.sees_all(first_key, first_key + keys);
    const auto seen = [&](Vec s, int64_t j, int n) {
      return all ? s : _mm512_mask_blend_ps(block.sees(first_key + j, n), set1(-INFINITY), s);
    };
    Vec tops_of[kQueryVectors], sums[kQueryVectors];  // not members: those go through memory at each step
    for (int n = 0; n < kQueryVectors; ++n) {
      Vec tops[4] = {maximum[n], maximum[n], maximum[n], maximum[n]};  // a maximum waits 4 cycles for the one before
      for (int64_t j = 0; j < keys; j += 4)
        for (int i = 0; i < 4; ++i) {
          const Vec s = _mm512_mul_ps(_mm512_load_ps(scores + (j + i) * kQueries + n * kLanes), factor);
          tops[i] = _mm512_max_ps(tops[i], seen(s, j + i, n));
        }
      const Vec top = _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
      const Vec old = exp2<Product::kAccuracy>(_mm512_sub_ps(maximum[n], top));
      _mm512_store_ps(keep_old + n * kLanes, old);
      maximum[n] = tops_of[n] = top, sums[n] = _mm512_mul_ps(sum[n], old);
    }
    for (int64_t j = 0; j < keys; j += 2) {
      Vec rows[2][kQueryVectors];
      for (int i = 0; i < 2; ++i) {
        for (int n = 0; n < kQueryVectors; ++n) {
          const Vec s = _mm512_load_ps(scores + (j + i) * kQueries + n * kLanes);
          Vec value = exp2<Product::kAccuracy>(seen(_mm512_fmsub_ps(s, factor, tops_of[n]), j + i, n));
          sums[n] = _mm512_add_ps(sums[n], value);
          if (block.drops()) value = block.dropped(value, first_key + j + i, n);
          rows[i][n] = value;
        }
      }
      store_key_pair<Product>(rows, j, kGroup == 1 ? p : nullptr, kGroup == 1 ? nullptr : p);
    }
    for (int n = 0; n < kQueryVectors; ++n) sum[n] = sums[n];
  }

  // out (D, kQueries), transposed, times the factor of its query.
  void scale_columns(float* out, int64_t D) const {
    Vec factors[kQueryVectors];
    Mask others = 0;
    for (int n = 0; n < kQueryVectors; ++n) {
      factors[n] = _mm512_load_ps(keep_old + n * kLanes);
      others |= _mm512_cmp_ps_mask(factors[n], set1(1.0f), _CMP_NEQ_UQ);
    }
    if (others == 0) return;
    for (int64_t d = 0; d < D; ++d)
      for (int n = 0; n < kQueryVectors; ++n) {
        float* place = out + d * kQueries + n * kLanes;
        _mm512_store_ps(place, _mm512_mul_ps(_mm512_load_ps(place), factors[n]));
      }
  }

  // inverse[row] = 1 / sum, 0 where no key is seen; lse[row] for the first `count` rows.
  void finish(int64_t count, float* inverse, float* lse) const {
    alignas(64) float top[kQueries], total[kQueries];
    for (int n = 0; n < kQueryVectors; ++n) {
      _mm512_store_ps(top + n * kLanes, maximum[n]);
      _mm512_store_ps(total + n * kLanes, sum[n]);
    }
    for (int64_t i = 0; i < count; ++i) {
      inverse[i] = total[i] == 0.0f ? 0.0f : 1.0f / total[i];
      lse[i] = total[i] == 0.0f ? -INFINITY : top[i] * kLn2 + std::log(total[i]);
    }
  }
};

template <class Product, typename T>
class ForwardWorker {
 public:
  static constexpr int kGroup = Product::kGroup;

  ForwardWorker(const AttentionProblem& a, const AttentionForward& x)
      : a_(a), x_(x), D_(round_up(a.D, Product::kDepthStep)), S_(round_up(a.S, Product::kKeyStep)),
        rows_(S_ * D_ / kGroup), keys_(S_ * D_ / kGroup), values_(S_ * D_ / kGroup),
        query_rows_(kQueries * D_ / kGroup), queries_(kQueries * D_ / kGroup), out_(kQueries * D_) {}

  void run(int64_t sample, int64_t kv_head) {
    pack_rows<Product>(head_of<T>(x_.v, sample, kv_head), x_.v.by_row, a_.S, a_.S, S_, a_.D, rows_);
    if constexpr (Product::kTiles) {
      pack_columns<Product>(rows_, S_, D_, keys_);
      transpose(keys_, D_, S_ / kGroup, D_, values_, S_ / kGroup);
    } else {
      pack_columns<Product>(rows_, S_, D_, values_);
    }
    pack_rows<Product>(head_of<T>(x_.k, sample, kv_head), x_.k.by_row, a_.S, a_.S, S_, a_.D, keys_);
    const int64_t group = a_.H / a_.Hkv;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
      for (int64_t first = 0; first < a_.T; first += kQueries) rows(sample, head, first);
  }

 private:
  void rows(int64_t sample, int64_t head, int64_t first) {
    const QueryBlock block(a_, sample, head, first);
    const T* q = head_of<T>(x_.q, sample, head) + first * x_.q.by_row;
    pack_rows<Product>(q, x_.q.by_row, block.count, a_.T - block.first, kQueries, a_.D, query_rows_);
    transpose(query_rows_, D_ / kGroup, kQueries, D_ / kGroup, queries_, kQueries);
    tile_.start();
    std::fill_n(out_.floats(), kQueries * D_, 0.0f);
    const int64_t end = round_up(block.keys.high, Product::kKeyStep);
    for (int64_t j = block.keys.low / Product::kKeyStep * Product::kKeyStep; j < end; j += kKeys) {
      const int64_t keys = std::min<int64_t>(kKeys, end - j);
      const Left left{keys_ + j * (D_ / kGroup), D_ / kGroup, 1};
      product<Product, kSet>(left, queries_, kQueries, tile_.scores, kQueries, keys, kQueries, D_ / kGroup);
      tile_.softmax(block, j, keys, a_.scale);
      if constexpr (Product::kTiles) {  // out^T (D, kQueries) = v^T p^T
        tile_.scale_columns(out_.floats(), D_);
        product<Product, kAdd>(Left{values_ + j / kGroup, S_ / kGroup, 1}, tile_.p, kQueries, out_.floats(), kQueries,
                               D_, kQueries, keys / kGroup);
      } else {
        product<Product, kScaleAndAdd>(Left{tile_.p, 1, kQueries}, values_ + j / kGroup * D_, D_, out_.floats(), D_,
                                       kQueries, D_, keys / kGroup, tile_.keep_old);
      }
    }
    if constexpr (Product::kTiles) {
      transpose(out_, kQueries, D_, kQueries, rows_of_out_, D_);
    }
    float inverse[kQueries];
    tile_.finish(block.count, inverse, reinterpret_cast<float*>(x_.lse) + (sample * a_.H + head) * a_.T + first);
    T* out = reinterpret_cast<T*>(x_.out) + ((sample * a_.T + first) * a_.H + head) * a_.D;
    const float* rows = Product::kTiles ? rows_of_out_.floats() : out_.floats();
    store_rows(rows, D_, block.count, a_.D, inverse, 1.0f, out, a_.H * a_.D);
  }

  const AttentionProblem& a_;
  const AttentionForward& x_;
  const int64_t D_, S_;  // padded
  Scratch rows_, keys_, values_, query_rows_, queries_, out_, rows_of_out_{Product::kTiles ? kQueries * D_ : 1};
  ForwardTile<Product> tile_;
};

template <class Product, typename T>
void attention_forward(const AttentionProblem& a, const AttentionForward& x) {
#pragma omp parallel num_threads(a.threads)
  {
    [[maybe_unused]] const typename Product::Config config{};
    ForwardWorker<Product, T> worker(a, x);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.B * a.Hkv; ++i) worker.run(i / a.Hkv, i % a.Hkv);
  }
}

}  // namespace
}  // namespace megakern
