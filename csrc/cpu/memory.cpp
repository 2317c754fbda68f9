// Memory of tensors: pages of 2 MB.
#include "block_step.h"
#include "checks.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace megakern {

bool use_huge_pages(Address first, int64_t bytes) {
  require_positive("use_huge_pages", "bytes", bytes);
  require_address("use_huge_pages", "first", first, 1);
#if defined(__linux__)
  constexpr Address kHuge = Address(1) << 21;
  constexpr int kCollapse = 25;  // MADV_COLLAPSE of Linux 6.1, which older headers lack
  const Address from = first & ~(kHuge - 1), to = (first + bytes + kHuge - 1) & ~(kHuge - 1);
  bool all = true;
  for (Address page = from; page < to; page += kHuge)  // one at a time: a refused one stops the rest of a call
    all &= madvise(reinterpret_cast<void*>(page), kHuge, kCollapse) == 0;
  return all;
#else
  return false;
#endif
}

}  // namespace megakern
