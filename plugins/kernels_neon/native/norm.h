// RMSNorm (arXiv 1910.07467) of a sum: the residual and what is added to it.
#pragma once
#include "vectors.h"

namespace {

static void norm(float* total, const float* add, const float* weight, int64_t n, float eps, float* out) {
    float32x4_t squares[4] = {};
    const auto four = [&](int64_t i, float32x4_t& sum) {
        float32x4_t x = vld1q_f32(total + i);
        if (add) vst1q_f32(total + i, x = vaddq_f32(x, vld1q_f32(add + i)));
        sum = vfmaq_f32(sum, x, x);
    };
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 4; k++) four(i + 4 * k, squares[k]);
    for (; i + 4 <= n; i += 4) four(i, squares[0]);
    float rest = 0;
    for (; i < n; i++) {
        if (add) total[i] += add[i];
        rest += total[i] * total[i];
    }
    const float scale = 1.0f / __builtin_sqrtf((vaddvq_f32(sums(squares)) + rest) / (float)n + eps);
    for (i = 0; i + 4 <= n; i += 4)
        vst1q_f32(out + i, vmulq_f32(vmulq_n_f32(vld1q_f32(total + i), scale), vld1q_f32(weight + i)));
    for (; i < n; i++) out[i] = total[i] * scale * weight[i];
}

}  // namespace
