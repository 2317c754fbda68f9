// Copies: boxes and rows by TMA, cp.async of single threads.
#include <algorithm>
#include <cstring>

#include "device/ptx.cuh"
#include "simt/async.h"
#include "simt/sanitizers.h"

namespace megakern::simt {

// --- boxes ---

// f(offset in the box, address in global memory or nullptr, bytes of the row that are inside, bytes before them) for
// each row of the box.
template <class F>
static void for_rows(const Copy& copy, F f) {
  const TensorMap& map = copy.map;
  if (map.rank == 0) return f(0, copy.global, copy.bytes, 0);
  std::int64_t rows = 1;
  for (int i = 1; i < map.rank; ++i) rows *= map.box[i];
  const std::int64_t width = std::int64_t(map.box[0]) * map.element;
  const std::int64_t first = std::max<std::int64_t>(0, -std::int64_t(copy.at[0]));
  const std::int64_t last = std::min<std::int64_t>(map.box[0], std::int64_t(map.size[0]) - copy.at[0]);
  for (std::int64_t row = 0; row < rows; ++row) {
    std::int64_t rest = row;
    bool inside = first < last;
    unsigned char* address = map.base + (copy.at[0] + first) * map.element;
    for (int i = 1; i < map.rank; ++i) {
      const std::int64_t at = copy.at[i] + rest % map.box[i];
      rest /= map.box[i];
      inside = inside && at >= 0 && at < std::int64_t(map.size[i]);
      address += at * std::int64_t(map.stride[i]);
    }
    f(row * width, inside ? address : nullptr, inside ? (last - first) * map.element : 0, first * map.element);
  }
}

// Where 16 bytes of the box lie: bits 4 to 6 of the address take bits 7 to 9 (xor), as on the hardware.
static unsigned char* swizzled(const Copy& copy, std::int64_t offset) {
  auto address = reinterpret_cast<std::uintptr_t>(copy.shared + offset);
  if (copy.map.rank && copy.map.swizzle == Swizzle::b128) address ^= (address >> 7 & 7) << 4;
  return reinterpret_cast<unsigned char*>(address);
}

static void check_shared_range(const unsigned char* p, std::int64_t bytes, int align, const char* what, Site site) {
  const Block& block = *self->block;
  if (p < block.shared || p + bytes > block.shared_end) {
    fail(std::string(what) + ": its " + std::to_string(bytes) + " bytes at " + std::to_string(p - block.shared) +
             " are outside of the " + std::to_string(block.shared_end - block.shared) + " bytes of shared memory", site);
  }
  if ((kSharedStart + (p - block.shared)) % align) {
    fail(std::string(what) + ": its address in shared memory must be a multiple of " + std::to_string(align), site);
  }
}

static Copy box(CopyKind kind, const TensorMap* map, const void* shared, const int* at, int rank, const char* what, Site site) {
  Copy copy = {};
  copy.kind = kind;
  copy.map = *map;  // now: the parameter may be gone when the copy runs
  if (map->rank != rank) {
    fail(std::string(what) + " of " + std::to_string(rank) + " dimensions with a map of " + std::to_string(map->rank), site);
  }
  std::copy(at, at + rank, copy.at);
  copy.shared = static_cast<unsigned char*>(const_cast<void*>(shared));
  copy.bytes = map->box_bytes();
  copy.block = self->block;
  copy.site = site;
  check_shared_range(copy.shared, copy.bytes, 128, what, site);
  return copy;
}

static Copy row(CopyKind kind, const void* global, const void* shared, int bytes, const char* what, Site site) {
  Copy copy = {};
  copy.kind = kind;
  copy.map.dtype = Dtype::f32;
  copy.global = static_cast<unsigned char*>(const_cast<void*>(global));
  copy.shared = static_cast<unsigned char*>(const_cast<void*>(shared));
  copy.bytes = bytes;
  copy.block = self->block;
  copy.site = site;
  if (bytes <= 0 || bytes % 16 || reinterpret_cast<std::uintptr_t>(global) % 16) {
    fail(std::string(what) + ": size and address in global memory must be multiples of 16, got " + std::to_string(bytes) +
             " bytes", site);
  }
  check_shared_range(copy.shared, bytes, 16, what, site);
  return copy;
}

// --- loads ---

// The target holds poison until the copy completes.
static void start_load(Copy copy, MBarrier* b, int blocks) {
  const Hardware working;
  Block& mine = *self->block;
  const std::ptrdiff_t to = copy.shared - mine.shared, barrier = reinterpret_cast<unsigned char*>(b) - mine.shared;
  const auto& cluster = mine.cluster->blocks;
  if (blocks < 0 || blocks >> cluster.size()) fail("multicast to blocks that the cluster does not have", copy.site);
  for (std::size_t rank = 0; rank < cluster.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    Block& target = *cluster[rank];
    if (target.left == target.threads) fail("multicast to a block of the cluster that has left the kernel", copy.site);
    copy.block = &target;
    copy.shared = target.shared + to;
    copy.barrier = &barrier_at(target, target.shared + barrier, copy.site);
    if (!copy.barrier->fenced) {
      fail(std::string("mbarrier '") + copy.barrier->name + "' is used by a copy before mbar_init_fence", copy.site);
    }
    std::memset(copy.shared, kPoison, std::size_t(copy.bytes));
    std::memset(shadow_of(target, copy.shared), kPoison, std::size_t(copy.bytes));
    in_flight.loads.push_back(copy);
  }
}

void tma_load(void* to, const TensorMap* map, MBarrier* b, const int* at, int rank, int blocks, Site site) {
  start_load(box(CopyKind::load, map, to, at, rank, "tma_load", site), b, blocks ? blocks : 1 << self->block->rank);
}

void bulk_load(void* to, const void* from, MBarrier* b, int bytes, Site site) {
  start_load(row(CopyKind::load, from, to, bytes, "bulk_load", site), b, 1 << self->block->rank);
}

static void put(const Copy& copy, std::int64_t offset, const unsigned char* from) {
  unsigned char* to = swizzled(copy, offset);
  std::memcpy(to, from, 16);
  std::memcpy(shadow_of(*copy.block, to), from, 16);
}

void complete(Copy& copy) {
  std::vector<unsigned char> line(std::size_t(copy.map.rank ? copy.map.box[0] * copy.map.element : copy.bytes));
  for_rows(copy, [&](std::int64_t offset, const unsigned char* from, std::int64_t bytes, std::int64_t before) {
    std::fill(line.begin(), line.end(), 0);
    if (from) std::memcpy(line.data() + before, from, std::size_t(bytes));
    for (std::size_t i = 0; i < line.size(); i += 16) put(copy, offset + std::int64_t(i), line.data() + i);
  });
  complete_bytes(*copy.barrier, copy.bytes);
}

// --- stores ---

static void start_store(Copy copy) {
  const Hardware working;
  settle_fences(*self->block);
  async_of(*self).stores.push_back(std::move(copy));
}

// Where a load may start, a store may not: on sm_90 it ends with an illegal instruction.
static void check_store_start(const TensorMap& map, const int* at, int rank, const char* what, Site site) {
  if (std::int64_t(at[0]) * map.element % 16) {
    fail(std::string(what) + ": its innermost coordinate must be on a multiple of 16 bytes, got " + std::to_string(at[0]) +
             " elements of " + std::to_string(map.element) + "; only a load may start between them", site);
  }
  for (int i = 0; i < rank; ++i) {
    if (at[i] >= 0) continue;
    fail(std::string(what) + ": coordinate " + std::to_string(i) + " must not be negative, got " + std::to_string(at[i]) +
             "; only a load may start before the tensor", site);
  }
}

void tma_store(const TensorMap* map, const void* from, const int* at, int rank, bool add, Site site) {
  const char* what = add ? "tma_add" : "tma_store";
  Copy copy = box(add ? CopyKind::add : CopyKind::store, map, from, at, rank, what, site);
  check_store_start(*map, at, rank, what, site);
  start_store(std::move(copy));
}

void bulk_store(void* to, const void* from, int bytes, bool add, Site site) {
  start_store(row(add ? CopyKind::add : CopyKind::store, to, from, bytes, add ? "bulk_add" : "bulk_store", site));
}

void tma_commit() {
  const Hardware working;
  ThreadAsync& mine = async_of(*self);
  mine.store_groups.push_back(std::move(mine.stores));
  mine.stores.clear();
}

// The source is read as late as here, from what the copy engine sees of shared memory.
static void read_source(Copy& copy) {
  if (copy.was_read) return;
  copy.was_read = true;
  copy.read.resize(std::size_t(copy.bytes));
  for (std::int64_t i = 0; i < copy.bytes; i += 16) {
    std::memcpy(copy.read.data() + i, shown(*copy.block, swizzled(copy, i), copy.site), 16);
  }
}

template <class T>
static void add(unsigned char* to, const unsigned char* from, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; i += std::int64_t(sizeof(T))) {
    T a, b;
    std::memcpy(&a, to + i, sizeof a);
    std::memcpy(&b, from + i, sizeof b);
    a = from_float<T>(to_float(a) + to_float(b));
    std::memcpy(to + i, &a, sizeof a);
  }
}

