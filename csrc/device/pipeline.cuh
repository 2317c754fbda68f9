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

  MK_DEVICE void advance(int steps = 1) {
    stage += steps;
    if (stage >= Stages) {
      phase ^= (stage / Stages) & 1;
      stage %= Stages;
    }
  }
};

// Barrier First of consumer 0, First + 1 of consumer 1.
template <int First>
MK_DEVICE void consumer_sync(int consumer, int threads) {
  if (consumer == 0) barrier_sync<First>(threads);
  else barrier_sync<First + 1>(threads);
}

}  // namespace megakern
