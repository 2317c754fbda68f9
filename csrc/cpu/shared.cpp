// Collectives through shared memory: shared.h has the protocol.
#include "shared.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "checks.h"

#if defined(__linux__)
#include <fcntl.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "shared_sum.h"

namespace megakern {
namespace {

constexpr int64_t kLine = 128;      // bytes that processors fetch together: no two ranks write to the same
constexpr int kSliceMilliseconds = 20;  // of sleep, after which a rank looks whether the others live

using Clock = std::chrono::steady_clock;

struct alignas(kLine) RankState {
  std::atomic<uint64_t> written;
  alignas(kLine) std::atomic<uint64_t> read;
  alignas(kLine) std::atomic<uint32_t> bell;  // changes when a rank that sleeps shall look again
  std::atomic<uint32_t> asleep;
};

struct alignas(kLine) ChunkHead {
  Call call;
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free,
              "atomics must work between processes");

int64_t element_bytes(int dtype) {
  constexpr int64_t sizes[] = {4, 2, 8, 8, 1};
  return sizes[dtype];
}

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

// Calls visit(i, count, offset) for runs of elements first <= i < last of a part that are neighbours in the whole too;
// offset: where the run begins in the whole, for part 0.
template <typename Visit>
void for_runs(int64_t first, int64_t last, int64_t block, int ranks, const Visit& visit) {
  for (int64_t i = first; i < last;) {
    const int64_t count = std::min(last - i, block - i % block);
    visit(i, count, i / block * block * ranks + i % block);
    i += count;
  }
}

void reduce_any(int dtype, void* out, const char* const* parts, int ranks, int64_t elements, bool maximum) {
  switch (dtype) {
    case kF32: return reduce<float>(out, parts, ranks, elements, maximum);
    case kB16: return reduce<half_float>(out, parts, ranks, elements, maximum);
    case kF64: return reduce<double>(out, parts, ranks, elements, maximum);
    default: return reduce<int64_t>(out, parts, ranks, elements, maximum);
  }
}

}  // namespace

struct SharedChannel::Segment {
  char* base;
  int64_t size;
  RankState* states;
  ChunkHead* heads;
  char* chunks;
  Segment(char* base, int64_t size, int ranks, int slots)
      : base(base), size(size), states(reinterpret_cast<RankState*>(base)),
        heads(reinterpret_cast<ChunkHead*>(states + ranks)), chunks(reinterpret_cast<char*>(heads + ranks * slots)) {}
  ~Segment() { munmap(base, size); }
};

int64_t SharedChannel::bytes(int ranks, int slots, int64_t chunk) {
  return ranks * int64_t(sizeof(RankState)) + int64_t(ranks) * slots * (int64_t(sizeof(ChunkHead)) + chunk);
}

SharedChannel::SharedChannel(int file, int rank, int ranks, int slots, int64_t chunk, int64_t spins)
    : file_(file), rank_(rank), ranks_(ranks), slots_(slots), chunk_(chunk), spins_(spins), parts_(ranks) {
  const char* op = "SharedChannel";
  require(ranks > 1 && rank >= 0 && rank < ranks, "SharedChannel: rank must be in [0, ranks) of 2 ranks or more");
  require_positive(op, "slots", slots);
  require(chunk > 0 && chunk % kLine == 0 && chunk >= 8 * ranks,
          "SharedChannel: chunk must be a multiple of 128 bytes, 8 or more a rank, got " + std::to_string(chunk));
  const int64_t size = bytes(ranks, slots, chunk);
  require(lseek(file, 0, SEEK_END) >= size, "SharedChannel: the file must have " + std::to_string(size) + " bytes");
  void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (base == MAP_FAILED) throw std::runtime_error(std::string("cannot map shared memory: ") + std::strerror(errno));
  segment_ = std::make_unique<Segment>(static_cast<char*>(base), size, ranks, slots);
  struct flock lock {};
  lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = rank, lock.l_len = 1;
  if (fcntl(file, F_SETLK, &lock) != 0)
    throw std::runtime_error(std::string("cannot lock shared memory: ") + std::strerror(errno));
}

SharedChannel::~SharedChannel() { close(file_); }  // which drops the lock

char* SharedChannel::data(int rank, uint64_t chunk) const {
  return segment_->chunks + (int64_t(rank) * slots_ + int64_t(chunk % slots_)) * chunk_;
}

int SharedChannel::not_written(uint64_t chunk) const {
  for (int r = 0; r < ranks_; ++r)
    if (r != rank_ && segment_->states[r].written.load(std::memory_order_acquire) <= chunk) return r;
  return -1;
}

int SharedChannel::not_read(uint64_t chunk) const {
  for (int r = 0; r < ranks_; ++r)
    if (r != rank_ && segment_->states[r].read.load(std::memory_order_acquire) <= chunk) return r;
  return -1;
}

int SharedChannel::other(uint64_t chunk, const Call& call) const {
  for (int r = 0; r < ranks_; ++r)
    if (r != rank_ && !(segment_->heads[r * slots_ + int(chunk % slots_)].call == call)) return r;
  return -1;
}

bool SharedChannel::may_write() const {
  return written_ < queued_ && (written_ < uint64_t(slots_) || not_read(written_ - slots_) < 0);
}

const SharedChannel::Work& SharedChannel::work_of(uint64_t chunk) const {
  return *std::find_if(works_.begin(), works_.end(), [&](const Work& w) { return chunk < w.first + w.chunks; });
}

// After a change of this rank's counters: wakes those that sleep.
void SharedChannel::ring() {
  std::atomic_thread_fence(std::memory_order_seq_cst);  // the change before the look at `asleep`
  for (int r = 0; r < ranks_; ++r) {
    RankState& state = segment_->states[r];
    if (r == rank_ || state.asleep.load() == 0 || state.asleep.exchange(0) == 0) continue;
    state.bell.fetch_add(1);
    syscall(SYS_futex, &state.bell, FUTEX_WAKE, 1, nullptr, nullptr, 0);
  }
}

void SharedChannel::write_one() {
  const Work& w = work_of(written_);
  const int64_t first = int64_t(written_ - w.first) * w.per_chunk;
  const int64_t last = std::min(w.call.elements, first + w.per_chunk), size = element_bytes(w.call.dtype);
  char* slot = data(rank_, written_);
  segment_->heads[rank_ * slots_ + int(written_ % slots_)].call = w.call;
  if (w.call.collective != kReduceScatter) {
    std::memcpy(slot, w.x + first * size, (last - first) * size);
  } else {
    for (int r = 0; r < ranks_; ++r) {
      if (r == rank_) continue;  // nobody else reads it
      char* part = slot + r * w.per_chunk * size;
      for_runs(first, last, w.call.block, ranks_, [&](int64_t i, int64_t count, int64_t offset) {
        std::memcpy(part + (i - first) * size, w.x + (offset + r * w.call.block) * size, count * size);
      });
    }
  }
  segment_->states[rank_].written.store(++written_, std::memory_order_release);
  ring();
}

void SharedChannel::read_one() {
  const Work& w = work_of(read_);
  const int64_t first = int64_t(read_ - w.first) * w.per_chunk;
  const int64_t last = std::min(w.call.elements, first + w.per_chunk), size = element_bytes(w.call.dtype);
  const int64_t block = w.call.block;
  const bool maximum = w.call.reduction == kMax;
  if (w.call.collective == kAllReduce) {
    for (int r = 0; r < ranks_; ++r) parts_[r] = r == rank_ ? w.x + first * size : data(r, read_);
    reduce_any(w.call.dtype, w.out + first * size, parts_.data(), ranks_, last - first, maximum);
  } else if (w.call.collective == kAllGather) {
    for (int r = 0; r < ranks_; ++r) {
      const char* part = r == rank_ ? w.x + first * size : data(r, read_);
      for_runs(first, last, block, ranks_, [&](int64_t i, int64_t count, int64_t offset) {
        std::memcpy(w.out + (offset + r * block) * size, part + (i - first) * size, count * size);
      });
    }
  } else {
    for_runs(first, last, block, ranks_, [&](int64_t i, int64_t count, int64_t offset) {
      for (int r = 0; r < ranks_; ++r)
        parts_[r] = r == rank_ ? w.x + (offset + r * block) * size
                              : data(r, read_) + (rank_ * w.per_chunk + i - first) * size;
      reduce_any(w.call.dtype, w.out + i * size, parts_.data(), ranks_, count, maximum);
    });
  }
  segment_->states[rank_].read.store(++read_, std::memory_order_release);
  ring();
  if (read_ == w.first + w.chunks) {
    works_.pop_front();
    ++finished_;
  }
}

bool SharedChannel::has_ended(int rank) const {
  struct flock lock {};
  lock.l_type = F_WRLCK, lock.l_whence = SEEK_SET, lock.l_start = rank, lock.l_len = 1;
  return fcntl(file_, F_GETLK, &lock) == 0 && lock.l_type == F_UNLCK;
}

uint64_t SharedChannel::start(int collective, int reduction, int dtype, Address x, Address out, int64_t elements,
                              int64_t block, int ahead) {
  const char* op = "SharedChannel";
  require(collective >= kAllReduce && collective <= kReduceScatter,
          "SharedChannel: collective code must be 0 to 2, got " + std::to_string(collective));
  require(reduction == kSum || reduction == kMax,
          "SharedChannel: reduction code must be 0 (sum) or 1 (max), got " + std::to_string(reduction));
  require(dtype >= kF32 && dtype <= (collective == kAllGather ? kU8 : kI64),
          "SharedChannel: no such dtype code for this collective: " + std::to_string(dtype));
  require(elements >= 0, "SharedChannel: elements must be 0 or more, got " + std::to_string(elements));
  require_positive(op, "block", block);
  require_addressable(op, std::max<int64_t>(elements, 1), 8 * ranks_);
  const int64_t size = element_bytes(dtype);
  if (elements > 0) {
    require_address(op, "x", x, int(size));
    require_address(op, "out", out, int(size));
    const int64_t in_bytes = elements * size * (collective == kReduceScatter ? ranks_ : 1);
    const int64_t out_bytes = elements * size * (collective == kAllGather ? ranks_ : 1);
    const bool apart = x + Address(in_bytes) <= out || out + Address(out_bytes) <= x;
    require(apart || (collective == kAllReduce && x == out), "SharedChannel: x and out overlap");
    require(elements % block == 0, "SharedChannel: elements must be whole blocks");
  }
  const std::lock_guard<std::mutex> guard(mutex_);
  const int64_t per_chunk = chunk_ / size / (collective == kReduceScatter ? ranks_ : 1);
  const int64_t chunks = std::max<int64_t>(1, (elements + per_chunk - 1) / per_chunk);  // none: it is still met
  works_.push_back({{collective, reduction, dtype, elements, block}, reinterpret_cast<const char*>(x),
                    reinterpret_cast<char*>(out), per_chunk, queued_, uint64_t(chunks)});
  queued_ += chunks;
  for (; ahead > 0 && may_write(); --ahead) write_one();
  return ++started_;
}

std::tuple<int, int, int, int, int, int64_t> SharedChannel::finish(uint64_t number, int milliseconds) {
  const std::lock_guard<std::mutex> guard(mutex_);
  require(number <= started_, "SharedChannel: collective " + std::to_string(number) + " was not started");
  const Clock::time_point end = Clock::now() + std::chrono::milliseconds(milliseconds);
  RankState& self = segment_->states[rank_];
  int64_t spins = spins_;
  bool slept = false;
  int ended = -1;
  while (finished_ < number) {
    // Write one, read one: chunks are read while they are in a near cache. Nothing to read: write ahead.
    const int late = read_ < written_ ? not_written(read_) : -1;
    const bool readable = read_ < written_ && late < 0;
    if ((written_ <= read_ + 1 || !readable) && may_write()) {
      write_one();
      spins = spins_;
      continue;
    }
    if (readable) {
      const int different = other(read_, work_of(read_).call);
      if (different >= 0) {
        const Call& call = segment_->heads[different * slots_ + int(read_ % slots_)].call;
        return {kOther, different, call.collective, call.reduction, call.dtype, call.elements};
      }
      read_one();
      spins = spins_;
      continue;
    }
    const int awaited = late >= 0 ? late : not_read(written_ - slots_);
    if (awaited < 0) continue;
    if (spins-- > 0) {
      pause_briefly();
      continue;
    }
    // Said aloud, then looked at again: a rank that goes on in between rings.
    const uint32_t bell = self.bell.load();
    if (self.asleep.exchange(1) == 0) {
      std::atomic_thread_fence(std::memory_order_seq_cst);
      continue;
    }
    if (slept && Clock::now() >= end) return {kNotYet, awaited, 0, 0, 0, 0};
    if (slept && has_ended(awaited)) {
      if (ended == awaited) return {kGone, awaited, 0, 0, 0, 0};
      ended = awaited;  // its last act may be what is waited for: looked at once more
      continue;
    }
    const timespec slice{0, kSliceMilliseconds * 1000000L};
    slept = syscall(SYS_futex, &self.bell, FUTEX_WAIT, bell, &slice, nullptr, 0) != 0 && errno == ETIMEDOUT;
  }
  self.asleep.store(0);
  return {kDone, -1, 0, 0, 0, 0};
}

}  // namespace megakern
#endif
