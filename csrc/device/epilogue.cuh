// What follows the sums of a matrix product (product.cuh) on their way from registers to global memory. Layout (api.h)
// says which product it is:
//
//     nt      out = act(sums + bias) + beside[0]                                 second = sums + bias, as act sees them
//     gated   out = silu(sums + bias[0]) * (sums of the other + bias[1])         second, third = the two, as silu sees them
//     nn      out = sums + beside[0], or sums act'(beside[0]), or with both beside: of silu(beside[0]) * beside[1] the
//             gradients of beside[0], and of beside[1] in second
//     tn      out = sums + beside[0], which is out as it was where 16-bit values accumulate; fp32: out (+)= sums
#pragma once

#include "api.h"
#include "device/activation.cuh"
#include "device/fragment.cuh"
#include "device/ptx.cuh"
#include "device/vector.cuh"

namespace megakern {

// What an epilogue gets besides tensor maps. Strides in elements. Pointers are null where something is absent.
struct Follows {
  const void* bias[2];    // (N,) of T or float
  const void* beside[2];  // (M, N) of T
  std::int64_t beside_stride[2];
  int M, N;        // of out
  int activation;  // Activation, or -1
  bool bias_is_fp32;
  bool keep;        // write second, and third
  bool accumulate;  // into fp32 out, by TMA
};

// The sums of a fragment: v gets those from number `first` on. In registers, or, where they were made in parts along K, in
// memory: each of them of all lanes side by side, added in the order of the parts.
template <int Sums>
struct HeldSums {
  static constexpr bool held = true;
  const float (&d)[Sums];

  template <int N>
  MK_DEVICE void read(float (&v)[N], int first) const {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = d[first + i];
  }
};

template <int Stride>  // from part to part
struct StoredSums {
  static constexpr bool held = false;
  const float* sums;  // of part 0, this lane
  int parts;

  template <int N>
  MK_DEVICE void read(float (&v)[N], int first) const {
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = 0;
    const float* from = sums + 32 * first;
#pragma unroll 1
    for (int n = 0; n < parts; ++n, from += Stride) {
#pragma unroll
      for (int i = 0; i < N; ++i) v[i] += from[32 * i];
    }
  }
};

// What a warp does with its 16 rows of a fragment, chunk by chunk: the epilogue in registers, to shared memory, from there
// to global memory by TMA. No warp waits for another.
template <class T, class Out, Layout L, class Tile>
struct Epilogue {
  static constexpr bool gated = L == Layout::gated, forward = L == Layout::nt || gated, wide = sizeof(Out) == 4;
  static constexpr int width = 128 / int(sizeof(Out));  // columns of a chunk
  static constexpr int cols = gated ? Tile::cols / 2 : Tile::cols;  // of out
  static constexpr int count = ceil_div(cols, width);               // chunks of a fragment
  // Where a chunk begins: the last of 160 columns, or of 96, repeats half of the one before, bit by bit.
  MK_DEVICE static constexpr int at(int chunk) { return chunk * width < cols - width ? chunk * width : cols - width; }
  static constexpr int repeated = count * width - cols;
  static constexpr int most = gated ? 3 : L == Layout::tn ? 1 : 2;  // outputs
  static constexpr bool reads = !gated && !wide;
  static constexpr bool ahead = reads && Tile::fragments == 1;
  static_assert(repeated == 0 || (repeated == 32 && !ahead));
  // Beside 192 sums a thread has registers for 16 columns at a time: a chunk of each output is filled slice by slice. Sums
  // that have been read free none, as ptxas keeps all of a wgmma's until the next: later slices are no wider.
  static constexpr bool crowded = Tile::sums > 160 && !wide;
  static constexpr int slice = crowded ? 16 : width;
  static_assert(!crowded || Tile::chunks >= most);

  const Follows& p;
  const TensorMap *out_map, *second_map, *third_map;
  unsigned char* chunks;  // of this warp
  int warp, lane;         // of 4, of 32
  int turn = 0;
  std::uint32_t bias[forward && !crowded ? (1 + gated) * count : 1][2] = {};  // see load_bias
  std::uint32_t beside[16] = {};  // beside[0] of the next chunk: one word for each pair of neighbours

