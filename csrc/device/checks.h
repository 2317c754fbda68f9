// Checks of a launch's arguments on the host, before it: what was wanted, what came. They are all that stands between a
// wrong call and a crash, since a pointer knows neither its size nor its dtype.
//
//   Checks check("swiglu_forward");
//   check.floating(p.dtype);
//   check.size("M", p.M), check.size("C", p.C);
//   check.reads("gate", p.gate, p.dtype, p.M, p.C, p.gate_stride);
//   check.writes("y", p.y, p.dtype, p.M, p.C, p.C, Alias::whole);
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "../api.h"

namespace megakern {

constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();  // gridDim.x
constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

inline int64_t size_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::f32: case Dtype::i32: return 4;
    case Dtype::bf16: case Dtype::f16: case Dtype::i16: return 2;
    case Dtype::i64: return 8;
  }
  return 0;
}

enum class Alias { none, whole };  // may an output be, whole and in the same place, a tensor named before it?

class Checks {
 public:
  explicit Checks(const char* op) : op_(op) {}

  void require(bool ok, const std::string& message) const {
    if (!ok) throw std::invalid_argument(std::string(op_) + ": " + message);
  }

  void floating(Dtype dtype, const char* name = "dtype") const {
    const bool ok = dtype == Dtype::f32 || dtype == Dtype::bf16 || dtype == Dtype::f16;
    if (!ok) require(false, std::string(name) + " must be code 0 (fp32), 1 (bf16) or 2 (fp16), got " + code(dtype));
  }

  void same(const char* name, Dtype dtype, Dtype wanted) const {
    if (dtype != wanted) require(false, std::string(name) + " must be dtype code " + code(wanted) + ", got " + code(dtype));
  }

  template <class Enum>
  void known(const char* name, Enum value, Enum last) const {
    if (int(value) < 0 || value > last) {
      require(false, std::string(name) + " must be 0 to " + std::to_string(int(last)) + ", got " + std::to_string(int(value)));
    }
  }

  void size(const char* name, int64_t value, int64_t least = 0, int64_t most = int64_t(1) << 48) const {
    if (value < least || value > most) {
      require(false, std::string(name) + " must be " + std::to_string(least) + " to " + std::to_string(most) + ", got " +
                         std::to_string(value));
    }
  }

  // An input (rows, cols), its rows `stride` elements apart; 0: all rows are one. Not called for an absent tensor.
  void reads(const char* name, const void* pointer, Dtype dtype, int64_t rows, int64_t cols, int64_t stride) {
    if (!rows || !cols) return;
    add(span(name, pointer, dtype, rows, cols, stride, false), Alias::none);
  }
  void reads(const char* name, const void* pointer, Dtype dtype, int64_t count) {
    reads(name, pointer, dtype, 1, count, count);
  }

  // An output (rows, cols). No two of its elements are one, and it overlaps nothing, but for what `alias` allows.
  void writes(const char* name, const void* pointer, Dtype dtype, int64_t rows, int64_t cols, int64_t stride,
              Alias alias = Alias::none) {
    if (!rows || !cols) return;
    if (rows > 1 && stride < cols) {
      require(false, std::string(name) + " is written, so its rows must be at least " + std::to_string(cols) +
                         " elements apart, got " + std::to_string(stride));
    }
    add(span(name, pointer, dtype, rows, cols, stride, true), alias);
  }
  void writes(const char* name, const void* pointer, Dtype dtype, int64_t count, Alias alias = Alias::none) {
    writes(name, pointer, dtype, 1, count, count, alias);
  }

  // Where check_pointers is on: `pointer` leads to the launch's device. pointers.cu
  void origin(const char* name, const void* pointer) const;

  // The x size of a grid.
  unsigned blocks(int64_t count) const {
    if (count > kMostBlocks) {
      require(false, "takes " + std::to_string(count) + " blocks, and a grid has at most " + std::to_string(kMostBlocks) +
                         "; pass fewer rows at a time");
    }
    return unsigned(count);
  }

 private:
  struct Span {
    const char* name;
    int64_t begin, end;     // bytes: first, and behind the last
    int64_t stride, width;  // bytes of a row, and from row to row (one row: the whole)
    bool written;
  };

  static std::string code(Dtype dtype) { return std::to_string(int(dtype)); }

  Span span(const char* name, const void* pointer, Dtype dtype, int64_t rows, int64_t cols, int64_t stride,
            bool written) const {
    const int64_t bytes = size_of(dtype), address = int64_t(reinterpret_cast<uintptr_t>(pointer));
    const std::string tensor = name;
    if (!bytes) require(false, "dtype of " + tensor + " must be a code from 0 to 5, got " + code(dtype));
    if (!address) require(false, "the address of " + tensor + " is null");
    origin(name, pointer);
    if (address % bytes) {
      require(false, "the address of " + tensor + " must be a multiple of " + std::to_string(bytes) + ", got " +
                         std::to_string(address));
    }
    if (rows == 1) stride = cols;
    if (stride < 0) require(false, "the rows of " + tensor + " must not run backwards, got stride " + std::to_string(stride));
    constexpr int64_t most = int64_t(1) << 48;  // elements: beyond any address
    if (cols > most || (rows > 1 && stride > most / (rows - 1))) {
      require(false, tensor + " of " + std::to_string(rows) + " rows " + std::to_string(stride) +
                         " elements apart is larger than any memory");
    }
    const int64_t width = cols * bytes;
    return {name, address, address + (rows - 1) * stride * bytes + width, stride * bytes, width, written};
  }

  // Do two tensors share a byte? Columns of one wider matrix (equal strides) do not.
  static bool overlap(const Span& a, const Span& b) {
    if (a.end <= b.begin || b.end <= a.begin) return false;
    if (a.stride != b.stride || a.stride == 0) return true;
    const int64_t apart = ((b.begin - a.begin) % a.stride + a.stride) % a.stride;
    return apart < a.width || apart + b.width > a.stride;
  }

  void add(const Span& added, Alias alias) {
    for (int i = 0; i < count_; i++) {
      const Span& other = spans_[i];
      if ((!added.written && !other.written) || !overlap(added, other)) continue;
      const bool one = added.begin == other.begin && added.end == other.end && added.stride == other.stride;
      if (one && alias == Alias::whole && !other.written) continue;
      require(false, std::string(added.written ? added.name : other.name) + " is written and must not overlap " +
                         (added.written ? other.name : added.name) + "; give it memory of its own");
    }
    if (count_ == kMostTensors) throw std::logic_error(std::string(op_) + ": raise kMostTensors in checks.h");
    spans_[count_++] = added;
  }

  static constexpr int kMostTensors = 24;
  const char* op_;
  Span spans_[kMostTensors];
  int count_ = 0;
};

}  // namespace megakern
