// Fibers, and the order in which they run.
//
// A fiber runs until it waits; then the next is chosen and switched to directly. `Warp::ready` and `Machine::ready` say who
// can run, so that a choice costs a few instructions (a switch is about 10 ns, with its cache misses about 30 ns). Only
// when nobody can run, one asynchronous operation completes: as late as the rules of the hardware allow.
#include "simt/scheduler.h"

#include <algorithm>

#include "simt/sanitizers.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace megakern::simt {

Machine machine;
Fiber* self = &machine.main;

Machine::~Machine() {
  const Hardware working;
  slots.clear();
}

// --- switching ---

#if defined(__x86_64__)

// Saves the callee's registers and the stack pointer, and goes on where `to` was saved.
extern "C" MK_SIMT_HIDDEN void megakern_simt_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.hidden megakern_simt_switch
.globl megakern_simt_switch
.type megakern_simt_switch, @function
megakern_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size megakern_simt_switch, . - megakern_simt_switch
)");

static void swap_stacks(Fiber* from, Fiber* to) { megakern_simt_switch(&from->stack_pointer, to->stack_pointer); }

#else

static void swap_stacks(Fiber* from, Fiber* to) {
  ucontext_t here;  // lives on the stack that it saves
  from->stack_pointer = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to->stack_pointer));
}

#endif

static Fiber* left = nullptr;  // who ran before the fiber that runs

static void switch_to(Fiber* next) {
  Fiber* before = self;
  left = before;
  self = next;
  void* kept = before_switch(*before, *next);
  swap_stacks(before, next);
  after_switch(kept, left);
}

static Fiber* next_fiber();

static void leave() {
  Fiber& fiber = *self;
  Warp& warp = *fiber.warp;
  Block& block = *fiber.block;
  end_thread(fiber);
  warp.left |= 1u << fiber.lane;
  warp.ready &= ~(1u << fiber.lane);
  if (warp.ready == 0) machine.ready[warp.place / 64] &= ~(std::uint64_t(1) << warp.place % 64);
  ++block.left;
  ++machine.progress;
  --machine.running;
  if (warp.arrived) fail(std::string("a thread leaves the kernel while its warp waits for it in ") + warp.name, warp.site);
  if (block.barrier[0].arrived) {
    fail("a thread leaves the kernel while others wait for it in sync_block", block.barrier[0].site);
  }
  if (block.left == block.threads) end_block(block);
}

// The first function on each fiber's stack. Nothing may be thrown out of it: there is no caller.
static void enter() {
  after_switch(nullptr, left);
  acquire_from(&machine.begun);
  Fiber* next = &machine.main;
  try {
    machine.launch->call(machine.launch->body);
    leave();
    if (machine.running) next = next_fiber();
  } catch (...) {
    machine.error = std::current_exception();
  }
  release_to(&machine.ended);
  switch_to(next);  // outside of the handler: its state belongs to the operating system's thread, not to the fiber
  __builtin_unreachable();
}

void prepare(Fiber& fiber, const GuardedMemory& stack, int index) {
  // Tops at different offsets in their pages: with the same, the frames of all fibers would compete for the same sets of
  // the first cache.
  fresh_stack(fiber, stack.begin(), std::size_t(stack.end() - stack.begin()));
  unsigned char* top = stack.end() - index % 12 * 320;
#if defined(__x86_64__)
  void** frame = reinterpret_cast<void**>(top);
  *--frame = nullptr;  // where a return address would be; the stack pointer is 8 above a multiple of 16 in enter()
  *--frame = reinterpret_cast<void*>(&enter);
  for (int i = 0; i < 6; ++i) *--frame = nullptr;
  fiber.stack_pointer = frame;
#else
  top -= sizeof(ucontext_t);
  auto* context = reinterpret_cast<ucontext_t*>(reinterpret_cast<std::uintptr_t>(top) & ~std::uintptr_t(63));
  getcontext(context);
  context->uc_stack.ss_sp = stack.begin();
  context->uc_stack.ss_size = std::size_t(reinterpret_cast<unsigned char*>(context) - stack.begin());
  context->uc_link = nullptr;
  makecontext(context, &enter, 0);
  fiber.stack_pointer = context;
#endif
}

// --- the order ---

