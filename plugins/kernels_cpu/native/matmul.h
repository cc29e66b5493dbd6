// Matrix products. A few tokens: each row of weights against each token, straight from the blocks. Many tokens:
// sixteen rows are unpacked into a panel, one row a lane, which then meets every token without a horizontal sum.
// The including file has defined dot4<WIDE>, row_dot<S> and kTile, the tokens a panel meets at a time.
#pragma once
#include "kernels.h"
#include "lanes.h"
#include "unpack.h"

namespace {

constexpr int64_t kFewTokens = 4;  // up to here unpacking a panel costs more than it saves

// Panel: bytes [cols / 4][16 rows][4], scales and minima [groups][16 rows].
template <int32_t S>
static void fill_panel(const RvMatrix& w, int64_t begin, int64_t rows, uint8_t* q, float* scale, float* minimum) {
    using F = Format<S>;
    constexpr int groups = F::block / F::group;
    alignas(64) uint8_t bytes[F::block];
    float s[groups], m[groups];
    for (int64_t block = 0; block < w.cols / F::block; block++) {
        uint8_t* to = q + block * F::block * kPanelRows;
        float *to_scale = scale + block * groups * kPanelRows, *to_minimum = minimum + block * groups * kPanelRows;
        for (int64_t r = 0; r < rows; r++) {
            F::unpack(w.data + (begin + r) * w.row_bytes + block * F::bytes, bytes, s, m);
#pragma GCC unroll 8
            for (int i = 0; i < F::block / 4; i++) memcpy(to + (i * kPanelRows + r) * 4, bytes + 4 * i, 4);
            for (int g = 0; g < groups; g++) {
                to_scale[g * kPanelRows + r] = s[g];
                to_minimum[g * kPanelRows + r] = m[g];
            }
        }
    }
}

constexpr int kParts = kPanelRows / kLanes;  // registers that hold a number for each row of a panel

// out: [NT][kPanelRows]
template <int32_t S, int NT>
static inline void panel_dot(const uint8_t* q, const float* scale, const float* minimum, const Activations& x,
                             int64_t t, float* out) {
    constexpr int group = Format<S>::group;
    const int64_t groups = x.cols / group, blocks = x.cols / 32;
    const float* sums = group == 32 ? x.s32 : x.s16;
    V total[NT][kParts] = {};
    for (int64_t g = 0; g < groups; g++) {
        VI dots[NT][kParts] = {};
        for (int i = 0; i < group / 4; i++) {
            VI w[kParts];
#pragma GCC unroll 16
            for (int j = 0; j < kParts; j++)
                memcpy(&w[j], q + (g * (group / 4) + i) * kPanelRows * 4 + 4 * j * kLanes, sizeof w[j]);
#pragma GCC unroll 16
            for (int n = 0; n < NT; n++) {
                int32_t four;
                memcpy(&four, x.q + (t + n) * x.cols + g * group + 4 * i, 4);
#pragma GCC unroll 16
                for (int j = 0; j < kParts; j++) dots[n][j] = dot4<S == RV_Q8_0>(dots[n][j], w[j], four);
            }
        }
#pragma GCC unroll 16
        for (int j = 0; j < kParts; j++) {
            const V s = load(scale + g * kPanelRows + j * kLanes), m = load(minimum + g * kPanelRows + j * kLanes);
#pragma GCC unroll 16
            for (int n = 0; n < NT; n++) {
                total[n][j] += __builtin_convertvector(dots[n][j], V) * (s * x.d[(t + n) * blocks + g * group / 32]);
                total[n][j] -= m * sums[(t + n) * groups + g];
            }
        }
    }
#pragma GCC unroll 16
    for (int n = 0; n < NT; n++)
#pragma GCC unroll 16
        for (int j = 0; j < kParts; j++) store(out + n * kPanelRows + j * kLanes, total[n][j]);
}

template <int NT>
static inline void float_panel_dot(const float* panel, const Activations& x, int64_t t, float* out) {
    V total[NT][kParts] = {};
    for (int64_t k = 0; k < x.cols; k++)
#pragma GCC unroll 16
        for (int j = 0; j < kParts; j++) {
            const V w = load(panel + k * kPanelRows + j * kLanes);
#pragma GCC unroll 16
            for (int n = 0; n < NT; n++) total[n][j] += w * x.x[(t + n) * x.cols + k];
        }
#pragma GCC unroll 16
    for (int n = 0; n < NT; n++)
#pragma GCC unroll 16
        for (int j = 0; j < kParts; j++) store(out + n * kPanelRows + j * kLanes, total[n][j]);
}

static inline void put(const float* found, int count, int64_t rows, const float* bias, float* out, int64_t stride) {
    for (int n = 0; n < count; n++, found += kPanelRows, out += stride)
        for (int64_t r = 0; r < rows; r++) out[r] = bias ? found[r] + bias[r] : found[r];
}

// run(tag of NT, t): tiles of kTile tokens, then single ones.
template <class F> static inline void tiles(int64_t count, F&& run) {
    int64_t t = 0;
    for (; t + kTile <= count; t += kTile) run(Tag<kTile>{}, t);
    for (; t < count; t++) run(Tag<1>{}, t);
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
        tiles(x.count, [&](auto tag, int64_t t) {
            float found[decltype(tag)::scheme * kPanelRows];
            float_panel_dot<decltype(tag)::scheme>(panel, x, t, found);
            put(found, decltype(tag)::scheme, rows, w.bias ? w.bias + r : nullptr, out + t * stride + r, stride);
        });
    }
}

