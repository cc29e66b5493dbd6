// The extern "C" interface of this library; attention.py mirrors the structure.
#pragma once
#include "kernels.h"

extern "C" {

// Attention of T tokens, which are the last of S if causal, with S keys: query and out [T, heads, head_dim], key and
// value [kv_heads, S, head_dim], all float32 and contiguous. A window or softcap of 0 is none.
struct RvNeonAttention {
    const float *query, *key, *value;
    float* out;
    int64_t tokens, keys, window;
    int32_t heads, kv_heads, head_dim, causal;
    float scale, softcap;
};

// The version of kernels_cpu's interface that this library was built with.
RV_API int32_t rvneon_abi_version();
// The best level that this processor has: 0 any, 1 with dotprod, 2 with i8mm.
RV_API int32_t rvneon_level();
// `base` with the kernels of a level, or of the best one if it is -1; null if this processor has not got it. There is
// one table of each level: it keeps the base of the first call.
RV_API const Kernels* rvneon_kernels(const Kernels* base, int32_t level);
// 0, or 1 if there is no memory for it.
RV_API int32_t rvneon_attention(const RvNeonAttention* call);
}
