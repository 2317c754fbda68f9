// Collectives of the ranks of one machine through memory that they share; megakern/parallel/shared.py opens it.
//
// The memory is a ring of chunks for each rank, and two counters: chunks it wrote, chunks of all ranks it has read.
// All ranks make the same collectives in the same order, so chunk k of one rank belongs with chunk k of every other,
// and nothing else need be agreed upon:
//
//     rank r may write chunk k    when every other rank has read chunk k - slots
//     rank r may read chunk k     when every other rank has written it; then it has all it needs for its own result
//
// The rank that is furthest behind can always go on, so nothing locks up. A chunk carries what it belongs to, and ranks
// that no longer do the same are told so. Each rank holds a POSIX lock on its byte of the file, which the kernel drops
// however the process ends: so a waiting rank tells one that has died from one that is slow.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "api.h"

namespace megakern {

enum Collective : int { kAllReduce = 0, kAllGather = 1, kReduceScatter = 2 };
enum Reduction : int { kSum = 0, kMax = 1 };
enum SharedDType : int { kF32 = 0, kB16 = 1, kF64 = 2, kI64 = 3, kU8 = 4 };  // kU8: moved, not added
enum Outcome : int { kDone = 0, kNotYet = 1, kGone = 2, kOther = 3 };

// What a chunk belongs to: the same on all ranks.
struct Call {
  int32_t collective, reduction, dtype;
  int64_t elements;  // of one rank's part; all-reduce: of the whole
  int64_t block;
  bool operator==(const Call& o) const {
    return collective == o.collective && reduction == o.reduction && dtype == o.dtype && elements == o.elements &&
           block == o.block;
  }
};

class SharedChannel {
 public:
  // The bytes that the file must have.
  static int64_t bytes(int ranks, int slots, int64_t chunk);
  // Takes over `file`. Throws std::runtime_error when it cannot be mapped or locked.
  SharedChannel(int file, int rank, int ranks, int slots, int64_t chunk, int64_t spins);
  ~SharedChannel();
  SharedChannel(const SharedChannel&) = delete;

  // Begins a collective, writes what there is room for, never waits. Both tensors are contiguous and stay as they are
  // until it is finished. Returns its number. `ahead`: how many chunks to write now.
  //
  //     all-reduce        x, out (elements,), out may be x: summed in the order of ranks, bf16 in fp32, so that all
  //                       ranks have the same bits
  //     all-gather        x (elements,) -> out (ranks elements,)
  //     reduce-scatter    x (ranks elements,) -> out (elements,)
  //
  // In a whole, parts alternate in blocks: element i of part p is at (i / block) block ranks + p block + i % block.
  uint64_t start(int collective, int reduction, int dtype, Address x, Address out, int64_t elements, int64_t block,
                 int ahead);
  // Goes on with collective `number`, and those before it, for about `milliseconds`. Returns (outcome, rank, what that
  // rank does instead: collective, reduction, dtype, elements); rank: one that is waited for, gone, or other.
  std::tuple<int, int, int, int, int, int64_t> finish(uint64_t number, int milliseconds);

 private:
  struct Segment;
  struct Work {
    Call call;
    const char* x;
    char* out;
    int64_t per_chunk;      // elements
    uint64_t first, chunks;  // its chunks, as counted since the channel was opened
  };

  bool may_write() const;
  int not_written(uint64_t chunk) const;  // a rank that has not yet, or -1
  int not_read(uint64_t chunk) const;
  int other(uint64_t chunk, const Call& call) const;  // a rank whose chunk belongs to something else, or -1
  void write_one();
  void read_one();
  void ring();
  bool has_ended(int rank) const;
  char* data(int rank, uint64_t chunk) const;
  const Work& work_of(uint64_t chunk) const;

  int file_, rank_, ranks_, slots_;
  int64_t chunk_, spins_;
  std::unique_ptr<Segment> segment_;
  std::mutex mutex_;
  std::vector<const char*> parts_;
  std::deque<Work> works_;  // not yet read to the end
  uint64_t queued_ = 0, written_ = 0, read_ = 0;  // chunks
  uint64_t started_ = 0, finished_ = 0;           // collectives
};

}  // namespace megakern
