// Attention with matrix products on AMX tiles in bf16, sums in fp32, for bf16 tensors.
#if defined(__x86_64__)
#define MEGAKERN_AVX512_BF16
#define MEGAKERN_AMX
#include "attention_backward.h"
#include "attention_forward.h"

namespace megakern {

void attention_forward_amx(const AttentionProblem& a, const AttentionForward& x, int) {
  attention_forward<InTiles, bf16>(a, x);
}

void attention_backward_amx(const AttentionProblem& a, const AttentionBackward& x, int) {
  attention_backward<InTiles, bf16>(a, x);
}

}  // namespace megakern
#endif
