// Many tensors in one launch: their addresses travel as an argument of the kernel, which needs no memory on the device and
// no copy to it, and which a CUDA graph keeps. Tensors are cut into pieces, numbered through; one block does one piece.
#pragma once

#include <memory>
#include <string>

#include "device/checks.h"
#include "device/platform.cuh"

namespace megakern {

// Arguments of a kernel may take 32764 bytes (CUDA 12.1 and later, sm_70 and later). Short lists use less: all of it is
// copied at each launch.
constexpr int kArgumentBytes = 32000, kShortArgumentBytes = 4000;

// COLUMNS numbers for each of up to MOST tensors, and the number of the first piece of each and of the one behind the last.
template <int COLUMNS, int BYTES>
struct TensorList {
  static constexpr int most = (BYTES - 8) / (8 * COLUMNS + 4);

  int64_t rows[most][COLUMNS];
  int first[most + 1];
  int count;

  // The tensor that `piece` belongs to.
  MK_DEVICE int owner(int piece) const {
    int low = 0, behind = count;
    while (behind - low > 1) {
      const int middle = (low + behind) / 2;
      if (first[middle] <= piece) low = middle;
      else behind = middle;
    }
    return low;
  }
};

// Pieces of `size` elements in a tensor of `count`.
inline int64_t pieces_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Throws unless tensor number `tensor` of a table has an address fit for elements of `bytes`.
inline void check_address(const Checks& check, const std::string& name, int64_t tensor, int64_t address, int64_t bytes) {
  if (address != 0 && address % bytes == 0) {
    return check.origin((name + " " + std::to_string(tensor)).c_str(), reinterpret_cast<const void*>(address));
  }
  check.require(false, "the address of " + name + " " + std::to_string(tensor) + " must be a multiple of " +
                           std::to_string(bytes) + " and not null, got " + std::to_string(address));
}

// Throws if two tensors of one row of a table, or one of it and another, share a byte. Rows are not held against each
// other: 1500 tensors of a model would be sorted at each step.
inline void check_apart(const Checks& check, int64_t tensor, const char* name, int64_t address, int64_t bytes,
                        const char* other_name, int64_t other, int64_t other_bytes) {
  if (address + bytes <= other || other + other_bytes <= address) return;
  check.require(false, std::string(name) + " " + std::to_string(tensor) + " overlaps " + other_name + "; give it memory of its own");
}

// launch(list, pieces, pieces before) for as many tensors at a time as an argument holds: mostly all of them. `table` has
// COLUMNS numbers a tensor, of which number `counts` is that of its elements.
template <int COLUMNS, int counts, class Launch>
void each_list(const Checks& check, const int64_t* table, int64_t tensors, int64_t size, Launch launch) {
  using Short = TensorList<COLUMNS, kShortArgumentBytes>;
  using Long = TensorList<COLUMNS, kArgumentBytes>;
  int64_t before = 0;
  const auto fill = [&](auto* list, int64_t from) {
    int64_t pieces = 0;
    list->count = 0;
    for (; from + list->count < tensors && list->count < list->most; ++list->count) {
      const int64_t* row = table + (from + list->count) * COLUMNS;
      for (int column = 0; column < COLUMNS; ++column) list->rows[list->count][column] = row[column];
      list->first[list->count] = int(pieces);
      pieces += pieces_of(row[counts], size);
      check.blocks(pieces);
    }
    list->first[list->count] = int(pieces);
    if (pieces) launch(*list, int(pieces), before);
    before += pieces;
    return list->count;
  };
  if (tensors <= Short::most) {
    Short list;
    fill(&list, 0);
    return;
  }
  const auto list = std::make_unique<Long>();
  for (int64_t from = 0; from < tensors;) from += fill(list.get(), from);
}

}  // namespace megakern
