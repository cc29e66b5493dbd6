// The weights of half a panel (eight rows, two registers of four rows) out of the planes and scales of packed.h.
#pragma once
#include "packed.h"
#include "vectors.h"

namespace {

constexpr int kHalfRows = kPanelRows / 2;

// Quads i = 0 ... 7 of a cell as signed bytes, [quad][2 registers][4 rows][4 columns]. A fixed offset is taken off
// here: the products then need no minimum, and nothing cancels.
template <int32_t S> static inline void half_cell(const uint8_t* cell, int half, int8x16_t w[16]) {
    using P = Packed<S>;
    for (int j = 0; j < 2; j++) {
        const uint8_t* p = cell + 32 * half + 16 * j;
        uint8x16_t quads[8];
        if constexpr (P::low == 8)
            for (int i = 0; i < 8; i++) quads[i] = vld1q_u8(p + 64 * i);
        if constexpr (P::low == 4)
            for (int i = 0; i < 4; i++) {
                const uint8x16_t both = vld1q_u8(p + 64 * i);
                quads[i] = both & 15;
                quads[i + 4] = both >> 4;
            }
        if constexpr (P::low == 2)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) quads[i] = vld1q_u8(p + 64 * (i / 4)) >> 2 * (i % 4) & 3;
        constexpr int low = P::low;
        if constexpr (P::high == 1) {
            const uint8x16_t bits = vld1q_u8(p + 64 * low);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++)
                quads[i] |= (i < low ? bits << (low - i) : bits >> (i - low)) & (uint8_t)(1 << low);
        }
        if constexpr (P::high == 2)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                const uint8x16_t bits = vld1q_u8(p + 64 * (low + i / 4));
                const int at = 2 * (i % 4);
                quads[i] |= (at < low ? bits << (low - at) : bits >> (at - low)) & (uint8_t)(3 << low);
            }
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) w[2 * i + j] = vreinterpretq_s8_u8(quads[i] - (uint8_t)P::offset);
    }
}

static inline void floats_of(uint16x8_t x, float32x4_t out[2]) {
    out[0] = vcvtq_f32_u32(vmovl_u16(vget_low_u16(x)));
    out[1] = vcvtq_f32_u32(vmovl_u16(vget_high_u16(x)));
}
static inline void floats_of(int16x8_t x, float32x4_t out[2]) {
    out[0] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(x)));
    out[1] = vcvtq_f32_s32(vmovl_s16(vget_high_s16(x)));
}

// Of group g of the block whose scales begin at p: value = scale * q - minimum, with q as above. Without minima the
// minimum is not set.
template <int32_t S>
static inline void half_scales(const uint8_t* p, int g, int half, float32x4_t scale[2], float32x4_t minimum[2]) {
    using P = Packed<S>;
    const int row = kHalfRows * half;
    const uint8_t *d = p + 2 * row, *m = p + 32 + 2 * row;
    const uint8_t* bytes = p + P::head + g * P::group_scales + row;
    float32x4_t times[2], less[2];  // of the group, of its minimum
    if constexpr (S == RV_Q4_K || S == RV_Q5_K) {
        floats_of(vmovl_u8(vld1_u8(bytes)), times);
        floats_of(vmovl_u8(vld1_u8(bytes + 16)), less);
    } else if constexpr (S == RV_Q2_K) {
        const uint8x8_t both = vld1_u8(bytes);
        floats_of(vmovl_u8(both & 15), times);
        floats_of(vmovl_u8(both >> 4), less);
    } else if constexpr (P::super) {
        floats_of(vmovl_s8(vreinterpret_s8_u8(vld1_u8(bytes))), times);
    }
    for (int j = 0; j < 2; j++) {
        scale[j] = halves(d + 8 * j);
        if constexpr (P::super) scale[j] *= times[j];
        if constexpr (P::minima && P::super) minimum[j] = halves(m + 8 * j) * less[j];
        if constexpr (P::minima && !P::super) minimum[j] = -halves(m + 8 * j);
    }
}

}  // namespace
