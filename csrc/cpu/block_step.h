// One transformer block over a few new tokens and a cache of keys and values: a step of generation.
#pragma once

#include "api.h"

namespace megakern {

struct BlockLinear {
  Address weight, bias;  // (N, K), (N,); bias may be 0
};
struct BlockNorm {
  Address weight, bias;  // (C,); bias may be 0. No weight: there is no such norm
};

// megakern/ops/block_step.py has the formulas. T new tokens of each of B sequences, at most 8 in all; sizes of a block.
struct BlockShape {
  int64_t B, T, C, H, G, D, F;
  bool centre;             // LayerNorm, else RMSNorm
  bool parallel_residual;  // norm2 is not there
  bool gated;              // the inner activations are silu(gate) * up; else activation(fc1)
  int activation;
  int64_t window;  // keys before the own one that are seen; negative: all
  float eps, head_eps;
};

struct BlockWeights {
  BlockNorm norm1, norm2, q_norm, k_norm;
  BlockLinear qkv, proj, fc1, up, fc2;  // fc1 is the gate if gated; up only then
};

// Where keys and values lie: pages (pages, page_size, G, D), block_table (B, P), lengths (B,) with the new tokens.
struct BlockCache {
  Address keys, values;
  Address block_table, lengths;  // int32
  int64_t pages, page_size, P;
};

// cos, sin (positions, D/2) fp32, rotate-half; 0: none. Row `lengths[b] - T + t` belongs to token t of sequence b.
struct BlockRope {
  Address cos, sin;
  int64_t positions;
};

// out (B, T, C) = block(hidden); the new keys and values are in the pages then. `dtype` of hidden, out and pages;
// weights of that or fp32, which is rounded to it for products.
void block_step(const BlockShape&, const BlockWeights&, const BlockCache&, const BlockRope&, Address hidden, Address out,
                int dtype, int weight_dtype, int threads);

// From now on the system backs this memory, and what shares its pages, with pages of 2 MB where it is first written.
// -> does it? Not where there are none, or where they are switched off.
bool use_huge_pages(Address first, int64_t bytes);

}  // namespace megakern
