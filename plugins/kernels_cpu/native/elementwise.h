// Norm, rope, activations: everything between the matrix products except attention.
#pragma once
#include <cmath>
#include "kernels.h"
#include "lanes.h"

namespace {

static void norm(float* total, const float* add, const float* weight, int64_t n, float eps, float* out) {
    V squares{};
    float rest = 0;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        V x = load(total + i);
        if (add) store(total + i, x = x + load(add + i));
        squares += x * x;
    }
    for (; i < n; i++) {
        if (add) total[i] += add[i];
        rest += total[i] * total[i];
    }
    const float scale = 1.0f / __builtin_sqrtf((sum(squares) + rest) / (float)n + eps);
    for (i = 0; i + kLanes <= n; i += kLanes) store(out + i, load(total + i) * scale * load(weight + i));
    for (; i < n; i++) out[i] = total[i] * scale * weight[i];
}

static inline V gate_of(V x, int32_t activation) {
    if (activation == RV_SILU) return x / (vexp(-x) + 1.0f);
    if (activation == RV_GELU_TANH) return x * 0.5f * (vtanh((x + x * x * x * 0.044715f) * 0.7978845608f) + 1.0f);
    V erf;
    for (int i = 0; i < kLanes; i++) erf[i] = erff(x[i] * 0.70710678118f);
    return x * 0.5f * (erf + 1.0f);
}

static void gated(const float* gate, const float* up, int64_t n, int32_t activation, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, gate_of(load(gate + i), activation) * load(up + i));
    if (i == n) return;
    float last[2][kLanes] = {};
    memcpy(last[0], gate + i, (size_t)(n - i) * 4);
    memcpy(last[1], up + i, (size_t)(n - i) * 4);
    const V y = gate_of(load(last[0]), activation) * load(last[1]);
    memcpy(out + i, &y, (size_t)(n - i) * 4);
}

static void rope(float* x, int64_t heads, const RvModel& model, const float* cos, const float* sin) {
    const int64_t half = model.rope_dim / 2, step = model.rope_interleaved ? 2 : 1;
    const int64_t apart = model.rope_interleaved ? 1 : half;
    for (int64_t h = 0; h < heads; h++, x += model.head_dim)
        for (int64_t i = 0; i < half; i++) {
            float &first = x[i * step], &second = x[i * step + apart];
            const float a = first, b = second;
            first = a * cos[i] - b * sin[i];
            second = b * cos[i] + a * sin[i];
        }
}

static void store_kv(const float* x, int64_t n, int32_t type, void* out) {
    if (type == RV_KV_F32) memcpy(out, x, (size_t)n * 4);
    else if (type == RV_KV_F16)
        for (int64_t i = 0; i < n; i++) ((uint16_t*)out)[i] = float_to_half(x[i]);
    else
        for (int64_t i = 0; i < n; i++) ((uint16_t*)out)[i] = float_to_bf16(x[i]);
}

static void softcap(float* x, int64_t n, float cap) {
    for (int64_t i = 0; i < n; i++) x[i] = cap * tanhf(x[i] / cap);
}

}  // namespace
