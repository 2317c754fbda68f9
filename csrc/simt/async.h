// What the emulator keeps of asynchronous instructions: barriers in shared memory, copies, tensor core batches.
//
// Shared memory has two views. Ordinary loads and stores see one (Block::shared); the copy engine and the tensor cores
// see the other (Block::shadow). What arrives by copy is put into both; what a thread stores reaches the second only by
// fence_async. A fence is carried out at the next meeting of threads, not at once: until then nobody may rely on it.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "device/platform.cuh"
#include "device/tensor_map.cuh"
#include "simt/scheduler.h"

namespace megakern::simt {

// The state of a barrier; its eight bytes in shared memory hold only where to find it.
struct MBarrierState {
  const void* address;
  const char* name;
  int count, missing;  // arrivals of a phase, and those that have yet to come
  long bytes;          // expected minus come
  long phase;          // completed phases
  bool fenced;         // the copy engine may know it
  std::vector<Fiber*> waiting;
  char token[2];       // for ThreadSanitizer: of even and odd phases
};

enum class CopyKind { load, store, add };

// One copy under way: of a box, or of `bytes` side by side when map.rank is 0.
struct Copy {
  CopyKind kind;
  TensorMap map;
  int at[TensorMap::kRanks];
  unsigned char* shared;  // in Block::shared of `block`
  unsigned char* global;  // of a copy without a box
  std::int64_t bytes;
  Block* block;
  MBarrierState* barrier;
  std::vector<unsigned char> read;  // of a store whose source has been read
  bool was_read;
  Site site;
};

// cp.async of one thread: 4, 8 or 16 bytes.
struct SmallCopy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, valid;
  long number;  // in the order of the thread
  bool done;
};

// Of one thread, once it uses them.
struct ThreadAsync {
  std::vector<Copy> stores;                       // of the open group
  std::deque<std::vector<Copy>> store_groups;     // oldest first
  std::vector<SmallCopy> small;
  std::deque<std::vector<SmallCopy>> small_groups;
  long small_count = 0;
  long cluster_phase = -1;                        // at its arrival at the cluster's barrier
};

// An arrival that waits for a thread's small copies (cp.async.mbarrier.arrive).
struct SmallArrival {
  ThreadAsync* thread;
  MBarrierState* barrier;
  long limit;  // the copies before this one
  Site site;
};

// Accumulators of a warp: 16 rows of N. While they are in flight the registers hold NaN.
struct Accumulator {
  float* registers[32];
  int N;
  int uses;  // batches that have yet to run
  std::vector<float> tile;
};

struct Product {  // one wgmma of a warp, or the end of a group
  enum Kind { multiply, commit } kind;
  Accumulator* d;
  std::uint64_t a, b;
  bool from_registers, a_major_m, b_major_n, accumulate, is_bf16;
  int N;
  long number;  // among those of the warp, so that its neighbours know the same instruction
  const std::uint32_t* registers[32];  // of A: each lane's four, and what they held at the issue
  std::uint32_t fragments[32][4];
  Site site;
};

struct WarpAsync {
  std::deque<Product> log;
  long begin = 0;  // number of the first entry of the log
  long position[32] = {};
  bool fenced[32] = {};  // since accumulators were last completed
  std::vector<Registers> named[32];  // by such a fence; taken out when what reads or writes them completes
  std::deque<Accumulator> accumulators;
  std::vector<Accumulator*> finished;  // by the last wait
  long issued = 0;
};

// All 64 rows of an A in shared memory, as the first warp of the four found them that has completed its part.
struct SharedA {
  long number;  // of the product
  int warps;    // that have completed it
  std::uint64_t sum;
};

struct BlockAsync {
  std::deque<MBarrierState> barriers;
  GuardedMemory shadow;
  bool fence_pending = false;
  std::deque<SharedA> of_warpgroup[8];
};

struct ClusterState {
  std::vector<Block*> blocks;
  int arrived = 0;
  long phase = 0;
  std::vector<Fiber*> waiting;
  char token[2] = {};
};

struct InFlight {
  std::deque<Copy> loads;  // these complete only when no thread can run
  std::deque<SmallArrival> arrivals;
  std::deque<Copy> writes;  // stores whose source has been read, and that nobody waits for: at the end of the launch
};
extern InFlight in_flight MK_SIMT_HIDDEN;

// The first of the window as on the hardware, after the 1 KB that the system keeps, and another 16 bytes later, so that
// code which does not align its buffers for TMA fails.
constexpr std::uint32_t kSharedStart = 1024 + 16;

ThreadAsync& async_of(Fiber& fiber);
WarpAsync& async_of(Warp& warp);
BlockAsync& async_of(Block& block);

// The asynchronous view of shared memory; `p` points into Block::shared.
unsigned char* shadow_of(Block& block, const unsigned char* p);
// The same of 16 bytes that the copy engine or the tensor cores read now: both views must agree. Where they do not, a
// thread has written without a fence, or too early.
const unsigned char* shown(Block& block, const unsigned char* p, Site site);
// Carries out the fences of the block's threads.
void settle_fences(Block& block);

MBarrierState& barrier_at(Block& block, const void* address, Site site);
void complete_bytes(MBarrierState& barrier, long bytes);
void arrive(MBarrierState& barrier, Site site);

void complete(Copy& copy);
// cp.async of a thread up to number `limit`.
void finish_small(ThreadAsync& thread, long limit);

// At the end of a thread, of a warp.
void end_copies(ThreadAsync& thread);
void end_products(Warp& warp);

}  // namespace megakern::simt
