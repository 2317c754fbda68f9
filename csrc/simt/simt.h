// What tests may set: the order in which the emulator runs threads, and where an address seems to lead.
#pragma once

#include <cstdint>
#include <string>

namespace megakern {

// For check_pointers: `address` is memory of this device, of the host if -1. pointers.cu
void pretend_pointer(std::uintptr_t address, int device);

}  // namespace megakern

namespace megakern::simt {

// "forward", "reverse", "random:SEED" or "pct:SEED" (random priorities of warps, changed now and then). A correct kernel
// gives the same result under each. Blocks follow: 0, 1, 2 ...; the last first; or in random order. "none" runs no thread: a
// call then costs what it costs a CPU beside a GPU, but for the driver.
void set_schedule(const std::string& schedule);
std::string schedule();

}  // namespace megakern::simt