static void matmul(const RvMatrix& w, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride,
                   void* scratch) {
    if (is_float(w.scheme)) return float_matmul(w, x, begin, end, out, stride, (float*)scratch);
    with_scheme(w.scheme, [&](auto scheme) {
        constexpr int32_t S = decltype(scheme)::scheme;
        if (x.count <= kFewTokens) {
            for (int64_t r = begin; r < end; r++) {
                const uint8_t* row = w.data + r * w.row_bytes;
                for (int64_t t = 0; t < x.count; t++) {
                    const float y = row_dot<S>(row, x, t);
                    out[t * stride + r] = w.bias ? y + w.bias[r] : y;
                }
            }
            return;
        }
        const int64_t groups = w.cols / Format<S>::group;
        float *scale = (float*)scratch, *minimum = scale + groups * kPanelRows;
        uint8_t* q = (uint8_t*)(minimum + groups * kPanelRows);
        memset(scratch, 0, (size_t)(groups * kPanelRows * 8 + w.cols * kPanelRows));
        for (int64_t r = begin; r < end; r += kPanelRows) {
            const int64_t rows = least(kPanelRows, end - r);
            fill_panel<S>(w, r, rows, q, scale, minimum);
            tiles(x.count, [&](auto tag, int64_t t) {
                float found[decltype(tag)::scheme * kPanelRows];
                panel_dot<S, decltype(tag)::scheme>(q, scale, minimum, x, t, found);
                put(found, decltype(tag)::scheme, rows, w.bias ? w.bias + r : nullptr, out + t * stride + r, stride);
            });
        }
    });
}

static void decode_row(const RvMatrix& w, int64_t row, float* out, void*) {
    const uint8_t* data = w.data + row * w.row_bytes;
    if (is_float(w.scheme)) {
        for (int64_t k = 0; k < w.cols; k++) out[k] = load_weight(w.scheme, data, k);
        return;
    }
    with_scheme(w.scheme, [&](auto scheme) {
        using F = Format<decltype(scheme)::scheme>;
        uint8_t q[F::block];
        float s[16], m[16];
        for (int64_t b = 0; b < w.cols / F::block; b++) {
            F::unpack(data + b * F::bytes, q, s, m);
            for (int i = 0; i < F::block; i++) out[b * F::block + i] = s[i / F::group] * (float)q[i] - m[i / F::group];
        }
    });
}

// Symmetric int8 in blocks of 32, rounded to nearest even.
static void quantize(const float* x, int64_t n, int8_t* q, float* d, float* s32, float* s16) {
    for (int64_t b = 0; b < n / 32; b++, x += 32, q += 32) {
        V most{};
        for (int i = 0; i < 32; i += kLanes) most = vmax(most, vmax(load(x + i), -load(x + i)));
        const float top = largest(most);
        d[b] = top / 127.0f;
        const float inverse = top > 0 ? 127.0f / top : 0.0f;
        int32_t sums[2] = {};
        for (int i = 0; i < 32; i += kLanes) {
            typedef int8_t Short __attribute__((vector_size(kLanes)));
            // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
            const VI whole = (VI)(load(x + i) * inverse + 12582912.0f) - 0x4b400000;
            const Short few = __builtin_convertvector(whole, Short);
            memcpy(q + i, &few, sizeof few);
            for (int k = 0; k < kLanes; k++) sums[i / 16] += whole[k];
        }
        s16[2 * b] = d[b] * (float)sums[0];
        s16[2 * b + 1] = d[b] * (float)sums[1];
        s32[b] = d[b] * (float)(sums[0] + sums[1]);
    }
}

}  // namespace
