// What a consumer of attention_backward.cu computes: products of its keys with a tile of queries, probabilities and their
// gradient in registers.
#pragma once

#include "attention_backward.cuh"

namespace megakern {

// What a consumer does with 64 keys (rows of all fragments) and 64 or 80 queries (columns).
template <class T, class Tile>
struct BackwardKeys {
  static constexpr int span = Tile::span;
  using Sums = float[span / 2];                 // 64 x span
  using Operand = std::uint32_t[span / 16][4];  // A of 64 x span, from registers

  // Own keys or values as an operand. Up to D 64 they stay in registers: from shared memory a product of 64 x 64 would
  // wait for its operands as long as it computes.
  struct Own {
    static constexpr bool held = Tile::slabs == 1;
    std::uint64_t rows;  // descriptor
    std::uint32_t a[held ? 4 : 1][4];

    // `from`: this consumer's 64 of them.
    MK_DEVICE void hold(const unsigned char* from, int warp, int lane) {
      rows = matrix_descriptor(from);
      if constexpr (held) {
        const int r = lane % 16;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          ldmatrix_x4(a[step], from + (16 * warp + r) * 128 + ((2 * step + lane / 16) ^ (r % 8)) * 16);
        }
      }
    }
  };

  // Of p, in steps of 16 queries: what is packed with the exponentials, and where the differences pause to pack more. With
  // 80 queries a whole p beside its scores and dp does not fit 240 registers (128 sums of dk and dv + 80 + 20): later steps
  // lie where their scores were. What ptxas made of others is in benchmarks/results/h200/tuning.md.
  static constexpr int early = Tile::turned ? 1 : span / 16, middle = Tile::turned ? 3 : span / 16;
  static constexpr int columns = 64 * Tile::own_slabs;  // of dk and dv
  float dk[columns / 2], dv[columns / 2];
  Own k, v;

  // The same. What follows from it stays in no register from one step of the loop to the next.
  static MK_DEVICE std::uint64_t fresh(std::uint64_t descriptor) {
    unsigned low = unsigned(descriptor);
    forget_uses(low);
    return (descriptor >> 32 << 32) | low;
  }

  // d = a b^T over D: s = k q^T, dp = v dout^T. b here and below: descriptors.
  static MK_DEVICE void multiply(Sums& d, Own& a, std::uint64_t b) {
    if constexpr (Own::held) wgmma_fence(d, a.a);
    else wgmma_fence(d);
    const std::uint64_t rows = fresh(a.rows);
#pragma unroll
    for (int step = 0; step < 4 * Tile::slabs; ++step) {
      const std::uint64_t of_b = descriptor_behind(b, step / 4 * Tile::q_slab + step % 4 * 32);
      if constexpr (Own::held) {
        wgmma_rs<T, span, false>(d, a.a[step], of_b, step > 0);
      } else {
        const std::uint64_t of_a = descriptor_behind(rows, step / 4 * Tile::kv_slab + step % 4 * 32);
        wgmma_ss<T, span, false, false>(d, of_a, of_b, step > 0);
      }
    }
    wgmma_commit();
  }

  // Of an operand, queries in 16s, From to End.
  template <int From, int End>
  static MK_DEVICE auto& steps(Operand& a) {
    return reinterpret_cast<std::uint32_t(&)[End - From][4]>(a[From]);
  }

  // d += a b: dv with p and dout, dk with ds and q; of queries in 16s, From to End.
  template <int From = 0, int End = span / 16>
  static MK_DEVICE void accumulate(float (&d)[columns / 2], const Operand& a, std::uint64_t b) {
#pragma unroll
    for (int step = From; step < End; ++step) {
      wgmma_rs<T, columns, true>(d, a[step], descriptor_behind(b, step * 2048), true);
    }
    wgmma_commit();
  }

  // dq = ds^T k, of `span` queries and 64 columns, over all keys; turned: k^T ds.
  static MK_DEVICE void weigh_queries(Sums& dq, std::uint64_t ds, std::uint64_t k) {
    k = fresh(k);
#pragma unroll
    for (int step = 0; step < Tile::keys / 16; ++step) {
      const std::uint64_t of_k = descriptor_behind(k, step * 2048);
      if constexpr (Tile::turned) {
        const std::uint64_t of_ds = descriptor_behind(ds, step / 4 * Tile::ds_slab + step % 4 * 32);
        wgmma_ss<T, span, true, false>(dq, of_k, of_ds, step > 0);
      } else {
        wgmma_ss<T, 64, true, true>(dq, descriptor_behind(ds, step * 2048), of_k, step > 0);
      }
    }
    wgmma_commit();
  }

