// Products of signed bytes with sdot (FEAT_DotProd): a quad of four rows with a quad of one token.
#pragma once
#include "vectors.h"

namespace {

struct Bytes {
    static constexpr int run = 4;  // columns of a token that stand together
    static inline void arrange(int8x16_t[16]) {}

    // See bytes_plain.h.
    template <bool, int NT, int QUADS, bool FINE>
    __attribute__((always_inline)) static inline void dot(const int8x16_t* w, const int8_t* q, const int8_t* r,
                                                          int32x4_t sums[2][NT]) {
        int32x4_t coarse[2][NT] = {}, rest[2][NT] = {};
        constexpr int held = 4 / NT;  // quads of all tokens in a register
        repeat<QUADS / held>([&](auto part) __attribute__((always_inline)) {
            const int8x16_t xq = vld1q_s8(q + 16 * part), xr = vld1q_s8(r + 16 * part);
            repeat<4>([&](auto lane) __attribute__((always_inline)) {
                constexpr int i = part * held + lane / NT, n = lane % NT;
                for (int j = 0; j < 2; j++) {
                    coarse[j][n] = vdotq_laneq_s32(coarse[j][n], w[2 * i + j], xq, lane);
                    if (FINE) rest[j][n] = vdotq_laneq_s32(rest[j][n], w[2 * i + j], xr, lane);
                }
            });
        });
        for (int j = 0; j < 2; j++)
            for (int n = 0; n < NT; n++) {
                sums[j][n] = vshlq_n_s32(coarse[j][n], 8);
                if (FINE) sums[j][n] = vaddq_s32(sums[j][n], rest[j][n]);
            }
    }
};

// Products of codes for coded.h: quads of unsigned bytes in four lanes with one quad of signed bytes. Codes of 8 bits
// are made signed.
template <int BITS> struct Dot {
    using Sum = VI;
    static constexpr bool centred = BITS == 8;
    static constexpr int run = 8;

    static inline Sum start(VI sum) { return sum; }
    static inline Sum add(Sum sum, VI w, int32_t x) {
        if (centred) w ^= (int32_t)0x80808080;
        return (VI)vdotq_s32((int32x4_t)sum, (int8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
    }
    static inline VI flush(VI, Sum sum) { return sum; }
};

}  // namespace
