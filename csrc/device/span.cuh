// A run of fewer than 2^31 elements seen as 16-byte chunks of memory, whatever the alignment of its start: a head before
// the first chunk, the chunks, and a tail. Head and tail together, the edge, are fewer elements than any block has threads.
#pragma once

#include "device/vector.cuh"

namespace megakern {

template <class T>
struct Span {
  static constexpr int N = kVector<T>;

  const T* data;
  int head;    // elements before the first chunk
  int edge;    // elements in head and tail
  int chunks;  // of N elements

  MK_DEVICE Span(const T* data, int count) : data(data) {
    const int beside = int(reinterpret_cast<uintptr_t>(data) % 16) / int(sizeof(T));
    head = beside ? N - beside : 0;
    if (head > count) head = count;
    chunks = (count - head) / N;
    edge = count - chunks * N;
  }

  // The address and the first element of chunk k; the element that number e of the edge is.
  MK_DEVICE const T* chunk(int k) const { return data + first(k); }
  MK_DEVICE int first(int k) const { return head + k * N; }
  MK_DEVICE int at_edge(int e) const { return e < head ? e : e + chunks * N; }
};

}  // namespace megakern
