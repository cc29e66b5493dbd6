// Products of float vectors: one with one, four with four, and y += a * x. Four registers at a time, fused.
#pragma once
#include "vectors.h"

namespace {

// Weights in any float format with floats.
template <int32_t S> static inline float dot(const uint8_t* row, const float* x, int64_t n) {
    float32x4_t sum[4] = {};
    int64_t k = 0;
    for (; k + 16 <= n; k += 16)
        for (int i = 0; i < 4; i++) sum[i] = vfmaq_f32(sum[i], load4<S>(row, k + 4 * i), vld1q_f32(x + k + 4 * i));
    for (; k + 4 <= n; k += 4) sum[0] = vfmaq_f32(sum[0], load4<S>(row, k), vld1q_f32(x + k));
    float rest = 0;
    for (; k < n; k++) rest += load1<S>(row, k) * x[k];
    return vaddvq_f32(sums(sum)) + rest;
}

// Lane r of out[t]: row r (`row_bytes` apart) with vector t (`stride` floats apart).
template <int32_t S>
static inline void dot4x4(const uint8_t* rows, int64_t row_bytes, const float* x, int64_t stride, int64_t n,
                          float32x4_t out[4]) {
    float32x4_t sum[4][4] = {};
    int64_t k = 0;
    for (; k + 4 <= n; k += 4) {
        float32x4_t w[4];
        for (int r = 0; r < 4; r++) w[r] = load4<S>(rows + r * row_bytes, k);
        for (int t = 0; t < 4; t++) {
            const float32x4_t one = vld1q_f32(x + t * stride + k);
            for (int r = 0; r < 4; r++) sum[t][r] = vfmaq_f32(sum[t][r], w[r], one);
        }
    }
    for (int t = 0; t < 4; t++) out[t] = sums(sum[t]);
    for (; k < n; k++) {
        float w[4];
        for (int r = 0; r < 4; r++) w[r] = load1<S>(rows + r * row_bytes, k);
        for (int t = 0; t < 4; t++) out[t] = vfmaq_n_f32(out[t], vld1q_f32(w), x[t * stride + k]);
    }
}

// y += a * x
static inline void axpy(float a, const float* x, float* y, int64_t n) {
    int64_t k = 0;
    for (; k + 16 <= n; k += 16)
        for (int64_t i = k; i < k + 16; i += 4)
            vst1q_f32(y + i, vfmaq_n_f32(vld1q_f32(y + i), vld1q_f32(x + i), a));
    for (; k < n; k++) y[k] += a * x[k];
}

}  // namespace