static void write_target(const Copy& copy) {
  for_rows(copy, [&](std::int64_t offset, unsigned char* to, std::int64_t bytes, std::int64_t before) {
    const unsigned char* from = copy.read.data() + offset + before;
    if (!to) return;
    if (copy.kind == CopyKind::store) std::memcpy(to, from, std::size_t(bytes));
    else if (copy.map.dtype == Dtype::f32) add<float>(to, from, bytes);
    else if (copy.map.dtype == Dtype::bf16) add<bf16>(to, from, bytes);
    else add<fp16>(to, from, bytes);
  });
}

// Nothing but a wait between them orders stores: they take the order of the schedule.
template <class Copies>
static void write_targets(Copies& copies) {
  if (machine.order == Order::reverse) std::reverse(copies.begin(), copies.end());
  for (std::size_t i = 0; i < copies.size(); ++i) {
    if (machine.order == Order::random || machine.order == Order::pct) {
      std::swap(copies[i], copies[i + machine.random() % (copies.size() - i)]);
    }
    write_target(copies[i]);
  }
  copies.clear();
}

void tma_wait(int pending, bool read_only) {
  const Hardware working;
  ThreadAsync& mine = async_of(*self);
  auto& groups = mine.store_groups;
  const int ready = int(groups.size()) - pending;
  for (int i = 0; i < ready; ++i) {
    for (Copy& copy : groups[std::size_t(i)]) read_source(copy);
  }
  if (read_only) return;
  std::vector<Copy> done;
  for (int i = 0; i < ready; ++i) {
    std::move(groups.front().begin(), groups.front().end(), std::back_inserter(done));
    groups.pop_front();
  }
  write_targets(done);
}

