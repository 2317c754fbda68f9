// Where asynchronous state lives, barriers in shared memory (mbarrier), proxy fences, clusters, and the checks at the end
// of threads and blocks.
#include "simt/async.h"
#include "simt/sanitizers.h"

#include <cstring>

#include "device/ptx.cuh"

namespace megakern::simt {

InFlight in_flight;

static std::deque<ThreadAsync> thread_states;
static std::deque<WarpAsync> warp_states;
static std::deque<BlockAsync> block_states;
static std::deque<ClusterState> cluster_states;
static std::vector<GuardedMemory> shadows;  // kept for the next launch

ThreadAsync& async_of(Fiber& fiber) {
  if (!fiber.async) {
    const Hardware working;  // the list may move
    fiber.async = &thread_states.emplace_back();
  }
  return *fiber.async;
}

WarpAsync& async_of(Warp& warp) {
  if (!warp.async) {
    const Hardware working;  // the list may move
    warp.async = &warp_states.emplace_back();
  }
  return *warp.async;
}

BlockAsync& async_of(Block& block) {
  if (block.async) return *block.async;
  const Hardware working;
  block.async = &block_states.emplace_back();
  const std::size_t bytes = std::size_t(block.shared_end - block.shared);
  if (!shadows.empty()) {
    block.async->shadow = std::move(shadows.back());
    shadows.pop_back();
  } else {
    block.async->shadow = GuardedMemory(kMostShared);
  }
  std::memset(block.async->shadow.begin(), kPoison, bytes);
  return *block.async;
}

void forget_async() {
  in_flight.loads.clear();
  in_flight.arrivals.clear();
  thread_states.clear();
  warp_states.clear();
  for (BlockAsync& block : block_states) shadows.push_back(std::move(block.shadow));
  block_states.clear();
  cluster_states.clear();
}

ClusterState* new_cluster() { return &cluster_states.emplace_back(); }

void join_cluster(ClusterState* cluster, Block& block) {
  cluster->blocks.push_back(&block);
  block.cluster = cluster;
}

// --- the two views of shared memory ---

unsigned char* shadow_of(Block& block, const unsigned char* p) {
  return async_of(block).shadow.begin() + (p - block.shared);
}

const unsigned char* shown(Block& block, const unsigned char* p, Site site) {
  const unsigned char* seen = shadow_of(block, p);
  if (std::memcmp(seen, p, 16) == 0) return seen;
  fail("reads shared memory that a thread has written without fence_async, or writes over while it is being read", site);
}

void fence_async() {
  const Hardware working;
  async_of(*self->block).fence_pending = true;
}

void settle_fences(Block& block) {
  const Hardware working;
  if (!block.async || !block.async->fence_pending) return;
  block.async->fence_pending = false;
  std::memcpy(block.async->shadow.begin(), block.shared, std::size_t(block.shared_end - block.shared));
}

std::uint32_t shared_address(const void* p) {
  const std::ptrdiff_t offset = static_cast<const unsigned char*>(p) - self->block->shared;
  if (offset < 0 || offset > self->block->shared_end - self->block->shared) fail("a pointer that is not to shared memory", {});
  return kSharedStart + std::uint32_t(offset);
}

// --- mbarrier ---

constexpr std::uint64_t kMark = 0x6D62617272696572;  // in the barrier's own bytes, with its number
constexpr int kMostCount = (1 << 20) - 1;

static std::string named(const MBarrierState& b) { return std::string("mbarrier '") + b.name + "'"; }

MBarrierState& barrier_at(Block& block, const void* address, Site site) {
  const auto* p = static_cast<const unsigned char*>(address);
  if (p < block.shared || p + 8 > block.shared_end) fail("an mbarrier that is not in shared memory", site);
  std::uint64_t bits;
  std::memcpy(&bits, p, sizeof bits);
  auto& barriers = async_of(block).barriers;
  const std::uint64_t index = bits ^ kMark;
  if (index < barriers.size() && barriers[index].address == address) return barriers[index];
  for (const MBarrierState& b : barriers) {
    if (b.address == address) fail(named(b) + " has been written over", site);
  }
  fail("an mbarrier that was not initialised", site);
}

void mbar_init(MBarrier* b, int arrivals, const char* name, Site site) {
  const Hardware working;
  Block& block = *self->block;
  const auto* p = reinterpret_cast<const unsigned char*>(b);
  if (p < block.shared || p + 8 > block.shared_end || reinterpret_cast<std::uintptr_t>(p) % 8) {
    fail(std::string("mbarrier '") + name + "' must lie in shared memory, on a multiple of 8 bytes", site);
  }
  if (arrivals < 1 || arrivals > kMostCount) {
    fail(std::string("mbarrier '") + name + "' wants 1 to 2^20 - 1 arrivals, got " + std::to_string(arrivals), site);
  }
  auto& barriers = async_of(block).barriers;
  for (const MBarrierState& other : barriers) {
    if (other.address == b) fail(named(other) + " is initialised a second time, as '" + name + "'", site);
  }
  b->bits = kMark ^ barriers.size();
  barriers.push_back({b, name, arrivals, arrivals, 0, 0, false, {}, {}});
}

void mbar_init_fence() {
  const Hardware working;
  for (MBarrierState& b : async_of(*self->block).barriers) b.fenced = true;
}

static void advance(MBarrierState& b) {
  if (b.missing || b.bytes) return;
  b.missing = b.count;
  ++b.phase;
  for (Fiber* fiber : b.waiting) wake(fiber);
  b.waiting.clear();
  ++machine.progress;
}

void arrive(MBarrierState& b, Site site) {
  release_to(b.token + b.phase % 2);
  if (b.missing == 0) {
    fail(named(b) + ": more than its " + std::to_string(b.count) + " arrivals in phase " + std::to_string(b.phase), site);
  }
  --b.missing;
  advance(b);
}

void complete_bytes(MBarrierState& b, long bytes) {
  b.bytes -= bytes;
  advance(b);
}

void mbar_arrive(MBarrier* address, int rank, Site site) {
  Block* block = self->block;
  const bool elsewhere = rank >= 0 && rank != block->rank;
  for (Block* each : block->cluster->blocks) settle_fences(*each);
  if (elsewhere) {
    address = static_cast<MBarrier*>(cluster_shared(address, rank, site));
    block = block->cluster->blocks[rank];
  }
  MBarrierState& b = barrier_at(*block, address, site);
  if (elsewhere && !b.fenced) fail(named(b) + " is used by the cluster before mbar_init_fence", site);
  arrive(b, site);
  breathe();
}

void mbar_expect(MBarrier* address, int bytes, Site site) {
  MBarrierState& b = barrier_at(*self->block, address, site);
  if (bytes < 0 || b.bytes + bytes > kMostCount) {
    fail(named(b) + " can expect at most 2^20 - 1 bytes, got " + std::to_string(b.bytes + bytes), site);
  }
  b.bytes += bytes;
  arrive(b, site);
  breathe();
}

static bool passes(const MBarrierState& b, int parity) { return (b.phase & 1) != parity; }

static void check_parity(int parity, Site site) {
  if (parity != 0 && parity != 1) fail("the parity of a phase is 0 or 1, got " + std::to_string(parity), site);
}

static void enlist(std::vector<Fiber*>& waiting) {
  const Hardware working;
  waiting.push_back(self);
}

bool mbar_try_wait(MBarrier* address, int parity, Site site) {
  check_parity(parity, site);
  MBarrierState& b = barrier_at(*self->block, address, site);
  if (!passes(b, parity)) spin(site);
  acquire_from(b.token + parity);
  return passes(b, parity);
}

void mbar_wait(MBarrier* address, int parity, Site site) {
  check_parity(parity, site);
  MBarrierState& b = barrier_at(*self->block, address, site);
  while (!passes(b, parity)) {
    enlist(b.waiting);
    wait("mbarrier", b.name, b.phase, site);
  }
  acquire_from(b.token + parity);
}

std::string describe_barriers(const Block& block) {
  std::string text;
  if (!block.async) return text;
  for (const MBarrierState& b : block.async->barriers) {
    if (b.waiting.empty()) continue;
    text += "\n  " + named(b) + " of block rank " + std::to_string(block.rank) + ", phase " + std::to_string(b.phase) + ": " +
            std::to_string(b.missing) + " of " + std::to_string(b.count) + " arrivals and " + std::to_string(b.bytes) +
            " bytes have yet to come";
  }
  return text;
}

// --- clusters ---

int cluster_rank() { return self->block->rank; }

void* cluster_shared(void* place, int rank, Site site) {
  const Block& mine = *self->block;
  const auto& blocks = mine.cluster->blocks;
  if (rank < 0 || rank >= int(blocks.size())) {
    fail("use of block " + std::to_string(rank) + " of a cluster of " + std::to_string(blocks.size()), site);
  }
  const Block& there = *blocks[rank];
  if (there.left == there.threads) fail("use of a block of the cluster that has left the kernel", site);
  return there.shared + (static_cast<unsigned char*>(place) - mine.shared);
}

void cluster_arrive(Site site) {
  ClusterState& cluster = *self->block->cluster;
  ThreadAsync& mine = async_of(*self);
  if (mine.cluster_phase == cluster.phase) fail("a second cluster_arrive without cluster_wait", site);
  mine.cluster_phase = cluster.phase;
  release_to(cluster.token + cluster.phase % 2);
  int threads = 0;
  for (const Block* block : cluster.blocks) {
    if (block->left) fail("cluster_arrive after threads of the cluster have left the kernel", site);
    threads += block->threads;
  }
  if (++cluster.arrived < threads) return;
  cluster.arrived = 0;
  ++cluster.phase;
  for (Block* block : cluster.blocks) settle_fences(*block);
  for (Fiber* fiber : cluster.waiting) wake(fiber);
  cluster.waiting.clear();
  ++machine.progress;
}

void cluster_wait(Site site) {
  ClusterState& cluster = *self->block->cluster;
  const long phase = async_of(*self).cluster_phase;
  if (phase < 0) fail("cluster_wait without cluster_arrive", site);
  if (cluster.phase == phase) {
    enlist(cluster.waiting);
    wait("cluster barrier", "", -1, site);
  }
  acquire_from(cluster.token + phase % 2);
}

// --- progress and ends ---

bool complete_one() {
  const Hardware working;
  const std::size_t loads = in_flight.loads.size(), all = loads + in_flight.arrivals.size();
  if (all == 0) return false;
  const std::size_t i = machine.order == Order::forward ? 0 : machine.order == Order::reverse ? all - 1 : machine.random() % all;
  if (i < loads) {
    Copy copy = std::move(in_flight.loads[i]);
    in_flight.loads.erase(in_flight.loads.begin() + std::ptrdiff_t(i));
    complete(copy);
  } else {
    const SmallArrival arrival = in_flight.arrivals[i - loads];
    in_flight.arrivals.erase(in_flight.arrivals.begin() + std::ptrdiff_t(i - loads));
    finish_small(*arrival.thread, arrival.limit);
    arrive(*arrival.barrier, arrival.site);
  }
  return true;
}

void end_thread(Fiber& fiber) {
  const Hardware working;
  if (fiber.async) end_copies(*fiber.async);
}

void end_block(Block& block) {
  const Hardware working;
  for (int w = 0; w < block.warps; ++w) {
    if (block.first_warp[w].async) end_products(block.first_warp[w]);
  }
  for (int w = 0; w < block.warps; w += 4) {  // wgmma is an instruction of four warps
    const auto issued = [&](int i) { return i < block.warps && block.first_warp[i].async ? block.first_warp[i].async->issued : 0; };
    for (int i = w + 1; i < w + 4; ++i) {
      if (issued(i) != issued(w)) {
        fail("warps " + std::to_string(w) + " and " + std::to_string(i) + " of a warpgroup ran " + std::to_string(issued(w)) +
                 " and " + std::to_string(issued(i)) + " wgmma", {});
      }
    }
  }
  for (int id = 0; id < Block::kBarriers; ++id) {
    const Barrier& b = block.barrier[id];
    if (b.arrived == 0) continue;
    fail("the block leaves while named barrier " + std::to_string(id) + " has " + std::to_string(b.arrived) + " of its " +
             std::to_string(b.wanted) + " arrivals", b.site);
  }
  if (!block.async) return;
  for (const Copy& copy : in_flight.loads) {
    if (copy.block == &block) fail("the block leaves while a copy to its shared memory is under way", copy.site);
  }
  for (const MBarrierState& b : block.async->barriers) {
    if (b.bytes) fail("the block leaves while " + named(b) + " expects " + std::to_string(b.bytes) + " more bytes", {});
  }
}

}  // namespace megakern::simt
