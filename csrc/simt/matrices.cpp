// Matrices: ldmatrix and stmatrix, mma.sync, wgmma. Fragments and descriptors lie as the hardware lays them; sums are
// fp32, k by k (a tensor core rounds otherwise: results agree to the rounding of fp32, not to the bit).
#include <algorithm>
#include <cstring>

#include "device/ptx.cuh"
#include "simt/async.h"
#include "simt/sanitizers.h"

namespace megakern::simt {

// --- 16-bit values ---

// All values of fp16, bf16.
template <class T>
static const float* table() {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (int bits = 0; bits < 1 << 16; ++bits) all[std::size_t(bits)] = to_float(T{std::uint16_t(bits)});
    return all;
  }();
  return values.data();
}

static void widen(const unsigned char* from, float* to, int count, bool is_bf16) {
  std::uint16_t bits[64];
  std::memcpy(bits, from, std::size_t(count) * 2);
  if (is_bf16) {
    for (int i = 0; i < count; ++i) to[i] = to_float(bf16{bits[i]});
  } else {
    const float* values = table<fp16>();
    for (int i = 0; i < count; ++i) to[i] = values[bits[i]];
  }
}

static void widen_pair(std::uint32_t word, float* to, bool is_bf16) {
  widen(reinterpret_cast<const unsigned char*>(&word), to, 2, is_bf16);
}

// --- ldmatrix, stmatrix: 8 x 8 matrices of 16-bit values ---

struct Rows {
  unsigned char* row;
  std::uint32_t* r;
  int count;
  bool transposed;
};

static void check_row(const void* row, int count, const char* what, Site site) {
  const auto* p = static_cast<const unsigned char*>(row);
  const Block& block = *self->block;
  if (self->lane >= 8 * count) return;  // its address is not used
  if (p < block.shared || p + 16 > block.shared_end || reinterpret_cast<std::uintptr_t>(p) % 16) {
    fail(std::string(what) + " wants rows of 16 bytes in shared memory, on a multiple of 16 bytes", site);
  }
}

// f(row in shared memory, pointer to the two values there, that of the lane's register): element pairs of all lanes.
static void move_matrices(Warp& w, bool load) {
  const Rows& any = *static_cast<Rows*>(w.address[0]);
  for (int i = 0; i < any.count; ++i) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* values = reinterpret_cast<unsigned char*>(&static_cast<Rows*>(w.address[lane])->r[i]);
      for (int e = 0; e < 2; ++e) {
        const int major = lane / 4, minor = 2 * (lane % 4) + e;
        const int r = any.transposed ? minor : major, c = any.transposed ? major : minor;
        unsigned char* element = static_cast<Rows*>(w.address[8 * i + r])->row + 2 * c;
        if (load) std::memcpy(values + 2 * e, element, 2);
        else std::memcpy(element, values + 2 * e, 2);
      }
    }
  }
}

void ldmatrix(const void* row, std::uint32_t* r, int count, bool transposed, Site site) {
  check_row(row, count, "ldmatrix", site);
  Rows rows = {static_cast<unsigned char*>(const_cast<void*>(row)), r, count, transposed};
  self->warp->address[self->lane] = &rows;
  meet("ldmatrix", site, [](Warp& w) { move_matrices(w, true); });
}

void stmatrix(void* row, const std::uint32_t* r, int count, bool transposed, Site site) {
  check_row(row, count, "stmatrix", site);
  Rows rows = {static_cast<unsigned char*>(row), const_cast<std::uint32_t*>(r), count, transposed};
  self->warp->address[self->lane] = &rows;
  meet("stmatrix", site, [](Warp& w) { move_matrices(w, false); });
}

// --- products of tiles ---

