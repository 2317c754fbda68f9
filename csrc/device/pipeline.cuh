// Blocks of a producer and two consumer warpgroups around a ring of stages in shared memory.
#pragma once

#include "device/ptx.cuh"

namespace megakern {

constexpr int kPipelineThreads = 384;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // a thread; 168 at the launch

// Where in the ring a role stands.
template <int Stages>
struct Ring {
  int stage = 0, phase = 0;

  MK_DEVICE void advance() {
    if (++stage == Stages) stage = 0, phase ^= 1;
  }
  MK_DEVICE void advance(int steps) {
    stage += steps;
    if (stage >= Stages) {
      phase ^= (stage / Stages) & 1;
      stage %= Stages;
    }
  }
};

// Of this thread. Of a lane's own index the compiler could not know that it is the same for all, and what follows from it
// (descriptors, addresses of barriers) would be computed and kept by every thread.
MK_DEVICE int warpgroup_index() { return shuffle(int(threadIdx.x) / 128, 0); }

// Barrier First + consumer, for 2 or 3 consumers: its number is part of the instruction.
template <int First, int Consumers = 2>
MK_DEVICE void consumer_sync(int consumer, int threads) {
  if (consumer == 0) barrier_sync<First>(threads);
  else if (Consumers == 2 || consumer == 1) barrier_sync<First + 1>(threads);
  else if constexpr (Consumers == 3) barrier_sync<First + 2>(threads);
}
template <int First, int Consumers = 2>
MK_DEVICE void consumer_arrive(int consumer, int threads) {
  if (consumer == 0) barrier_arrive<First>(threads);
  else if (Consumers == 2 || consumer == 1) barrier_arrive<First + 1>(threads);
  else if constexpr (Consumers == 3) barrier_arrive<First + 2>(threads);
}

}  // namespace megakern
