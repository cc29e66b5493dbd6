// Products of packed weights (packed.h) with tiles of tokens. The including file has defined Bytes, the products of
// signed bytes of its level of the architecture.
#pragma once
#include "cells.h"
#include "levels.h"
#include "quantize.h"

namespace {

// Weights straight from the packed panel: for a single tile of tokens, which meets each of them once.
template <int32_t S> struct PackedPanel {
    using P = Packed<S>;
    const uint8_t *planes, *scales_of;

    PackedPanel(const uint8_t* panel, int64_t cols) : planes(panel), scales_of(panel + P::planes_bytes(cols)) {}
    inline const int8x16_t* weights(int64_t c, int half, int8x16_t room[16]) const {
        half_cell<S>(planes + c * P::planes, half, room);
        Bytes::arrange(room);
        return room;
    }
    inline void scales(int64_t c, int g, int half, float32x4_t scale[2], float32x4_t minimum[2]) const {
        constexpr int cells = P::block / 32;
        const uint8_t* block = scales_of + c / cells * P::scales;
        half_scales<S>(block, (int)(c % cells) * (32 / P::group) + g, half, scale, minimum);
    }
};

// The same weights unpacked, once for all tiles: bytes [cells][2 halves][16 registers], floats [groups][16 rows].
template <int32_t S> struct OpenPanel {
    using P = Packed<S>;
    static constexpr int groups = 32 / P::group;
    int8x16_t* bytes;
    float *scale_of, *minimum_of;

    OpenPanel(void* scratch, int64_t cols)
        : bytes((int8x16_t*)scratch), scale_of((float*)(bytes + cols)),
          minimum_of(scale_of + cols / P::group * kPanelRows) {}

    void fill(const PackedPanel<S>& from, int64_t cols) const {
        for (int64_t c = 0; c < cols / 32; c++)
            for (int half = 0; half < 2; half++) {
                from.weights(c, half, bytes + (c * 2 + half) * 16);
                for (int g = 0; g < groups; g++) {
                    float32x4_t scale[2], minimum[2];
                    from.scales(c, g, half, scale, minimum);
                    const int64_t at = (c * groups + g) * kPanelRows + half * kHalfRows;
                    for (int j = 0; j < 2; j++) {
                        vst1q_f32(scale_of + at + 4 * j, scale[j]);
                        if (P::minima) vst1q_f32(minimum_of + at + 4 * j, minimum[j]);
                    }
                }
            }
    }
    inline const int8x16_t* weights(int64_t c, int half, int8x16_t*) const { return bytes + (c * 2 + half) * 16; }
    inline void scales(int64_t c, int g, int half, float32x4_t scale[2], float32x4_t minimum[2]) const {
        const int64_t at = (c * groups + g) * kPanelRows + half * kHalfRows;
        for (int j = 0; j < 2; j++) {
            scale[j] = vld1q_f32(scale_of + at + 4 * j);
            if (P::minima) minimum[j] = vld1q_f32(minimum_of + at + 4 * j);
        }
    }
};

// One panel with the tile of NT tokens that begins with t: out[NT][kPanelRows]. FINE: with r, else with q alone.
template <int32_t S, int NT, bool FINE, class Panel>
static void panel_tile(const Panel& panel, const Activations& x, int64_t t, float* out) {
    using P = Packed<S>;
    constexpr int groups = 32 / P::group, quads = P::group / 4;
    const int64_t cells = x.cols / 32;
    const int8_t *q = x.q + t * x.cols, *r = FINE ? x.r + t * x.cols : q;
    const float *d = x.d + t * cells, *sums_of = groups == 1 ? x.s32 + t * cells : x.s16 + t * 2 * cells;
    for (int half = 0; half < 2; half++) {
        float32x4_t total[2][NT] = {};
        for (int64_t c = 0; c < cells; c++) {
            int8x16_t room[16];
            const int8x16_t* w = panel.weights(c, half, room);
#pragma GCC unroll 2
            for (int g = 0; g < groups; g++) {
                const int64_t at = c * groups + g, from = at * P::group * NT;
                int32x4_t dots[2][NT];
                Bytes::dot<P::low == 8, NT, quads, FINE>(w + 2 * quads * g, q + from, r + from, dots);
                float32x4_t scale[2], minimum[2];
                panel.scales(c, g, half, scale, minimum);
                for (int j = 0; j < 2; j++)
                    for (int n = 0; n < NT; n++) {
                        total[j][n] = vfmaq_f32(total[j][n], vcvtq_f32_s32(dots[j][n]),
                                                vmulq_n_f32(scale[j], d[c * NT + n]));
                        if constexpr (P::minima)
                            total[j][n] = vfmsq_n_f32(total[j][n], minimum[j], sums_of[at * NT + n]);
                    }
            }
        }
        for (int n = 0; n < NT; n++)
            for (int j = 0; j < 2; j++) vst1q_f32(out + n * kPanelRows + half * kHalfRows + 4 * j, total[j][n]);
    }
}

// Rows [r, r + kPanelRows) of w with one tile; rows and tokens that are not there are left out.
template <int32_t S, bool FINE, class Panel>
static void panel_product(const Panel& panel, const RvMatrix& w, const Activations& x, int64_t t, int64_t r, float* out,
                          int64_t stride) {
    float found[kTokens * kPanelRows];
    const int64_t width = tile_width(x.count, t, kTokens);
    if (width == 4) panel_tile<S, 4, FINE>(panel, x, t, found);
    else if (width == 2) panel_tile<S, 2, FINE>(panel, x, t, found);
    else panel_tile<S, 1, FINE>(panel, x, t, found);
    const int64_t rows = least(kPanelRows, w.rows - r), tokens = least(width, x.count - t);
    for (int64_t n = 0; n < tokens; n++)
        for (int64_t i = 0; i < rows; i++)
            out[(t + n) * stride + r + i] = found[n * kPanelRows + i] + (w.bias ? w.bias[r + i] : 0.0f);
}

template <int32_t S, bool FINE>
static void packed_rows(const Matrix& w, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride,
                        void* scratch) {
    for (int64_t r = begin; r < end; r += kPanelRows) {
        const PackedPanel<S> packed(w.panels + r / kPanelRows * w.panel_bytes, x.cols);
        if (x.count <= kTokens) {
            panel_product<S, FINE>(packed, w.source, x, 0, r, out, stride);
            continue;
        }
        const OpenPanel<S> open(scratch, x.cols);
        open.fill(packed, x.cols);
        for (int64_t t = 0; t < x.count; t += kTokens) panel_product<S, FINE>(open, w.source, x, t, r, out, stride);
    }
}

static void quantized_matmul(const Matrix& w, const Activations& x, int64_t begin, int64_t end, float* out,
                             int64_t stride, void* scratch) {
    with_scheme(w.source.scheme, [&](auto scheme) {
        constexpr int32_t S = decltype(scheme)::scheme;
        if (x.r) packed_rows<S, true>(w, x, begin, end, out, stride, scratch);
        else packed_rows<S, false>(w, x, begin, end, out, stride, scratch);
    });
}

}  // namespace