std::uint64_t Machine::random() {  // splitmix64
  std::uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

static int lowest(std::uint64_t bits) { return __builtin_ctzll(bits); }
static int highest(std::uint64_t bits) { return 63 - __builtin_clzll(bits); }

static int nth(std::uint64_t bits, int n) {
  while (n-- > 0) bits &= bits - 1;
  return lowest(bits);
}

static int any_of(std::uint64_t bits) { return nth(bits, int(machine.random() % unsigned(__builtin_popcountll(bits)))); }

// The first warp at or after `start` that can run, then from 0 on; -1 if there is none.
static int warp_from(int start) {
  const int words = int(machine.ready.size());
  for (int i = 0; i <= words; ++i) {
    const int word = (start / 64 + i) % words;
    std::uint64_t bits = machine.ready[word];
    if (i == 0) bits &= ~std::uint64_t(0) << start % 64;
    if (bits) return word * 64 + lowest(bits);
  }
  return -1;
}

// The last warp at or before `start`, then from the end on.
static int warp_to(int start) {
  const int words = int(machine.ready.size());
  for (int i = 0; i <= words; ++i) {
    const int word = (start / 64 + words - i) % words;
    std::uint64_t bits = machine.ready[word];
    if (i == 0) bits &= ~std::uint64_t(0) >> (63 - start % 64);
    if (bits) return word * 64 + highest(bits);
  }
  return -1;
}

static int any_warp() {
  int count = 0;
  for (const std::uint64_t bits : machine.ready) count += __builtin_popcountll(bits);
  if (count == 0) return -1;
  int n = int(machine.random() % unsigned(count));
  for (std::size_t word = 0;; ++word) {
    const int here = __builtin_popcountll(machine.ready[word]);
    if (n < here) return int(word) * 64 + nth(machine.ready[word], n);
    n -= here;
  }
}

static int preferred_warp() {
  int best = -1;
  for (std::size_t word = 0; word < machine.ready.size(); ++word) {
    for (std::uint64_t bits = machine.ready[word]; bits; bits &= bits - 1) {
      const int place = int(word) * 64 + lowest(bits);
      if (best < 0 || machine.warps[place]->priority > machine.warps[best]->priority) best = place;
    }
  }
  // A change point: from here on the warp comes after all others.
  if (best >= 0 && machine.random() % 1024 == 0) {
    int least = 0;
    for (const Warp* warp : machine.warps) least = std::min(least, warp->priority);
    machine.warps[best]->priority = least - 1;
  }
  return best;
}

static Fiber* fiber_of(int place, int lane) {
  const Warp& warp = *machine.warps[place];
  return &warp.block->fibers[warp.index * 32 + lane];
}

static Fiber* choose() {
  const bool started = self != &machine.main;
  const int here = started ? self->warp->place : -1, lane = started ? self->lane : -1;
  switch (machine.order) {
    case Order::forward: {  // on in this warp, then the next warp
      if (started) {
        const unsigned above = self->warp->ready & ~((2u << lane) - 1);
        if (above) return fiber_of(here, lowest(above));
      }
      const int place = warp_from(here + 1 == int(machine.warps.size()) ? 0 : here + 1);
      return place < 0 ? nullptr : fiber_of(place, lowest(machine.warps[place]->ready));
    }
    case Order::reverse: {
      if (started) {
        const unsigned below = self->warp->ready & ((1u << lane) - 1);
        if (below) return fiber_of(here, highest(below));
      }
      const int place = warp_to(here <= 0 ? int(machine.warps.size()) - 1 : here - 1);
      return place < 0 ? nullptr : fiber_of(place, highest(machine.warps[place]->ready));
    }
    case Order::random: {
      const int place = any_warp();
      return place < 0 ? nullptr : fiber_of(place, any_of(machine.warps[place]->ready));
    }
    case Order::pct: {
      const int place = preferred_warp();
      if (place < 0) return nullptr;
      const unsigned ready = machine.warps[place]->ready;
      return fiber_of(place, machine.seed & 1 ? highest(ready) : lowest(ready));
    }
    case Order::none: break;  // a launch has returned before
  }
  return nullptr;
}

// Never nullptr; `main` if the launch cannot go on without it.
static Fiber* next_fiber() {
  for (;;) {
    if (Fiber* fiber = choose()) return fiber;
    const bool completed = complete_one();
    if (completed) ++machine.progress;
    if (machine.spinners.empty()) {
      if (completed) continue;
      return &machine.main;  // a deadlock
    }
    machine.fruitless = machine.progress == machine.spun_at ? machine.fruitless + 1 : 0;
    if (machine.fruitless > 100) {
      machine.fruitless = 0;
      machine.starved = true;
      return &machine.main;
    }
    for (Fiber* fiber : machine.spinners) wake(fiber);
    machine.spinners.clear();
    machine.spun_at = machine.progress;
  }
}

void run_fibers() {
  machine.starved = false;
  Fiber* next = next_fiber();
  if (next == &machine.main) return;
  release_to(&machine.begun);
  switch_to(next);
  acquire_from(&machine.ended);
}

void abandon() {
  switch_to(&machine.main);
  __builtin_unreachable();
}

// --- waiting ---

static void pause() {
  Fiber& fiber = *self;
  Warp& warp = *fiber.warp;
  warp.ready &= ~(1u << fiber.lane);
  if (warp.ready == 0) machine.ready[warp.place / 64] &= ~(std::uint64_t(1) << warp.place % 64);
  Fiber* next = next_fiber();
  if (next != &fiber) switch_to(next);
}

void wait(const char* waits, const char* what, long detail, Site site) {
  Fiber& fiber = *self;
  fiber.waits = waits;
  fiber.what = what;
  fiber.detail = detail;
  fiber.site = site;
  ++machine.progress;
  pause();
}

void wake(Fiber* fiber) {
  Warp& warp = *fiber->warp;
  fiber->waits = nullptr;
  warp.ready |= 1u << fiber->lane;
  machine.ready[warp.place / 64] |= std::uint64_t(1) << warp.place % 64;
}

void spin(Site site) {
  self->waits = "memory (yield_thread)";
  self->what = "";
  self->detail = -1;
  self->site = site;
  {
    const Hardware working;
    machine.spinners.push_back(self);
  }
  pause();
}

void breathe() {
  if (machine.order == Order::forward || machine.order == Order::reverse) return;
  if (machine.order == Order::random && machine.random() % 2) return;
  Fiber* next = choose();
  if (next->warp != self->warp) switch_to(next);
}

// --- meetings ---

static std::string at(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

static bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::string(a.file) == b.file);
}