  // A thread adds the bias of 16 columns in 64, but loads two; the other lanes have the rest. Before the main loop, where
  // there are registers for that.
  MK_DEVICE void load_bias(int col) {
    if constexpr (forward && !crowded) {
#pragma unroll
      for (int i = 0; i < (1 + gated) * count; ++i) load_bias(bias[i], i / count, col + at(i % count));
    }
  }

  MK_DEVICE void load_bias(std::uint32_t (&to)[2], int which, int col) {
    if (p.bias[0] == nullptr) return;
    const int c = col + 2 * lane;
    to[0] = to[1] = 0;
    if (c < p.N) {
      const std::uint32_t* words = static_cast<const std::uint32_t*>(p.bias[which]);
      if (p.bias_is_fp32) to[0] = words[c], to[1] = words[c + 1];
      else to[0] = words[c / 2];
    }
  }

  // v: from column `first` of the 64 on.
  template <int N>
  MK_DEVICE void add_bias(float (&v)[N], const std::uint32_t (&words)[2], int first) {
    if (p.bias[0] == nullptr) return;
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      const int source = 4 * j + first / 2 + lane % 4;
      float b0, b1;
      if (p.bias_is_fp32) b0 = as_float(shuffle(words[0], source)), b1 = as_float(shuffle(words[1], source));
      else unpacked<T>(shuffle(words[0], source), b0, b1);
      v[4 * j] += b0, v[4 * j + 1] += b1, v[4 * j + 2] += b0, v[4 * j + 3] += b1;
    }
  }

