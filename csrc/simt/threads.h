// The threads of a launch on a CPU: one fiber a CUDA thread, warps of 32, blocks, and what device code may ask of them.
// device.h builds the names that kernels use on these; scheduler.cpp and launch.cpp run them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#define MK_SIMT_HIDDEN __attribute__((visibility("hidden")))
// As the last parameter of a function: where it was called.
#define MK_SITE ::megakern::simt::Site site = {__builtin_FILE(), __builtin_LINE()}

namespace megakern {

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

struct Site {
  const char* file = "";
  int line = 0;
};

struct Registers {  // an array of one thread: accumulators, or operand A
  const void* begin;
  std::size_t bytes;
};

struct Block;
struct ThreadAsync;  // async.h has these
struct WarpAsync;
struct BlockAsync;
struct ClusterState;

// 32 threads and the one operation of all its lanes that may be under way.
struct Warp {
  static constexpr int kValue = 16;  // bytes of a value that a lane brings or takes

  Block* block;
  int index;         // in its block
  int place;         // among all warps that are resident
  int priority;      // of the PCT schedule
  unsigned exists, ready, left;

  unsigned arrived;  // lanes that have come to the operation `name` at `site`
  const char* name;
  Site site;
  const void* argument;  // of `finish`, from the lane that came last
  alignas(16) unsigned char in[32][kValue];
  alignas(16) unsigned char out[32][kValue];
  int from[32];
  long meetings;  // that have taken place
  char token[2];  // for ThreadSanitizer: of the even and the odd ones
  void* address[32];  // what a lane points at
  WarpAsync* async;   // nullptr until it is used
};

struct Fiber {
  void* stack_pointer;
  dim3 thread;
  int lane;
  Warp* warp;
  Block* block;
  // What it waits for, nullptr when it can run; `what` is the name of a barrier in that case.
  const char* waits;
  const char* what;
  long detail;
  Site site;
  ThreadAsync* async;
  // Of its stack, and what a sanitizer knows of it.
  const void* stack_begin;
  std::size_t stack_bytes;
  void* sanitizer;
};

struct Barrier {
  int arrived, wanted;  // threads
  unsigned waiting;     // warps
  long meetings;
  char token[2];
  Site site;
};

struct Block {
  static constexpr int kBarriers = 16;

  dim3 index, dim, grid;
  int threads, warps, left;
  int rank;  // in its cluster
  unsigned char* shared;  // dynamic shared memory, and its end
  unsigned char* shared_end;
  Fiber* fibers;
  Warp* first_warp;
  Barrier barrier[kBarriers];
  ClusterState* cluster;
  BlockAsync* async;
};

// The thread that runs. Launches take turns (a lock), so there is one.
extern Fiber* self MK_SIMT_HIDDEN;

// Throws std::runtime_error with the message, the thread and the place: "... (thread 3, 0, 0 of block 1, 0, 0, x.cu:7)".
[[noreturn]] void fail(const std::string& message, Site site);

// Lets other fibers run until somebody wakes this one.
void wait(const char* waits, const char* what, long detail, Site site);
void wake(Fiber* fiber);
// Lets other fibers run; comes back when no other can make progress.
void spin(Site site);

// Something that other threads may see has happened: under random and pct schedules another may run from here.
void breathe();

// All lanes of a warp come here; the last runs finish(warp), which fills warp.out from warp.in, and all go on.
void meet(const char* name, Site site, void (*finish)(Warp&), const void* argument = nullptr);

// Named barriers of a block, 0 is that of sync_block. `threads` 0: all of the block, none of which may have left.
void barrier_sync(int id, int threads, Site site);
void barrier_arrive(int id, int threads, Site site);

void check_shared_end(const unsigned char* end);
void check_global(const void* address);

struct Launch {
  const char* text;  // of MK_LAUNCH
  dim3 grid, block;
  std::size_t shared;
  unsigned cluster;  // blocks along x that run at the same time, on one another's shared memory
  int device;
  void (*call)(const void*);
  const void* body;
};

// All blocks, one cluster after another. What a thread throws comes out here, and no other thread goes on.
void run(const Launch& launch);


}  // namespace simt
}  // namespace megakern
