// Inner parts of the emulator: stacks and memory of resident blocks, and the choice of the fiber that runs next.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <vector>

#include "simt/threads.h"

namespace megakern::simt {

// Memory with an unmapped page before and after it: a step outside stops the kernel with a message.
class GuardedMemory {
 public:
  GuardedMemory() = default;
  explicit GuardedMemory(std::size_t bytes);
  GuardedMemory(GuardedMemory&& other) noexcept;
  GuardedMemory& operator=(GuardedMemory&& other) noexcept;
  ~GuardedMemory();

  unsigned char* begin() const { return begin_; }
  unsigned char* end() const { return begin_ + bytes_; }
  bool guards(const void* address) const;  // whether the address is in one of the two pages

 private:
  unsigned char* begin_ = nullptr;
  std::size_t bytes_ = 0;
};

// The place of one resident block; kept for the next launches.
struct Slot {
  Block block;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<GuardedMemory> stacks;
  GuardedMemory shared;
};

enum class Order { forward, reverse, random, pct, none };

struct Machine {
  const Launch* launch = nullptr;
  std::string name;  // of the kernel
  Order order = Order::forward;
  std::uint64_t seed = 0, state = 0;  // of the random numbers

  Fiber main;  // whoever called run()
  std::vector<std::unique_ptr<Slot>> slots;
  int resident = 0;              // slots in use
  std::vector<Warp*> warps;      // of the resident blocks, by place
  std::vector<std::uint64_t> ready;  // a bit for each place: a lane of that warp can run
  std::vector<Fiber*> spinners;
  long running = 0;   // fibers that have not left
  long progress = 0;  // counts all that happens but spinning
  long spun_at = 0;   // progress when the spinners ran last
  int fruitless = 0;  // rounds of the spinners alone

  std::exception_ptr error;
  bool starved = false;  // only spinners are left

  char begun, ended;  // for ThreadSanitizer: what came before all threads, what all threads have done

  std::uint64_t random();
  ~Machine();
};

extern Machine machine MK_SIMT_HIDDEN;

constexpr std::size_t kMostShared = 227 * 1024;  // bytes of a block on Hopper and Blackwell
constexpr unsigned char kPoison = 0xFF;  // NaN in each floating point type, -1 in integers

// Prepares a fiber that runs the kernel's body when it is switched to.
void prepare(Fiber& fiber, const GuardedMemory& stack, int index);
// Runs fibers until all have left, one has failed, or only spinners are left.
void run_fibers();
// From the handler of a fault in a fiber: back to run_fibers' caller. The fiber does not go on.
[[noreturn]] void abandon();
// Runs one asynchronous operation that is under way; false if there is none.
bool complete_one();
// At the end of a thread, of a block: fails if it leaves behind work that is under way.
void end_thread(Fiber& fiber);
void end_block(Block& block);
// After the last block: what nobody has waited for is in global memory now.
void end_launch();
// At a meeting of threads: carries out the proxy fences of those that have come.
void settle_fences(Block& block);
// The mbarriers at which threads wait, one a line.
std::string describe_barriers(const Block& block);
// Forgets the asynchronous work of blocks that are no more.
void forget_async();
// A cluster for the blocks that are admitted next.
ClusterState* new_cluster();
void join_cluster(ClusterState* cluster, Block& block);

}  // namespace megakern::simt
