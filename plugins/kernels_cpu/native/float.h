// Products of float weights (f32, f16, bf16), used where they are mapped: a few tokens with each row, many with panels
// of sixteen rows turned so that every lane is a row.
#pragma once
#include "kernels.h"
#include "lanes.h"
#include "unpack.h"

namespace {

constexpr int64_t kFewTokens = 4;  // up to here turning a panel costs more than it saves
constexpr int kFloatTile = kLanes == 16 ? 12 : 3;
constexpr int kFloatParts = kPanelRows / kLanes;

static inline void put(const float* found, int count, int64_t rows, const float* bias, float* out, int64_t stride) {
    for (int n = 0; n < count; n++, found += kPanelRows, out += stride)
        for (int64_t r = 0; r < rows; r++) out[r] = bias ? found[r] + bias[r] : found[r];
}

template <int NT>
static inline void float_panel_dot(const float* panel, const Activations& x, int64_t t, float* out) {
    V total[NT][kFloatParts] = {};
    for (int64_t k = 0; k < x.cols; k++)
#pragma GCC unroll 16
        for (int j = 0; j < kFloatParts; j++) {
            const V w = load(panel + k * kPanelRows + j * kLanes);
#pragma GCC unroll 16
            for (int n = 0; n < NT; n++) total[n][j] += w * x.x[(t + n) * x.cols + k];
        }
#pragma GCC unroll 16
    for (int n = 0; n < NT; n++)
#pragma GCC unroll 16
        for (int j = 0; j < kFloatParts; j++) store(out + n * kPanelRows + j * kLanes, total[n][j]);
}

static float float_dot(int32_t scheme, const uint8_t* row, const float* x, int64_t n) {
    V a{}, b{};
    int64_t k = 0;
    for (; k + 2 * kLanes <= n; k += 2 * kLanes) {
        a += load_weights(scheme, row, k) * load(x + k);
        b += load_weights(scheme, row, k + kLanes) * load(x + k + kLanes);
    }
    float rest = 0;
    for (; k < n; k++) rest += load_weight(scheme, row, k) * x[k];
    return sum(a + b) + rest;
}

static void float_matmul(const RvMatrix& w, const Activations& x, int64_t begin, int64_t end, float* out,
                         int64_t stride, float* panel) {
    if (x.count <= kFewTokens) {
        for (int64_t r = begin; r < end; r++)
            for (int64_t t = 0; t < x.count; t++) {
                const float y = float_dot(w.scheme, w.data + r * w.row_bytes, x.x + t * x.cols, x.cols);
                out[t * stride + r] = w.bias ? y + w.bias[r] : y;
            }
        return;
    }
    for (int64_t r = begin; r < end; r += kPanelRows) {
        const int64_t rows = least(kPanelRows, end - r);
        for (int64_t k = 0; k < w.cols; k++)
            for (int64_t i = 0; i < kPanelRows; i++)
                panel[k * kPanelRows + i] =
                    i < rows ? load_weight(w.scheme, w.data + (r + i) * w.row_bytes, k) : 0.0f;
        const auto tokens = [&](auto tag, int64_t t) {
            constexpr int NT = decltype(tag)::scheme;
            float found[NT * kPanelRows];
            float_panel_dot<NT>(panel, x, t, found);
            put(found, NT, rows, w.bias ? w.bias + r : nullptr, out + t * stride + r, stride);
        };
        int64_t t = 0;
        for (; t + kFloatTile <= x.count; t += kFloatTile) tokens(Tag<kFloatTile>{}, t);
        for (; t < x.count; t++) tokens(Tag<1>{}, t);
    }
}

static void decode_row(const RvMatrix& w, int64_t row, float* out) {
    const uint8_t* data = w.data + row * w.row_bytes;
    if (is_float(w.scheme)) {
        for (int64_t k = 0; k < w.cols; k++) out[k] = load_weight(w.scheme, data, k);
        return;
    }
    with_scheme(w.scheme, [&](auto scheme) {
        constexpr int32_t S = decltype(scheme)::scheme;
        using F = Format<S>;
        uint8_t q[F::block];
        float s[16], m[16];
        for (int64_t b = 0; b < w.cols / F::block; b++, data += F::bytes, out += F::block) {
            F::values(data, q);
            F::scales(data, s, m);
            for (int i = 0; i < F::block; i++) out[i] = s[i / Packed<S>::group] * (float)q[i] - m[i / Packed<S>::group];
        }
    });
}

}  // namespace
