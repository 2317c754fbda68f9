// Attention with matrix products in bf16 (AVX512-BF16), sums in fp32, for bf16 tensors.
#if defined(__x86_64__)
#define MEGAKERN_AVX512_BF16
#include "attention_backward.h"
#include "attention_forward.h"

namespace megakern {

void attention_forward_bf16(const AttentionProblem& a, const AttentionForward& x, int) {
  attention_forward<InBfloat16, bf16>(a, x);
}

void attention_backward_bf16(const AttentionProblem& a, const AttentionBackward& x, int) {
  attention_backward<InBfloat16, bf16>(a, x);
}

}  // namespace megakern
#endif
