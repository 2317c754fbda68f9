// Launches: blocks get memory and fibers, run, and are checked for what they leave behind.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <numeric>

#include "device/platform.cuh"
#include "simt/async.h"
#include "simt/sanitizers.h"
#include "simt/simt.h"

namespace megakern::simt {

// --- memory ---

static const std::size_t kPage = std::size_t(sysconf(_SC_PAGESIZE));

GuardedMemory::GuardedMemory(std::size_t bytes) : bytes_((bytes + kPage - 1) / kPage * kPage) {
  void* all = mmap(nullptr, bytes_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (all == MAP_FAILED || mprotect(static_cast<unsigned char*>(all) + kPage, bytes_, PROT_READ | PROT_WRITE) != 0) {
    throw std::runtime_error("simt: no memory for the stacks of a block");
  }
  begin_ = static_cast<unsigned char*>(all) + kPage;
}

GuardedMemory::GuardedMemory(GuardedMemory&& other) noexcept : begin_(other.begin_), bytes_(other.bytes_) {
  other.begin_ = nullptr;
}

GuardedMemory& GuardedMemory::operator=(GuardedMemory&& other) noexcept {
  std::swap(begin_, other.begin_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

GuardedMemory::~GuardedMemory() {
  if (begin_) munmap(begin_ - kPage, bytes_ + 2 * kPage);
}

bool GuardedMemory::guards(const void* address) const {
  const auto* p = static_cast<const unsigned char*>(address);
  return begin_ && ((p >= begin_ - kPage && p < begin_) || (p >= end() && p < end() + kPage));
}

// --- errors ---

static std::string triple(dim3 d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

static std::string at(Site site) {
  return site.line ? std::string(", ") + site.file + ":" + std::to_string(site.line) : "";
}

void fail(const std::string& message, Site site) {
  std::string where = self == &machine.main ? "" : ", block " + triple(self->block->index) + " thread " + triple(self->thread);
  throw std::runtime_error(machine.name + where + at(site) + ": " + message);
}

void check_shared_end(const unsigned char* end) {
  if (end <= self->block->shared_end) return;
  fail("the kernel takes " + std::to_string(end - self->block->shared) + " bytes of shared memory, the launch gave " +
           std::to_string(self->block->shared_end - self->block->shared), {});
}

void check_global(const void* address) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (p < self->block->shared || p >= self->block->shared_end) return;
  fail("an instruction for global memory at an address in shared memory; load and store_shared are for both", {});
}

// Who waits for what: "128 threads wait for mbarrier 'full' phase 1 (x.cu:40), first block (0, 0, 0) thread (0, 0, 0)".
static std::string waiters() {
  struct Group {
    int count;
    const Fiber* first;
  };
  std::map<std::string, Group> groups;
  for (int i = 0; i < machine.resident; ++i) {
    for (const Fiber& fiber : machine.slots[i]->fibers) {
      if (&fiber - fiber.block->fibers >= fiber.block->threads || !fiber.waits) continue;
      std::string text = fiber.waits;
      if (*fiber.what) text += std::string(" '") + fiber.what + "' phase";
      if (fiber.detail >= 0) text += " " + std::to_string(fiber.detail);
      ++groups.insert({text + at(fiber.site), {0, &fiber}}).first->second.count;
    }
  }
  std::string all;
  for (const auto& [text, group] : groups) {
    all += "\n  " + std::to_string(group.count) + " threads wait at " + text + "; the first is block " +
           triple(group.first->block->index) + " thread " + triple(group.first->thread);
  }
  for (int i = 0; i < machine.resident; ++i) all += describe_barriers(machine.slots[i]->block);
  return all;
}

// A step into an unmapped page: back to run(), which throws. Other faults go to whoever handled them before.
static struct sigaction previous_handler;
static const char* fault = nullptr;

static void on_fault(int, siginfo_t* info, void*) {
  if (self != &machine.main) {
    for (int i = 0; i < machine.resident; ++i) {
      const Slot& slot = *machine.slots[i];
      if (slot.shared.guards(info->si_addr)) fault = "access outside of shared memory";
      for (const GuardedMemory& stack : slot.stacks) {
        if (stack.guards(info->si_addr)) fault = "the thread's stack is full: its local arrays are too large for the emulator";
      }
    }
    if (fault) abandon();
  }
  sigaction(SIGSEGV, &previous_handler, nullptr);  // the instruction runs again, and faults again
}

class FaultHandler {
 public:
  FaultHandler() {
    static std::vector<unsigned char> stack(64 * 1024);
    stack_t mine = {};
    mine.ss_sp = stack.data();
    mine.ss_size = stack.size();
    sigaltstack(&mine, &previous_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigemptyset(&action.sa_mask);
    sigaction(SIGSEGV, &action, &previous_handler);
    fault = nullptr;
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &previous_handler, nullptr);
    if (!(previous_stack_.ss_flags & SS_DISABLE) || previous_stack_.ss_sp == nullptr) sigaltstack(&previous_stack_, nullptr);
  }

 private:
  stack_t previous_stack_ = {};
};

// --- blocks ---

// The number of bytes after the end of shared memory, up to its guard page: less than 1024.
static void place_shared(Slot& slot, std::size_t bytes) {
  if (!slot.shared.begin()) slot.shared = GuardedMemory(kMostShared + 4096);
  std::uintptr_t start = reinterpret_cast<std::uintptr_t>(slot.shared.end()) - bytes;
  start -= (start - kSharedStart) % 1024;
  slot.block.shared = reinterpret_cast<unsigned char*>(start);
  slot.block.shared_end = slot.block.shared + bytes;
  std::memset(slot.block.shared - 64, kPoison, std::size_t(slot.shared.end() - slot.block.shared) + 64);
}

static void check_shared(const Slot& slot) {
  const auto touched = [](const unsigned char* from, const unsigned char* to) {
    return std::any_of(from, to, [](unsigned char byte) { return byte != kPoison; });
  };
  if (touched(slot.block.shared - 64, slot.block.shared)) fail("the kernel wrote before the start of shared memory", {});
  if (touched(slot.block.shared_end, slot.shared.end())) fail("the kernel wrote behind the end of shared memory", {});
}

static void admit(dim3 index, int rank, ClusterState* cluster) {
  const Launch& launch = *machine.launch;
  if (machine.resident == int(machine.slots.size())) machine.slots.push_back(std::make_unique<Slot>());
  Slot& slot = *machine.slots[machine.resident++];
  const int threads = int(launch.block.x * launch.block.y * launch.block.z), warps = (threads + 31) / 32;
  while (int(slot.stacks.size()) < threads) slot.stacks.emplace_back(kStack);
  slot.fibers.resize(std::max<std::size_t>(slot.fibers.size(), threads));
  slot.warps.resize(std::max<std::size_t>(slot.warps.size(), warps));
  Block& block = slot.block;
  block = Block{};
  block.index = index;
  block.dim = launch.block;
  block.grid = launch.grid;
  block.threads = threads;
  block.warps = warps;
  block.rank = rank;
  block.fibers = slot.fibers.data();
  block.first_warp = slot.warps.data();
  place_shared(slot, launch.shared);
  join_cluster(cluster, block);
  for (int w = 0; w < warps; ++w) {
    Warp& warp = slot.warps[w];
    warp.block = &block;
    warp.index = w;
    warp.place = int(machine.warps.size());
    warp.priority = int(machine.random() >> 34);
    const int lanes = std::min(32, threads - 32 * w);
    warp.exists = warp.ready = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warp.left = warp.arrived = 0;
    warp.meetings = 0;
    warp.async = nullptr;
    machine.warps.push_back(&warp);
    machine.ready.resize((machine.warps.size() + 63) / 64);
    machine.ready[warp.place / 64] |= std::uint64_t(1) << warp.place % 64;
  }
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = slot.fibers[t];
    void* sanitizer = fiber.sanitizer;
    fiber = Fiber{};
    fiber.sanitizer = sanitizer;
    fiber.thread = dim3(t % block.dim.x, t / block.dim.x % block.dim.y, t / (block.dim.x * block.dim.y));
    fiber.lane = t % 32;
    fiber.warp = &slot.warps[t / 32];
    fiber.block = &block;
    prepare(fiber, slot.stacks[t], t);
  }
  machine.running += threads;
}

static void release_all() {
  machine.resident = 0;
  machine.warps.clear();
  machine.ready.clear();
  machine.spinners.clear();
  machine.running = 0;
  machine.error = nullptr;
  forget_async();
  self = &machine.main;
}

static std::vector<long> cluster_order(long clusters) {
  std::vector<long> order(clusters);
  std::iota(order.begin(), order.end(), 0);
  if (machine.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (machine.order == Order::random) {
    for (long i = clusters - 1; i > 0; --i) std::swap(order[i], order[machine.random() % std::uint64_t(i + 1)]);
  }
  return order;
}

static void check(const Launch& launch) {
  const std::uint64_t threads = std::uint64_t(launch.block.x) * launch.block.y * launch.block.z;
  const std::string shape = launch_shape(launch.grid, launch.block, launch.shared);
  const auto refuse = [&](const std::string& reason) {
    throw std::runtime_error("launch of " + machine.name + " " + shape + " failed: " + reason);
  };
  if (launch.device != -1) refuse("simt runs on the CPU, device -1; got device " + std::to_string(launch.device));
  if (threads == 0 || threads > 1024) refuse("a block has 1 to 1024 threads");
  if (launch.grid.x > 0x7FFFFFFFu || launch.grid.y > 65535 || launch.grid.z > 65535) {
    refuse("a grid has at most 2^31 - 1 blocks along x, 65535 along y and z");
  }
  if (launch.shared > kMostShared) refuse("a block has at most " + std::to_string(kMostShared) + " bytes of shared memory");
  if (launch.cluster == 0 || launch.cluster > 8 || launch.grid.x % launch.cluster) {
    refuse("a cluster has 1 to 8 blocks and divides the grid along x; got " + std::to_string(launch.cluster));
  }
}

void run(const Launch& launch) {
  if (launch.grid.x == 0 || launch.grid.y == 0 || launch.grid.z == 0) return;
  static std::mutex turn;
  const std::lock_guard<std::mutex> lock(turn);
  if (machine.order == Order::none) return;
  machine.name = launch_name(launch.text);
  check(launch);
  machine.launch = &launch;
  machine.state = machine.seed;
  release_all();
  const FaultHandler handler;
  struct Clean {
    ~Clean() {
      release_all();
      in_flight.writes.clear();
    }
  } clean;
  const long across = launch.grid.x / launch.cluster, clusters = across * launch.grid.y * launch.grid.z;
  for (const long cluster : cluster_order(clusters)) {
    ClusterState* together = new_cluster();
    for (unsigned rank = 0; rank < launch.cluster; ++rank) {
      admit(dim3(unsigned(cluster % across) * launch.cluster + rank, unsigned(cluster / across % launch.grid.y),
                 unsigned(cluster / across / launch.grid.y)), int(rank), together);
    }
    run_fibers();
    self = &machine.main;
    if (fault) throw std::runtime_error(machine.name + ": " + fault);
    if (machine.error) std::rethrow_exception(machine.error);
    if (machine.starved) {  // they wait for the memory of a block that does not run yet
      // A GPU starts blocks in this order, and a later one perhaps not before the earlier have left.
      if (machine.order == Order::forward) fail("deadlock, a block waits for memory that no earlier block changes:" + waiters(), {});
      continue;
    }
    if (machine.running) fail("deadlock, nobody can go on:" + waiters(), {});
    for (int i = 0; i < machine.resident; ++i) check_shared(*machine.slots[i]);
    release_all();
  }
  if (machine.running) fail("deadlock, no block is left that could change the memory they wait for:" + waiters(), {});
  end_launch();
}

void set_schedule(const std::string& schedule) {
  static const std::map<std::string, Order> orders = {
      {"forward", Order::forward}, {"reverse", Order::reverse}, {"random", Order::random}, {"pct", Order::pct},
      {"none", Order::none}};
  const std::size_t colon = std::min(schedule.find(':'), schedule.size());
  const auto order = orders.find(schedule.substr(0, colon));
  const std::string seed = colon < schedule.size() ? schedule.substr(colon + 1) : "0";
  if (order == orders.end() || seed.empty() || seed.find_first_not_of("0123456789") != std::string::npos) {
    throw std::invalid_argument("schedule must be forward, reverse, random:SEED, pct:SEED or none, got '" + schedule + "'");
  }
  machine.order = order->second;
  machine.seed = std::stoull(seed);
}

std::string schedule() {
  static const char* const names[] = {"forward", "reverse", "random:", "pct:", "none"};
  const bool seeded = machine.order == Order::random || machine.order == Order::pct;
  return names[int(machine.order)] + (seeded ? std::to_string(machine.seed) : "");
}

}  // namespace megakern::simt
