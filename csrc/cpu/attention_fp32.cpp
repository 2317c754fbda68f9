// Attention with matrix products in fp32, for fp32 and bf16 tensors.
#if defined(__x86_64__)
#include "attention_backward.h"
#include "attention_forward.h"

namespace megakern {

void attention_forward_fp32(const AttentionProblem& a, const AttentionForward& x, int dtype) {
  dtype == kBFloat16 ? attention_forward<InFloat32, bf16>(a, x) : attention_forward<InFloat32, float>(a, x);
}

void attention_backward_fp32(const AttentionProblem& a, const AttentionBackward& x, int dtype) {
  dtype == kBFloat16 ? attention_backward<InFloat32, bf16>(a, x) : attention_backward<InFloat32, float>(a, x);
}

}  // namespace megakern
#endif