// Notes that this lane has come to the operation; true if it is the last of its warp.
static bool gathered(Warp& warp, const char* name, Site site) {
  if (warp.arrived == 0) {
    if (warp.left) fail(std::string(name) + ": a lane of this warp has left the kernel before it", site);
    warp.name = name;
    warp.site = site;
  } else if (warp.name != name || !same(warp.site, site)) {
    fail("the warp diverges: one lane is at " + std::string(warp.name) + " (" + at(warp.site) + "), another at " + name,
         site);
  }
  warp.arrived |= 1u << self->lane;
  if (warp.arrived != warp.exists) return false;
  warp.arrived = 0;
  ++machine.progress;
  return true;
}

static void wake_all(Warp& warp) {
  Fiber* fibers = warp.block->fibers + warp.index * 32;
  for (unsigned rest = warp.exists; rest; rest &= rest - 1) fibers[lowest(rest)].waits = nullptr;
  warp.ready = warp.exists;
  machine.ready[warp.place / 64] |= std::uint64_t(1) << warp.place % 64;
}

void meet(const char* name, Site site, void (*finish)(Warp&), const void* argument) {
  Warp& warp = *self->warp;
  const char* token = warp.token + warp.meetings % 2;  // of this meeting: the next one may begin before all have left it
  release_to(token);
  if (!gathered(warp, name, site)) {
    wait(name, "", -1, site);
  } else {
    acquire_from(token);
    ++warp.meetings;
    warp.argument = argument;
    if (finish) {
      const Hardware working;
      finish(warp);
    }
    wake_all(warp);
  }
  acquire_from(token);
}

// A whole warp has come: the instructions are .aligned.
static void arrive(Warp& warp, int id, int threads, Site site) {
  Block& block = *warp.block;
  Barrier& barrier = block.barrier[id];
  const auto name = [&] { return id == 0 ? std::string("sync_block") : "named barrier " + std::to_string(id); };
  if (threads == 0) {
    threads = block.threads;
    if (block.left) fail(name() + ": " + std::to_string(block.left) + " threads have left the kernel before it", site);
  } else if (threads % 32 != 0) {
    fail(name() + " wants a multiple of 32 threads, got " + std::to_string(threads), site);
  }
  if (barrier.arrived && barrier.wanted != threads) {
    fail(name() + " is used for " + std::to_string(threads) + " threads while others wait for " +
             std::to_string(barrier.wanted) + " there (" + at(barrier.site) + ")", site);
  }
  barrier.wanted = threads;
  barrier.site = site;
  barrier.arrived += __builtin_popcount(warp.exists);
  if (barrier.arrived < threads) return;
  if (barrier.arrived > threads) fail(name() + ": more than " + std::to_string(threads) + " threads arrive", site);
  barrier.arrived = 0;
  ++barrier.meetings;
  settle_fences(block);
  for (unsigned rest = barrier.waiting; rest; rest &= rest - 1) wake_all(block.first_warp[lowest(rest)]);
  barrier.waiting = 0;
}

void barrier_sync(int id, int threads, Site site) {
  Warp& warp = *self->warp;
  Barrier& barrier = warp.block->barrier[id];
  const char* name = id == 0 ? "sync_block" : "named barrier";
  const char* token = barrier.token + barrier.meetings % 2;
  release_to(token);
  bool complete = false;
  if (gathered(warp, name, site)) {
    barrier.waiting |= 1u << warp.index;
    arrive(warp, id, threads, site);
    complete = barrier.waiting == 0;
  }
  if (complete) breathe();
  else wait(name, "", id, site);
  acquire_from(token);
}

void barrier_arrive(int id, int threads, Site site) {
  Warp& warp = *self->warp;
  const Barrier& barrier = warp.block->barrier[id];
  release_to(barrier.token + barrier.meetings % 2);
  if (!gathered(warp, "barrier_arrive", site)) return wait("barrier_arrive", "", id, site);
  arrive(warp, id, threads, site);
  wake_all(warp);
  breathe();
}

}  // namespace megakern::simt
