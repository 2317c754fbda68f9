// What AddressSanitizer and ThreadSanitizer must be told of fibers; nothing in other builds.
//
// -DMEGAKERN_ASAN, -DMEGAKERN_TSAN go with -fsanitize on the kernels and the linker. The emulator's own files are compiled
// without: what they do to memory is the hardware's doing, not a thread's.
#pragma once

#include <cstddef>

#include "simt/threads.h"

#if defined(MEGAKERN_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(MEGAKERN_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void __tsan_write_range(void* address, std::size_t bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace megakern::simt {

#if defined(MEGAKERN_ASAN) || defined(MEGAKERN_TSAN)
constexpr std::size_t kStack = 512 * 1024;
#else
constexpr std::size_t kStack = 128 * 1024;
#endif

// Before a fiber starts anew on its stack: frames that were abandoned there are forgotten.
inline void fresh_stack(Fiber& fiber, unsigned char* begin, std::size_t bytes) {
  fiber.stack_begin = begin;
  fiber.stack_bytes = bytes;
#if defined(MEGAKERN_ASAN)
  __asan_unpoison_memory_region(begin, bytes);
#endif
#if defined(MEGAKERN_TSAN)
  if (!fiber.sanitizer) fiber.sanitizer = __tsan_create_fiber(0);  // here: it would come after all its creator has done
#endif
}

// Around a switch: before it in the old fiber, after it in the new.
inline void* before_switch([[maybe_unused]] Fiber& from, [[maybe_unused]] Fiber& to) {
  void* kept = nullptr;
#if defined(MEGAKERN_ASAN)
  __sanitizer_start_switch_fiber(&kept, to.stack_begin, to.stack_bytes);
#endif
#if defined(MEGAKERN_TSAN)
  if (!from.sanitizer) from.sanitizer = __tsan_get_current_fiber();  // the caller of the launch
  __tsan_switch_to_fiber(to.sanitizer, 1);  // 1: a switch is no synchronisation
#endif
  return kept;
}

// `from`: whose stack was left; `kept` is nullptr in a fiber that starts.
inline void after_switch([[maybe_unused]] void* kept, [[maybe_unused]] Fiber* from) {
#if defined(MEGAKERN_ASAN)
  const void* begin = nullptr;
  std::size_t bytes = 0;
  __sanitizer_finish_switch_fiber(kept, &begin, &bytes);
  if (from && !from->stack_begin) from->stack_begin = begin, from->stack_bytes = bytes;  // the caller's own
#endif
}

// What this thread has done is seen by whoever acquires `token` after it.
inline void release_to([[maybe_unused]] const void* token) {
#if defined(MEGAKERN_TSAN)
  __tsan_release(const_cast<void*>(token));
#endif
}
inline void acquire_from([[maybe_unused]] const void* token) {
#if defined(MEGAKERN_TSAN)
  __tsan_acquire(const_cast<void*>(token));
#endif
}

// An access of the thread that the emulator makes for it.
inline void written([[maybe_unused]] void* address, [[maybe_unused]] std::size_t bytes) {
#if defined(MEGAKERN_TSAN)
  __tsan_write_range(address, bytes);
#endif
}

// While it lives, accesses to memory (those of memcpy, say) are the hardware's, and race with nobody.
class Hardware {
 public:
  Hardware() {
#if defined(MEGAKERN_TSAN)
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
#endif
  }
  ~Hardware() {
#if defined(MEGAKERN_TSAN)
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
#endif
  }
};

}  // namespace megakern::simt
