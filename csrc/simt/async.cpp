// Asynchronous work.
#include "simt/scheduler.h"

namespace megakern::simt {

bool complete_one() { return false; }
void check_leftovers(Block&) {}

}  // namespace megakern::simt
