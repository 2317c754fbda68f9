// What tests may set: the order in which the emulator runs threads.
#pragma once

#include <string>

namespace megakern::simt {

// "forward", "reverse", "random:SEED" or "pct:SEED" (random priorities of warps, changed now and then). A correct kernel
// gives the same result under each. Blocks follow: 0, 1, 2 ...; the last first; or in random order.
void set_schedule(const std::string& schedule);
std::string schedule();

}  // namespace megakern::simt
