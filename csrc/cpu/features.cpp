// Which of the kernels' instruction sets this processor has.
#include "api.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace megakern {
namespace {

// Has it AMX with bf16, and does the kernel let this process use the tiles? Linux wants to be asked once.
[[maybe_unused]] bool tiles_allowed() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;          // CPUID 7.0, EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2), XSTATE component
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace

std::vector<std::string> features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) found.emplace_back("avx512");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16) found.emplace_back("avx512_bf16");
  if (bf16 && tiles_allowed()) found.emplace_back("amx_bf16");
#endif
  return found;
}

}  // namespace megakern