  // The words of beside[which] that lie as 4 Words columns of the fragment do, from the first that is to be read.
  template <int Words>
  MK_DEVICE void load_beside(int which, std::uint32_t (&to)[Words], int row, int col, int first = 0) {
    if (p.beside[which] == nullptr) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 16 * warp + lane / 4 + 8 * h, c = col + lane % 4 * 2;
      const T* from = static_cast<const T*>(p.beside[which]) + r * p.beside_stride[which] + c;
#pragma unroll
      for (int j = first / 8; j < Words / 2; ++j) {
        to[2 * j + h] = 0;
        if (r < p.M && c + 8 * j < p.N) to[2 * j + h] = *reinterpret_cast<const std::uint32_t*>(from + 8 * j);
      }
    }
  }

  // Started one chunk ahead where there are registers for that: the words come from device memory.
  MK_DEVICE void load_ahead(int row, int col) {
    if constexpr (ahead) load_beside(0, beside, row, col);
  }

  // Until the next so many chunks are free: the stores that last used them have read them.
  template <int Chunks>
  MK_DEVICE void open() {
    if (elect_lane()) tma_wait_read<Tile::chunks - Chunks>();
    sync_warp();
  }

  MK_DEVICE unsigned char* chunk(int number = 0) const {
    return chunks + (turn + number) % Tile::chunks * Tile::chunk_bytes;
  }

  MK_DEVICE void finish(const TensorMap* map, unsigned char* chunk, int row, int col) {
    fence_async();
    sync_warp();
    row += 16 * warp;
    if (elect_lane()) {
      if (row < p.M && col < p.N) {
        if (wide && p.accumulate) tma_add_2d(map, chunk, col, row);
        else tma_store_2d(map, chunk, col, row);
      }
      tma_commit();
    }
    turn = (turn + 1) % Tile::chunks;
  }

  // 2 N columns, from number `first` of a chunk on, as 16-bit values. All 64 go out at once; a slice goes to that of the
  // open chunks which is the output's.
  template <int N>
  MK_DEVICE void write(const TensorMap* map, const float (&v)[N], int row, int col, int first, int output) {
    constexpr bool whole = N == width / 2;
    if constexpr (whole) open<1>();
    unsigned char* to = chunk(whole ? 0 : output);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      const float* w = v + 8 * j;
      write_columns(to, {packed<T>(w[0], w[1]), packed<T>(w[2], w[3]), packed<T>(w[4], w[5]), packed<T>(w[6], w[7])},
                    first / 16 + j, lane);
    }
    if constexpr (whole) finish(map, to, row, col);
  }

  // Rounded first: backward must see the value that the activation saw.
  template <int N>
  MK_DEVICE void write_kept(const TensorMap* map, float (&v)[N], int row, int col, int first, int output) {
    if (!p.keep) return;
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = to_float(from_float<T>(v[i]));
    write(map, v, row, col, first, output);
  }

  // v[i] = f(v[i], x), x the value of `words` beside it.
  template <int Words, class F>
  MK_DEVICE static void combine(float (&v)[2 * Words], const std::uint32_t (&words)[Words], F f) {
#pragma unroll
    for (int i = 0; i < Words; ++i) {
      float a, b;
      unpacked<T>(words[i], a, b);
      v[2 * i] = f(v[2 * i], a), v[2 * i + 1] = f(v[2 * i + 1], b);
    }
  }

  // Of the next slice: on their way while this one is written.
  template <int N>
  MK_DEVICE void load_next(std::uint32_t (&to)[N / 2], int row, int col, int first) {
    if (first + 2 * N < width) load_beside(0, to, row, col + first + 2 * N);
  }

  // Loaded: `added` is there already. Else it is loaded where it is used: earlier, tiles of 160 columns spill registers.
  template <bool Loaded, int N>
  MK_DEVICE void forward_chunk(float (&v)[N], std::uint32_t (&added)[N / 2], int row, int col, int first) {
    write_kept(second_map, v, row, col, first, 0);
    if (p.activation >= 0) activate_all(v, Activation(p.activation));
    if (p.beside[0] != nullptr) {
      if (!Loaded) load_beside(0, added, row, col + first);
      combine(v, added, [](float x, float a) { return x + a; });
      load_next<N>(added, row, col, first);
    }
    write(out_map, v, row, col, first, outputs() - 1);
  }

  template <int N>
  MK_DEVICE void gated_chunk(float (&v)[N], float (&up)[N], int row, int col, int first) {
    write_kept(second_map, v, row, col, first, 0);
    write_kept(third_map, up, row, col, first, 1);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = activate<Activation::silu>(v[i]) * up[i];
    write(out_map, v, row, col, first, outputs() - 1);
  }

  // Both gradients leave 16 columns at a time, side by side: there are no registers for 64 of each.
  template <int N>
  MK_DEVICE void swiglu_gradient(const float (&v)[N], std::uint32_t (&gates)[N / 2], int row, int col, int first) {
    std::uint32_t ups[N / 2];
    constexpr bool before = Tile::sums <= 128;  // the wait, where there are registers for that
    if (before) load_beside(1, ups, row, col + first);
    if constexpr (slice == width) open<2>();
    if (!before) load_beside(1, ups, row, col + first);
    unsigned char *dup_chunk = chunk(0), *dgate_chunk = chunk(1);
#pragma unroll
    for (int j = 0; j < N / 8; ++j) {
      std::uint32_t dup[4], dgate[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float gate[2], up[2], of_up[2], of_gate[2];
        unpacked<T>(gates[4 * j + i], gate[0], gate[1]), unpacked<T>(ups[4 * j + i], up[0], up[1]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float x = v[8 * j + 2 * i + e], share = sigmoid<false>(gate[e]);
          of_up[e] = x * gate[e] * share;
          of_gate[e] = x * up[e] * share * (1.0f + gate[e] * (1.0f - share));
        }
        dup[i] = packed<T>(of_up[0], of_up[1]), dgate[i] = packed<T>(of_gate[0], of_gate[1]);
      }
      write_columns(dup_chunk, dup, first / 16 + j, lane), write_columns(dgate_chunk, dgate, first / 16 + j, lane);
    }
    load_next<N>(gates, row, col, first);
    if constexpr (slice == width) finish(second_map, dup_chunk, row, col), finish(out_map, dgate_chunk, row, col);
  }

  template <int N>
  MK_DEVICE void gradient_chunk(float (&v)[N], std::uint32_t (&saved)[N / 2], int row, int col, int first) {
    if (p.activation >= 0) {
      with_activation(Activation(p.activation), [&](auto k) {
        combine(v, saved, [](float x, float pre) { return x * slope<decltype(k)::value>(pre); });
      });
    } else if (p.beside[1] != nullptr) {
      swiglu_gradient(v, saved, row, col, first);
      return;
    } else if (p.beside[0] != nullptr) {
      combine(v, saved, [](float x, float a) { return x + a; });
    }
    load_next<N>(saved, row, col, first);
    write(out_map, v, row, col, first, 0);
  }
  template <int N>
  MK_DEVICE void added_chunk(float (&v)[N], std::uint32_t (&added)[N / 2], int row, int col, int first) {
    if (p.beside[0] != nullptr) combine(v, added, [](float x, float a) { return x + a; });
    load_next<N>(added, row, col, first);
    write(out_map, v, row, col, first, 0);
  }

  MK_DEVICE void wide_chunk(const float (&v)[16], int row, int col) {
    open<1>();
    unsigned char* chunk = this->chunk();
    const int r = lane / 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // 8 columns: two pieces of 16 bytes
      const int piece = 2 * j + lane % 4 / 2, within = lane % 2 * 8;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* to = reinterpret_cast<float*>(chunk + (r + 8 * h) * 128 + (piece ^ r) * 16 + within);
        store_shared(to, Vector<float, 2>{{v[4 * j + 2 * h], v[4 * j + 2 * h + 1]}});  // 4 bytes a lane: twice the cycles
      }
    }
    finish(out_map, chunk, row, col);
  }

  MK_DEVICE int outputs() const {
    if (forward && p.keep) return most;
    return L == Layout::nn && p.beside[1] != nullptr ? 2 : 1;
  }

  template <int C, class Sums>
  MK_DEVICE void fill(const Sums& sums, int row, int col) {
    constexpr bool early = ahead && Sums::held;  // the accumulators' registers count as taken until the next wgmma
    const int place = col + at(C);
    std::uint32_t own_bias[1 + gated][2] = {};
    const auto bias_of = [&](int which) -> const std::uint32_t(&)[2] {
      if constexpr (crowded) return own_bias[which];
      else return bias[which * count + C];
    };
    std::uint32_t words[slice / 4];
    if constexpr (crowded) {
      if constexpr (forward) load_bias(own_bias[0], 0, place);
      if constexpr (gated) load_bias(own_bias[1], 1, place);
      if constexpr (reads) load_beside(0, words, row, place);
      if (outputs() == 1) open<1>();
      else open<most>();
    } else if constexpr (reads) {
      if (!early && !forward) {
        // Of out that accumulates, the chunk before may have changed what is repeated.
        constexpr int known = L == Layout::tn && at(C) < C * width ? repeated : 0;
#pragma unroll
        for (int i = 0; i < known / 4; ++i) beside[i] = beside[(width - known) / 4 + i];
        load_beside(0, beside, row, place, known);
      }
#pragma unroll
      for (int i = 0; i < 16; ++i) words[i] = beside[i];
      if (early && C + 1 < count) load_ahead(row, place + width);
    }
#pragma unroll
    for (int first = 0; first < width; first += slice) {
      float v[slice / 2];
      sums.read(v, (at(C) + first) / 2);
      if constexpr (wide) {
        wide_chunk(v, row, place);
      } else if constexpr (gated) {
        float up[slice / 2];
        sums.read(up, (cols + at(C) + first) / 2);
        add_bias(v, bias_of(0), first), add_bias(up, bias_of(1), first);
        gated_chunk(v, up, row, place, first);
      } else if constexpr (forward) {
        add_bias(v, bias_of(0), first);
        forward_chunk<early || crowded>(v, words, row, place, first);
      } else if constexpr (L == Layout::nn) {
        gradient_chunk(v, words, row, place, first);
      } else {
        added_chunk(v, words, row, place, first);
      }
    }
    if constexpr (crowded) {
      const int stores = outputs();
      if (stores > 1) finish(second_map, chunk(), row, place);
      if (stores > 2) finish(third_map, chunk(), row, place);
      finish(out_map, chunk(), row, place);
    }
  }

  // The 64 rows from `row` on, from chunk C on; load_ahead has been called for them if the sums are held.
  template <int C = 0, class Sums>
  MK_DEVICE void fragment(const Sums& sums, int row, int col) {
    fill<C>(sums, row, col);
    if constexpr (C + 1 < count) fragment<C + 1>(sums, row, col);
  }
};

}  // namespace megakern
