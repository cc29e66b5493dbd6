// Activations as one or two signed bytes: x = d * (256 * q + r), one d for each 32 columns of a token.
#pragma once
#include "kernels.h"
#include "vectors.h"

namespace {

struct Cell {
    int8_t q[32], r[32];
    float d;
    int32_t sums[2];  // of 256 * q + r, for each 16 columns
};

constexpr float kNothing = 1e-36f;  // smaller values have no reciprocal; they count as zero

template <bool FINE> static inline Cell quantized(const float* x) {
    Cell cell;
    float32x4_t v[8], top = vdupq_n_f32(0.0f);
    for (int i = 0; i < 8; i++) top = vmaxq_f32(top, vabsq_f32(v[i] = vld1q_f32(x + 4 * i)));
    const float largest = vmaxvq_f32(top);
    if (!(largest > kNothing)) return Cell{};
    const float inverse = 127.0f / largest;
    cell.d = largest / 127.0f / 256.0f;
    int16x4_t coarse[8], rest[8];
    for (int g = 0; g < 2; g++) {
        int32x4_t sum = vdupq_n_s32(0);
        for (int i = 4 * g; i < 4 * g + 4; i++) {
            const float32x4_t scaled = vmulq_n_f32(v[i], inverse), whole = vrndnq_f32(scaled);
            const int32x4_t high = vcvtq_s32_f32(whole);
            int32x4_t low = vdupq_n_s32(0);
            if (FINE) {
                const float32x4_t left = vmulq_n_f32(vsubq_f32(scaled, whole), 256.0f);
                low = vcvtnq_s32_f32(vminq_f32(vmaxq_f32(left, vdupq_n_f32(-127.0f)), vdupq_n_f32(127.0f)));
            }
            sum = vaddq_s32(sum, vaddq_s32(vshlq_n_s32(high, 8), low));
            coarse[i] = vqmovn_s32(high);
            rest[i] = vqmovn_s32(low);
        }
        cell.sums[g] = vaddvq_s32(sum);
    }
    for (int i = 0; i < 8; i += 2) {
        vst1_s8(cell.q + 4 * i, vqmovn_s16(vcombine_s16(coarse[i], coarse[i + 1])));
        vst1_s8(cell.r + 4 * i, vqmovn_s16(vcombine_s16(rest[i], rest[i + 1])));
    }
    return cell;
}

template <int RUN, bool FINE> static void quantize_tile(const Activations& to, int64_t t, int64_t width) {
    const int64_t cols = to.cols, cells = cols / 32;
    int8_t *q = to.q + t * cols, *r = FINE ? to.r + t * cols : nullptr;
    float *d = to.d + t * cells, *s32 = to.s32 + t * cells, *s16 = to.s16 + t * 2 * cells;
    for (int64_t n = 0; n < width; n++)
        for (int64_t c = 0; c < cells; c++) {
            Cell cell{};
            if (t + n < to.count) cell = quantized<FINE>(to.x + (t + n) * cols + 32 * c);
            for (int i = 0; i < 32; i += RUN) {
                memcpy(q + (c * 32 + i) * width + n * RUN, cell.q + i, RUN);
                if (FINE) memcpy(r + (c * 32 + i) * width + n * RUN, cell.r + i, RUN);
            }
            d[c * width + n] = cell.d;
            s16[2 * c * width + n] = cell.d * (float)cell.sums[0];
            s16[(2 * c + 1) * width + n] = cell.d * (float)cell.sums[1];
            s32[c * width + n] = cell.d * (float)(cell.sums[0] + cell.sums[1]);
        }
}

// The tile of tokens that begins with t. RUN columns of a token stand together, then those of the next token: 4 as
// kernels.h has it, or 8 for products that take eight.
template <int RUN> static void quantize(const Activations& to, int64_t t, int64_t width) {
    if (to.r) quantize_tile<RUN, true>(to, t, width);
    else quantize_tile<RUN, false>(to, t, width);
}

}  // namespace