// d (16, N) += a (16, 16) b (16, N).
__attribute__((always_inline)) static inline void multiply(float* d, const float* a, const float* b, int N) {
  typedef float V __attribute__((vector_size(32)));
  for (int n = 0; n < N; n += 8) {
    for (int i = 0; i < 16; i += 8) {
      V sum[8];
      for (int r = 0; r < 8; ++r) std::memcpy(&sum[r], d + (i + r) * N + n, sizeof(V));
      for (int k = 0; k < 16; ++k) {
        V column;
        std::memcpy(&column, b + k * N + n, sizeof column);
        for (int r = 0; r < 8; ++r) sum[r] += a[(i + r) * 16 + k] * column;
      }
      for (int r = 0; r < 8; ++r) std::memcpy(d + (i + r) * N + n, &sum[r], sizeof(V));
    }
  }
}

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) static void multiply_avx2(float* d, const float* a, const float* b, int N) {
  multiply(d, a, b, N);
}
#endif

static void multiply_tile(float* d, const float* a, const float* b, int N) {
#if defined(__x86_64__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) return multiply_avx2(d, a, b, N);
#endif
  multiply(d, a, b, N);
}

struct Mma {
  float* d;
  const std::uint32_t *a, *b;
  bool is_bf16;
};

void mma_m16n8k16(float* d, const std::uint32_t* a, const std::uint32_t* b, bool is_bf16, Site site) {
  Mma mine = {d, a, b, is_bf16};
  self->warp->address[self->lane] = &mine;
  meet("mma_m16n8k16", site, [](Warp& w) {
    if (w.exists != 0xFFFFFFFFu) fail("mma wants a whole warp", w.site);
    float A[16 * 16], B[16 * 8], D[16 * 8];
    for (int lane = 0; lane < 32; ++lane) {
      const Mma& m = *static_cast<Mma*>(w.address[lane]);
      const int g = lane / 4, t = 2 * (lane % 4);
      for (int r = 0; r < 4; ++r) widen_pair(m.a[r], &A[(g + 8 * (r & 1)) * 16 + t + 8 * (r >> 1)], m.is_bf16);
      for (int r = 0; r < 2; ++r) {
        float pair[2];
        widen_pair(m.b[r], pair, m.is_bf16);
        for (int e = 0; e < 2; ++e) B[(t + e + 8 * r) * 8 + g] = pair[e];
      }
      for (int i = 0; i < 4; ++i) D[(g + 8 * (i >> 1)) * 8 + t + (i & 1)] = m.d[i];
    }
    multiply_tile(D, A, B, 8);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = 2 * (lane % 4);
      float* out = static_cast<Mma*>(w.address[lane])->d;
      for (int i = 0; i < 4; ++i) out[i] = D[(g + 8 * (i >> 1)) * 8 + t + (i & 1)];
    }
  });
}

// --- wgmma ---
//
// Each warp keeps a log of what its lanes issue; it runs when the warp waits, for the warp's 16 rows, and reads shared
// memory then. Until then the accumulators in the threads' registers hold NaN, and operand A in registers must not change.
// What a warp's wait says of the other three is nothing: until all four have waited, all 64 rows of A may be read.

static const Registers* named(const WarpAsync& w, int lane, const void* first) {
  for (const Registers& each : w.named[lane]) {
    const auto* begin = static_cast<const unsigned char*>(each.begin);
    if (first >= begin && first < begin + each.bytes) return &each;
  }
  return nullptr;
}

static void forget(WarpAsync& w, int lane, const void* first) {
  if (const Registers* found = named(w, lane, first)) w.named[lane].erase(w.named[lane].begin() + (found - w.named[lane].data()));
}

void wgmma_fence(const Registers* registers, int count) {
  const Hardware working;
  WarpAsync& w = async_of(*self->warp);
  w.fenced[self->lane] = true;
  for (int i = 0; i < count; ++i) {
    forget(w, self->lane, registers[i].begin);  // of another length
    w.named[self->lane].push_back(registers[i]);
  }
}

// The element of the warp's tile that a lane's register i holds.
static float& element(Accumulator& d, int lane, int i) {
  return d.tile[std::size_t((lane / 4 + 8 * (i >> 1 & 1)) * d.N + 8 * (i >> 2) + 2 * (lane & 3) + (i & 1))];
}