void end_launch() {
  const Hardware working;
  write_targets(in_flight.writes);
}

// --- cp.async ---

void cp_async(void* to, const void* from, int bytes, int valid, Site site) {
  written(to, std::size_t(bytes));
  const Hardware working;
  if (valid < 0 || valid > bytes) fail("cp_async reads 0 to " + std::to_string(bytes) + " bytes, got " + std::to_string(valid), site);
  auto* target = static_cast<unsigned char*>(to);
  check_shared_range(target, bytes, bytes, "cp_async", site);
  if (reinterpret_cast<std::uintptr_t>(from) % std::uintptr_t(bytes)) {
    fail("cp_async: its address in global memory must be a multiple of " + std::to_string(bytes), site);
  }
  std::memset(target, kPoison, std::size_t(bytes));
  ThreadAsync& mine = async_of(*self);
  mine.small.push_back({target, static_cast<const unsigned char*>(from), bytes, valid, mine.small_count++, false});
}

static void run_small(SmallCopy& copy) {
  if (copy.done) return;
  copy.done = true;
  std::memset(copy.to, 0, std::size_t(copy.bytes));
  if (copy.valid) std::memcpy(copy.to, copy.from, std::size_t(copy.valid));
}

void cp_async_commit() {
  const Hardware working;
  ThreadAsync& mine = async_of(*self);
  mine.small_groups.push_back(std::move(mine.small));
  mine.small.clear();
}

void cp_async_wait(int pending) {
  const Hardware working;
  auto& groups = async_of(*self).small_groups;
  while (int(groups.size()) > pending) {
    for (SmallCopy& copy : groups.front()) run_small(copy);
    groups.pop_front();
  }
}

void cp_async_arrive(MBarrier* b, Site site) {
  const Hardware working;
  ThreadAsync& mine = async_of(*self);
  MBarrierState& barrier = barrier_at(*self->block, b, site);
  release_to(barrier.token + barrier.phase % 2);
  in_flight.arrivals.push_back({&mine, &barrier, mine.small_count, site});
}

void finish_small(ThreadAsync& thread, long limit) {
  const auto finish = [&](std::vector<SmallCopy>& copies) {
    for (SmallCopy& copy : copies) {
      if (copy.number < limit) run_small(copy);
    }
  };
  for (auto& group : thread.small_groups) finish(group);
  finish(thread.small);
}

void end_copies(ThreadAsync& thread) {
  if (!thread.stores.empty()) fail("a thread leaves the kernel without tma_commit for its stores", thread.stores[0].site);
  for (auto& group : thread.store_groups) {
    for (Copy& copy : group) {
      if (!copy.was_read) fail("a thread leaves the kernel while its store reads shared memory; tma_wait_read<0> first", copy.site);
      in_flight.writes.push_back(std::move(copy));
    }
  }
  const auto check = [](const std::vector<SmallCopy>& copies) {
    for (const SmallCopy& copy : copies) {
      if (!copy.done) fail("a thread leaves the kernel while its cp_async is under way; cp_async_wait<0> first", {});
    }
  };
  for (const auto& group : thread.small_groups) check(group);
  check(thread.small);
}

}  // namespace megakern::simt
