// The C functions of the test library.
#include "simt/tests/cases.h"

#include <cstdio>
#include <exception>
#include <map>

#if defined(MEGAKERN_SIMT)
#include "simt/simt.h"
#endif

namespace megakern::tests {

static std::map<std::string, void (*)(const Arguments&)>& cases() {
  static std::map<std::string, void (*)(const Arguments&)> all;
  return all;
}

Case::Case(const char* name, void (*run)(const Arguments&)) { cases()[name] = run; }

template <class F>
static int guarded(char* message, std::int64_t size, F f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, std::size_t(size), "%s", error.what());
    return 1;
  }
}

}  // namespace megakern::tests

#define MK_EXPORT extern "C" __attribute__((visibility("default")))

// 0, or 1 with the text of the error in `message`.
MK_EXPORT int megakern_case(const char* name, int device, void* stream, void* const* pointers,
                            const std::int64_t* numbers, char* message, std::int64_t size) {
  using namespace megakern::tests;
  return guarded(message, size, [&] { cases().at(name)(Arguments{pointers, numbers, {device, stream}}); });
}

MK_EXPORT int megakern_schedule(const char* schedule, char* message, std::int64_t size) {
#if defined(MEGAKERN_SIMT)
  return megakern::tests::guarded(message, size, [&] { megakern::simt::set_schedule(schedule); });
#else
  return megakern::tests::guarded(message, size, [&] { throw std::runtime_error("a GPU has a schedule of its own"); });
#endif
}