static Accumulator& accumulator_of(WarpAsync& w, float* d, int N, int lane) {
  for (Accumulator& each : w.accumulators) {
    if (each.uses && each.registers[lane] == d) return each;
  }
  for (Accumulator& each : w.accumulators) {
    if (each.uses == 0) {
      each = Accumulator{};
      each.N = N;
      each.tile.resize(std::size_t(16 * N));
      return each;
    }
  }
  Accumulator fresh = {};
  fresh.N = N;
  fresh.tile.resize(std::size_t(16 * N));
  w.accumulators.push_back(std::move(fresh));
  return w.accumulators.back();
}

// The accumulators of this lane go on their way.
static void take(WarpAsync& w, Accumulator& d, float* registers, int lane, bool accumulate, Site site) {
  if (d.registers[lane] == registers) return;
  if (d.registers[lane]) fail("lanes of a warp issue wgmma with different accumulators", site);
  if (!w.fenced[lane]) fail("wgmma without a wgmma_fence since its accumulators were last touched", site);
  if (accumulate && !named(w, lane, registers)) {
    fail("wgmma adds to accumulators that no wgmma_fence has named since they were complete: a compiler may still write them", site);
  }
  d.registers[lane] = registers;
  for (int i = 0; i < d.N / 2; ++i) element(d, lane, i) = registers[i];
  std::memset(registers, kPoison, std::size_t(d.N / 2) * sizeof(float));
}

// The entry of the log that this lane comes to; `mine` if it is the first.
static Product& entry(WarpAsync& w, const Product& mine, int lane) {
  const std::size_t place = std::size_t(w.position[lane]++ - w.begin);
  if (place == w.log.size()) w.log.push_back(mine);
  Product& all = w.log[place];
  const bool same = all.kind == mine.kind && all.a == mine.a && all.b == mine.b && all.N == mine.N &&
                    all.from_registers == mine.from_registers && all.a_major_m == mine.a_major_m &&
                    all.b_major_n == mine.b_major_n && all.accumulate == mine.accumulate && all.is_bf16 == mine.is_bf16;
  if (!same) fail("lanes of a warp issue different wgmma instructions or descriptors", mine.site);
  return all;
}

void wgmma_issue(float* d, int N, const std::uint32_t* a_registers, std::uint64_t a, std::uint64_t b, bool a_major_m,
                 bool b_major_n, bool accumulate, bool is_bf16, Site site) {
  const Hardware working;
  settle_fences(*self->block);
  Warp& warp = *self->warp;
  WarpAsync& w = async_of(warp);
  const int lane = self->lane;
  Product mine = {};
  mine.kind = Product::multiply;
  mine.a = a, mine.b = b, mine.N = N;
  mine.from_registers = a_registers != nullptr;
  mine.a_major_m = a_major_m, mine.b_major_n = b_major_n, mine.accumulate = accumulate, mine.is_bf16 = is_bf16;
  mine.site = site;
  Product& all = entry(w, mine, lane);
  if (!all.d) {
    all.d = &accumulator_of(w, d, N, lane);
    ++all.d->uses;
    all.number = w.issued++;
  }
  if (all.d->N != N) fail("wgmma of another width on accumulators that are in flight", site);
  take(w, *all.d, d, lane, accumulate, site);
  if (!a_registers) return;
  if (!named(w, lane, a_registers)) {
    fail("wgmma with A in registers that no wgmma_fence has named since they were last read: a compiler may still write them", site);
  }
  all.registers[lane] = a_registers;
  std::copy(a_registers, a_registers + 4, all.fragments[lane]);
}

void wgmma_commit(Site site) {
  const Hardware working;
  Product mine = {};
  mine.kind = Product::commit;
  mine.site = site;
  entry(async_of(*self->warp), mine, self->lane);
}