  // May a query see a key that is so far behind its own?
  static MK_DEVICE bool sees(const AttentionMask& mask, int key, int away) {
    return away <= mask.right && away >= -mask.left && key < mask.S;
  }

  // s becomes p, and p, rounded, an operand. distance: of the thread's first key from the one beside its first query.
  template <bool Masked>
  static MK_DEVICE void probabilities(Sums& s, Operand& p, float scale, const float* lse, const AttentionMask& mask,
                                      int key, int distance) {
#pragma unroll
    for (int i = 0; i < span / 8; ++i) {
      const Vector<float, 2> log = load<2>(lse + 8 * i);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& value = s[4 * i + 2 * h + j];
          value = exp2_approx(fmaf(value, scale, -log[j]));
          if (Masked && !sees(mask, key + 8 * h, distance + 8 * h - 8 * i - j)) value = 0;
        }
      }
    }
    pack<0, early>(p, s);
  }

  // p of queries in 16s, From to End.
  template <int From, int End>
  static MK_DEVICE void pack(Operand& p, const Sums& s) {
#pragma unroll
    for (int k = From; k < End; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) p[k][i] = packed<T>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
    }
  }

  // The same with cap, ALiBi and dropout: s becomes p times the slope of the cap; p, the operand, is 0 where it is
  // dropped. -> a bit an element: not dropped.
  static MK_DEVICE std::uint32_t featured(Sums& s, Operand& p, const AttentionScoring& f, const float* lse,
                                          const std::uint64_t* row_keys, const AttentionMask& mask, int key, int distance,
                                          float slope) {
    std::uint32_t kept = ~0u;
#pragma unroll
    for (int i = 0; i < span / 8; ++i) {  // two queries, two keys
      float(&four)[4] = reinterpret_cast<float(&)[4]>(s[4 * i]);
      const Vector<float, 2> log = load<2>(lse + 8 * i);
      float fall[4] = {1.0f, 1.0f, 1.0f, 1.0f}, used[4];  // the slope of the cap; p for dv
      if (f.cap > 0) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float bent = bend(four[e] * f.scale);
          four[e] = bent * f.cap, fall[e] = 1.0f - bent * bent;
        }
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) four[e] *= f.scale;
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * i + e % 2, away = distance + 8 * (e / 2) - column;  // of the key from the query's own
        const float weight = exp2_approx(four[e] - slope * float(abs(away)) - log[e % 2]);
        used[e] = sees(mask, key + 8 * (e / 2), away) ? weight : 0.0f, four[e] = used[e] * fall[e];
      }
      if (row_keys != nullptr) {
        const Vector<std::uint64_t, 2> of_row = load<2>(row_keys + 8 * i);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (keep(of_row[e % 2], std::uint32_t(key + 8 * (e / 2)), f.threshold)) continue;
          kept &= ~(1u << (4 * i + e)), used[e] = 0;
        }
      }
      p[i / 2][i % 2 * 2] = packed<T>(used[0], used[1]), p[i / 2][i % 2 * 2 + 1] = packed<T>(used[2], used[3]);
    }
    return kept;
  }

  // ds = p (dp - delta), an operand.
  template <bool Featured, int From = 0, int End = span / 16>
  static MK_DEVICE void differences(Operand& ds, const Sums& s, const Sums& dp, std::uint32_t kept,
                                    const float* delta, float factor) {
#pragma unroll
    for (int i = 2 * From; i < 2 * End; ++i) {
      const Vector<float, 2> less = load<2>(delta + 8 * i);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float d[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int e = 4 * i + 2 * h + j;
          float value = dp[e];
          if (Featured) value = kept >> e & 1 ? value * factor : 0.0f;
          d[j] = s[e] * (value - less[j]);
        }
        ds[i / 2][i % 2 * 2 + h] = packed<T>(d[0], d[1]);
      }
    }
  }

  // An operand to rows of 128 bytes, a row for each of the warp's 16 keys; turned: for each query. `to`: of the consumer.
  static MK_DEVICE void share(const Operand& ds, unsigned char* to, int warp, int lane) {
#pragma unroll
    for (int j = 0; j < span / 16; ++j) {
      if constexpr (Tile::turned) write_rows(to, ds[j], j, warp, lane);
      else write_columns(to + warp * 16 * 128, ds[j], j, lane);
    }
  }
};

}  // namespace megakern
