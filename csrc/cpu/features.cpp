// Which of the kernels' instruction sets this processor has.
#include "api.h"

namespace megakern {

std::vector<std::string> features() {
  std::vector<std::string> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512) found.emplace_back("avx512");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) found.emplace_back("avx512_bf16");
#endif
  return found;
}

}  // namespace megakern