// 16 bytes of shared memory as the tensor cores see it, at an address of the window after the swizzle.
static const unsigned char* piece(Block& block, std::uint32_t address, Site site) {
  address ^= (address >> 7 & 7) << 4;
  if (address < kSharedStart || address + 16 > kSharedStart + std::uint32_t(block.shared_end - block.shared)) {
    fail("wgmma reads outside of shared memory, at window address " + std::to_string(address) + "; see its descriptor", site);
  }
  return shown(block, block.shared + (address - kSharedStart), site);
}

struct Descriptor {
  std::uint32_t start, leading, stride;  // bytes

  Descriptor(std::uint64_t bits, Site site)
      : start(std::uint32_t(bits & 0x3FFF) << 4), leading(std::uint32_t(bits >> 16 & 0x3FFF) << 4),
        stride(std::uint32_t(bits >> 32 & 0x3FFF) << 4) {
    if (bits >> 62 != 1) fail("a wgmma descriptor without the 128-byte swizzle; the emulator has no other", site);
    if (bits >> 49 & 7) fail("a wgmma descriptor with a base offset; the emulator wants tiles at multiples of 1024", site);
  }
};

// f(row, k, 16 bytes) for rows `first` to first + count - 1 of an operand whose rows are m (or n) and whose 16 columns are k:
// eight values, along m (or n) if major_mn, else along k.
template <class F>
static void for_pieces(Block& block, std::uint64_t bits, bool major_mn, int first, int count, Site site, F f) {
  const Descriptor desc(bits, site);
  if (major_mn) {  // a row of 128 bytes for each k, with 64 values along m or n
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < count; row += 8) {
        const int mn = first + row;
        const std::uint32_t at = desc.start + std::uint32_t(mn / 64) * desc.leading + std::uint32_t(k / 8) * desc.stride +
                                 std::uint32_t(k % 8 * 128 + mn % 64 * 2);
        f(row, k, piece(block, at, site));
      }
    }
  } else {  // a row of 128 bytes for each m or n, with 64 values along k
    for (int row = 0; row < count; ++row) {
      const int mn = first + row;
      for (int k = 0; k < 16; k += 8) {
        const std::uint32_t at = desc.start + std::uint32_t(mn / 8) * desc.stride + std::uint32_t(mn % 8 * 128 + k * 2);
        f(row, k, piece(block, at, site));
      }
    }
  }
}

// Transposed if `by_k`: out[k * count + row], else out[row * 16 + k].
static void read_operand(Block& block, std::uint64_t bits, bool major_mn, int first, int count, bool is_bf16, bool by_k,
                         float* out, Site site) {
  for_pieces(block, bits, major_mn, first, count, site, [&](int row, int k, const unsigned char* from) {
    if (major_mn && by_k) return widen(from, out + k * count + row, 8, is_bf16);
    float values[8];
    widen(from, values, 8, is_bf16);
    for (int e = 0; e < 8; ++e) {
      const int r = major_mn ? row + e : row, c = major_mn ? k : k + e;
      out[by_k ? c * count + r : r * 16 + c] = values[e];
    }
  });
}

// Fails if A in shared memory is not what it was for the first warp of the four.
static void check_shared_a(Block& block, const Product& product, int warp) {
  std::uint64_t sum = 0;
  for_pieces(block, product.a, product.a_major_m, 0, 64, product.site, [&](int, int, const unsigned char* from) {
    std::uint64_t halves[2];
    std::memcpy(halves, from, sizeof halves);
    sum = (sum ^ halves[0]) * 0x9E3779B97F4A7C15u;
    sum = (sum ^ halves[1] ^ sum >> 32) * 0xBF58476D1CE4E5B9u;
  });
  auto& all = async_of(block).of_warpgroup[warp / 4];
  auto mine = std::find_if(all.begin(), all.end(), [&](const SharedA& each) { return each.number == product.number; });
  if (mine == all.end()) mine = all.insert(all.end(), {product.number, 0, sum});
  if (mine->sum != sum) {
    fail("operand A of a wgmma has been written over before all four warps have waited for it", product.site);
  }
  if (++mine->warps == 4) all.erase(mine);
}

