// Memory of tensors: pages of 2 MB.
#include "block_step.h"
#include "checks.h"

#if defined(__linux__)
#include <cerrno>
#include <sys/mman.h>
#endif

namespace megakern {

bool use_huge_pages(Address first, int64_t bytes) {
  require_positive("use_huge_pages", "bytes", bytes);
  require_address("use_huge_pages", "first", first, 1);
#if defined(__linux__)
  constexpr Address kHuge = Address(1) << 21;
  const Address from = first & ~(kHuge - 1), to = (first + bytes + kHuge - 1) & ~(kHuge - 1);
  const int code = madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
  return code == 0 || errno == ENOMEM;  // what is mapped took it, the rest of the first and last page is not there
#else
  return false;
#endif
}

}  // namespace megakern
