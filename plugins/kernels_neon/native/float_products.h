// Products of float weights (f32, f16, bf16), read where they are mapped: four rows with four tokens, the rest by ones.
#pragma once
#include "dot.h"
#include "kernels.h"

namespace {

template <int32_t S>
static void float_rows(const RvMatrix& w, const Activations& x, int64_t begin, int64_t end, float* out,
                       int64_t stride) {
    const auto put = [&](int64_t t, int64_t r, float value) {
        out[t * stride + r] = w.bias ? value + w.bias[r] : value;
    };
    for (int64_t r = begin; r < end; r += 4) {
        const uint8_t* rows = w.data + r * w.row_bytes;
        const int64_t count = least(4, end - r);
        int64_t t = 0;
        for (; count == 4 && t + 4 <= x.count; t += 4) {
            float32x4_t found[4];
            dot4x4<S>(rows, w.row_bytes, x.x + t * x.cols, x.cols, x.cols, found);
            for (int n = 0; n < 4; n++)
                for (int i = 0; i < 4; i++) put(t + n, r + i, found[n][i]);
        }
        for (; t < x.count; t++)
            for (int64_t i = 0; i < count; i++)
                put(t, r + i, dot<S>(rows + i * w.row_bytes, x.x + t * x.cols, x.cols));
    }
}

static void float_matmul(const RvMatrix& w, const Activations& x, int64_t begin, int64_t end, float* out,
                         int64_t stride) {
    if (w.scheme == RV_F32) float_rows<RV_F32>(w, x, begin, end, out, stride);
    else if (w.scheme == RV_F16) float_rows<RV_F16>(w, x, begin, end, out, stride);
    else float_rows<RV_BF16>(w, x, begin, end, out, stride);
}

}  // namespace