// The registers of A, which must be as they were at the issue.
static void check_registers(const Product& product) {
  for (int lane = 0; lane < 32; ++lane) {
    if (std::equal(product.fragments[lane], product.fragments[lane] + 4, product.registers[lane])) continue;
    fail("registers of operand A have changed while a wgmma that reads them runs", product.site);
  }
}

// Runs entries of the log up to the end of group number `groups`.
static void run_products(Warp& warp, int groups) {
  WarpAsync& w = *warp.async;
  Block& block = *warp.block;
  static std::vector<float> b(16 * 256);
  float a[16 * 16];
  const Product* read = nullptr;  // whose B is in b
  Product last;
  while (groups > 0) {
    Product product = w.log.front();
    w.log.pop_front();
    ++w.begin;
    if (product.kind == Product::commit) {
      --groups;
      continue;
    }
    const int rows = warp.index % 4 * 16;
    if (product.from_registers) {
      check_registers(product);
      for (int lane = 0; lane < 32; ++lane) {
        forget(w, lane, product.registers[lane]);
        for (int r = 0; r < 4; ++r) {
          widen_pair(product.fragments[lane][r], &a[(lane / 4 + 8 * (r & 1)) * 16 + 2 * (lane & 3) + 8 * (r >> 1)],
                     product.is_bf16);
        }
      }
    } else {
      check_shared_a(block, product, warp.index);
      read_operand(block, product.a, product.a_major_m, rows, 16, product.is_bf16, false, a, product.site);
    }
    if (!read || last.b != product.b || last.b_major_n != product.b_major_n || last.N != product.N) {
      read_operand(block, product.b, product.b_major_n, 0, product.N, product.is_bf16, true, b.data(), product.site);
    }
    last = product;
    read = &last;
    Accumulator& d = *product.d;
    if (!product.accumulate) std::fill(d.tile.begin(), d.tile.end(), 0.0f);
    multiply_tile(d.tile.data(), a, b.data(), d.N);
    if (--d.uses == 0) w.finished.push_back(&d);
  }
  for (Accumulator* d : w.finished) {
    for (int lane = 0; lane < 32; ++lane) {
      forget(w, lane, d->registers[lane]);
      for (int i = 0; i < d->N / 2; ++i) d->registers[lane][i] = element(*d, lane, i);
    }
  }
  if (!w.finished.empty()) std::fill(w.fenced, w.fenced + 32, false);
}

struct Wait {
  int pending;
  float* const* d;
  int count;
};

void wgmma_wait(int pending, float* const* d, int count, Site site) {
  async_of(*self->warp);
  Wait mine = {pending, d, count};
  self->warp->address[self->lane] = &mine;
  meet("wgmma_wait", site, [](Warp& warp) {
    WarpAsync& w = *warp.async;
    w.finished.clear();
    const long end = w.begin + long(w.log.size());
    for (int lane = 0; lane < 32; ++lane) {
      if (w.position[lane] != end) fail("lanes of a warp have issued different numbers of wgmma", warp.site);
    }
    int groups = -static_cast<Wait*>(warp.address[0])->pending;
    for (const Product& product : w.log) groups += product.kind == Product::commit;
    run_products(warp, groups);
    for (const Accumulator* finished : w.finished) {
      for (int lane = 0; lane < 32; ++lane) {
        const Wait& wait = *static_cast<Wait*>(warp.address[lane]);
        if (std::find(wait.d, wait.d + wait.count, finished->registers[lane]) == wait.d + wait.count) {
          fail("wgmma_wait completes accumulators that it does not name: a compiler may read them before it", warp.site);
        }
      }
    }
  });
}

void end_products(Warp& warp) {
  if (!warp.async->log.empty()) fail("the block leaves while wgmma runs; wgmma_commit and wgmma_wait<0> first", warp.async->log[0].site);
}

}  // namespace megakern::simt
