// Vector<T, N>: N neighbours in the registers of one thread, moved in pieces of up to 16 bytes.
//
// load and store want addresses on a multiple of min(16, N sizeof(T)) bytes. The *_once versions are for data which
// this kernel touches once: they leave the caches first. They and store are for global memory alone.
#pragma once

#include "device/platform.cuh"

namespace megakern {

template <class T, int N>
struct Vector {
  static_assert(N > 0 && (N & (N - 1)) == 0, "a power of two, so that its pieces are aligned");
  static constexpr int size = N;
  static constexpr int bytes = N * int(sizeof(T));
  static constexpr int piece = bytes < 16 ? bytes : 16;  // bytes of one access

  alignas(piece) T values[N];

  MK_DEVICE T& operator[](int i) { return values[i]; }
  MK_DEVICE const T& operator[](int i) const { return values[i]; }
};

// Values of T in 16 bytes.
template <class T>
constexpr int kVector = 16 / int(sizeof(T));

// Whether rows of `row_bytes` that start at `pointer` may be read in pieces of 16 bytes. For launchers.
inline bool vectors_fit(const void* pointer, std::int64_t row_bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0 && row_bytes % 16 == 0;
}

template <int N, class T>
MK_DEVICE Vector<T, N> load(const T* address) {
  Vector<T, N> v;
  access<Vector<T, N>::bytes>(v.values, address, [](auto* to, const auto* from) { *to = *from; });
  return v;
}

template <int N, class T>
MK_DEVICE Vector<T, N> load_once(const T* address) {
  check_global(address);
  Vector<T, N> v;
  access<Vector<T, N>::bytes>(v.values, address, [](auto* to, const auto* from) { *to = load_streaming(from); });
  return v;
}

// To global memory; store_shared to shared memory.
template <class T, int N>
MK_DEVICE void store(T* address, const Vector<T, N>& v) {
  check_global(address);
  access<Vector<T, N>::bytes>(address, v.values, [](auto* to, const auto* from) { store_whole(to, *from); });
}

template <class T, int N>
MK_DEVICE void store_shared(T* address, const Vector<T, N>& v) {
  access<Vector<T, N>::bytes>(address, v.values, [](auto* to, const auto* from) { *to = *from; });
}

template <class T, int N>
MK_DEVICE void store_once(T* address, const Vector<T, N>& v) {
  check_global(address);
  access<Vector<T, N>::bytes>(address, v.values, [](auto* to, const auto* from) { store_streaming(to, *from); });
}

template <class T, int N>
MK_DEVICE Vector<float, N> to_float(const Vector<T, N>& v) {
  Vector<float, N> out;
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = to_float(v[i]);
  return out;
}

template <class T, int N>
MK_DEVICE Vector<T, N> from_float(const Vector<float, N>& v) {
  Vector<T, N> out;
  if constexpr (N % 2 == 0 && sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < N; i += 2) from_float_pair(v[i], v[i + 1], &out[i]);  // one conversion instruction for two
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = from_float<T>(v[i]);
  }
  return out;
}

template <class T, int N>
MK_DEVICE Vector<T, N> filled(T value) {
  Vector<T, N> v;
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = value;
  return v;
}

// 16 bytes of T that wait in registers for their use: in four words, where a Vector of 16-bit values may take eight.
template <class T>
struct Packed {
  alignas(16) unsigned words[4];
};

// To be read once by this kernel, from a multiple of 16 bytes.
template <class T>
MK_DEVICE Packed<T> load_packed_once(const T* address) {
  check_global(address);
  Packed<T> p;
  access<16>(p.words, address, [](auto* to, const auto* from) { *to = load_streaming(from); });
  return p;
}

template <class T>
MK_DEVICE void store(T* address, const Packed<T>& p) {
  check_global(address);
  access<16>(address, p.words, [](auto* to, const auto* from) { store_whole(to, *from); });
}

template <class T>
MK_DEVICE Packed<T> packed(const Vector<T, kVector<T>>& v) {
  Packed<T> p;
  memcpy(p.words, v.values, 16);
  return p;
}

// Anew in each pass over the values: what another pass has made of them is not held until then.
template <class T>
MK_DEVICE Vector<float, kVector<T>> to_float(Packed<T>& p) {
  constexpr int each = 4 / int(sizeof(T));
  Vector<float, kVector<T>> out;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    forget_uses(p.words[w]);
    T values[each];
    memcpy(values, &p.words[w], 4);
#pragma unroll
    for (int i = 0; i < each; ++i) out[w * each + i] = to_float(values[i]);
  }
  return out;
}

}  // namespace megakern
