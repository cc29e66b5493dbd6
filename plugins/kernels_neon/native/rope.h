// Rotary positions (arXiv 2104.09864): pairs of a head turned by their angles, which are given as cosines and sines.
#pragma once
#include "vectors.h"

namespace {

static inline void turn(float32x4_t& a, float32x4_t& b, float32x4_t cos, float32x4_t sin) {
    const float32x4_t first = vfmsq_f32(vmulq_f32(a, cos), b, sin);
    b = vfmaq_f32(vmulq_f32(b, cos), a, sin);
    a = first;
}

// The pair i of a head is (x[2i], x[2i + 1]) if interleaved, else (x[i], x[i + rope_dim / 2]).
static void rope(float* x, int64_t heads, const RvModel& model, const float* cos, const float* sin) {
    const int64_t half = model.rope_dim / 2, step = model.rope_interleaved ? 2 : 1;
    const int64_t apart = model.rope_interleaved ? 1 : half;
    for (int64_t h = 0; h < heads; h++, x += model.head_dim) {
        int64_t i = 0;
        for (; i + 4 <= half; i += 4) {
            const float32x4_t c = vld1q_f32(cos + i), s = vld1q_f32(sin + i);
            if (model.rope_interleaved) {
                float32x4x2_t pairs = vld2q_f32(x + 2 * i);
                turn(pairs.val[0], pairs.val[1], c, s);
                vst2q_f32(x + 2 * i, pairs);
            } else {
                float32x4_t a = vld1q_f32(x + i), b = vld1q_f32(x + i + half);
                turn(a, b, c, s);
                vst1q_f32(x + i, a);
                vst1q_f32(x + i + half, b);
            }
        }
        for (; i < half; i++) {
            const float a = x[i * step], b = x[i * step + apart];
            x[i * step] = a * cos[i] - b * sin[i];
            x[i * step + apart] = b * cos[i] + a * sin[i];
        }
    }
}

}  // namespace
