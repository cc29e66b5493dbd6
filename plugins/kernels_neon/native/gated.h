// out = activation(gate) * up: SwiGLU, GeGLU and its form with tanh (arXiv 2002.05202, 1606.08415).
#pragma once
#include <cmath>
#include "vectors.h"

namespace {

template <int32_t A> static inline float32x4_t activated(float32x4_t x) {
    const float32x4_t one = vdupq_n_f32(1.0f);
    if constexpr (A == RV_SILU) return vdivq_f32(x, vaddq_f32(exponential(vnegq_f32(x)), one));
    float32x4_t inner;
    if constexpr (A == RV_GELU_TANH) {
        const float32x4_t cubed = vmulq_f32(vmulq_f32(x, x), x);
        inner = tangent(vmulq_n_f32(vfmaq_n_f32(x, cubed, 0.044715f), 0.7978845608f));
    } else {
        float each[4];
        vst1q_f32(each, x);
        for (float& value : each) value = erff(value * 0.70710678118f);
        inner = vld1q_f32(each);
    }
    return vmulq_f32(vmulq_n_f32(x, 0.5f), vaddq_f32(inner, one));
}

template <int32_t A> static inline void gated_by(const float* gate, const float* up, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        vst1q_f32(out + i, vmulq_f32(activated<A>(vld1q_f32(gate + i)), vld1q_f32(up + i)));
    if (i == n) return;
    float last[2][4] = {};
    memcpy(last[0], gate + i, (size_t)(n - i) * 4);
    memcpy(last[1], up + i, (size_t)(n - i) * 4);
    vst1q_f32(last[0], vmulq_f32(activated<A>(vld1q_f32(last[0])), vld1q_f32(last[1])));
    memcpy(out + i, last[0], (size_t)(n - i) * 4);
}

static void gated(const float* gate, const float* up, int64_t n, int32_t activation, float* out) {
    if (activation == RV_SILU) gated_by<RV_SILU>(gate, up, n, out);
    else if (activation == RV_GELU_TANH) gated_by<RV_GELU_TANH>(gate, up, n, out);
    else gated_by<RV_GELU>(gate, up, n, out);
}

}  // namespace
