// Products of signed bytes with smmla (FEAT_I8MM): eight columns of two rows with eight of two tokens. A single token
// fills both places, with its coarse bytes and with its fine ones.
#pragma once
#include "vectors.h"

namespace {

struct Bytes {
    static constexpr int run = 8;  // columns of a token that stand together

    // From quads of four rows to octets of two: [octet][4 registers][2 rows][8 columns].
    static inline void arrange(int8x16_t w[16]) {
        for (int i = 0; i < 16; i += 4) {
            int32x4_t quads[4];
            for (int j = 0; j < 4; j++) quads[j] = vreinterpretq_s32_s8(w[i + j]);
            for (int j = 0; j < 2; j++) {
                w[i + 2 * j] = vreinterpretq_s8_s32(vzip1q_s32(quads[j], quads[2 + j]));
                w[i + 2 * j + 1] = vreinterpretq_s8_s32(vzip2q_s32(quads[j], quads[2 + j]));
            }
        }
    }

    // See bytes_plain.h; w as arranged above.
    template <bool, int NT, int QUADS, bool FINE>
    __attribute__((always_inline)) static inline void dot(const int8x16_t* w, const int8_t* q, const int8_t* r,
                                                          int32x4_t sums[2][NT]) {
        if constexpr (NT == 1) {
            int32x4_t both[4] = {};  // of each row: with q, with r
            for (int o = 0; o < QUADS / 2; o++) {
                const int8x16_t x = vcombine_s8(vld1_s8(q + 8 * o), FINE ? vld1_s8(r + 8 * o) : vdup_n_s8(0));
                for (int p = 0; p < 4; p++) both[p] = vmmlaq_s32(both[p], w[4 * o + p], x);
            }
            for (int j = 0; j < 2; j++)
                sums[j][0] = vaddq_s32(vshlq_n_s32(vuzp1q_s32(both[2 * j], both[2 * j + 1]), 8),
                                       vuzp2q_s32(both[2 * j], both[2 * j + 1]));
        } else {
            constexpr int pairs = NT / 2;  // of tokens
            int32x4_t coarse[4][pairs] = {}, rest[4][pairs] = {};
            for (int o = 0; o < QUADS / 2; o++)
                for (int t = 0; t < pairs; t++) {
                    const int at = 16 * (o * pairs + t);
                    const int8x16_t xq = vld1q_s8(q + at), xr = vld1q_s8(r + at);
                    for (int p = 0; p < 4; p++) {
                        coarse[p][t] = vmmlaq_s32(coarse[p][t], w[4 * o + p], xq);
                        if (FINE) rest[p][t] = vmmlaq_s32(rest[p][t], w[4 * o + p], xr);
                    }
                }
            for (int t = 0; t < pairs; t++)
                for (int j = 0; j < 2; j++) {
                    int32x4_t sum[2];
                    for (int p = 0; p < 2; p++) {
                        sum[p] = vshlq_n_s32(coarse[2 * j + p][t], 8);
                        if (FINE) sum[p] = vaddq_s32(sum[p], rest[2 * j + p][t]);
                    }
                    sums[j][2 * t] = vuzp1q_s32(sum[0], sum[1]);
                    sums[j][2 * t + 1] = vuzp2q_s32(sum[0], sum[1]);
                }
        }
    }
};

// Products of codes for coded.h: quads of unsigned bytes in four lanes with one quad of signed bytes. With usdot, which
// takes them as they are.
template <int BITS> struct Dot {
    using Sum = VI;
    static constexpr bool centred = false;
    static constexpr int run = 8;

    static inline Sum start(VI sum) { return sum; }
    static inline Sum add(Sum sum, VI w, int32_t x) {
        return (VI)vusdotq_s32((int32x4_t)sum, (uint8x16_t)w, vreinterpretq_s8_s32(vdupq_n_s32(x)));
    }
    static inline VI flush(VI, Sum sum) { return sum; }
};

}  // namespace
