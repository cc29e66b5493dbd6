// Products of signed bytes on any armv8-a: added up in 16 bits as long as they cannot overflow, then in 32.
#pragma once
#include "vectors.h"

namespace {

struct Bytes {
    static constexpr int run = 4;  // columns of a token that stand together
    static inline void arrange(int8x16_t[16]) {}

    // sums[j][n] = 256 * (weights, q) + (weights, r) of four rows with token n, over QUADS quads. w[2 * i + j]: quad i
    // of the rows of register j. |weight| <= 32, or <= 128 if WIDE; |q|, |r| <= 127.
    template <bool WIDE, int NT, int QUADS, bool FINE>
    __attribute__((noinline)) static void dot(const int8x16_t* w, const int8_t* q, const int8_t* r,
                                              int32x4_t sums[2][NT]) {
        constexpr int chain = WIDE ? 2 : QUADS;
        static_assert(chain * 127 * (WIDE ? 128 : 32) < 32768);
        for (int n = 0; n < NT; n++)
            for (int j = 0; j < 2; j++) {
                const int32x4_t coarse = one<NT, QUADS, chain>(w + j, q + 4 * n);
                sums[j][n] = vshlq_n_s32(coarse, 8);
                if (FINE) sums[j][n] = vaddq_s32(sums[j][n], one<NT, QUADS, chain>(w + j, r + 4 * n));
            }
    }

  private:
    template <int NT, int QUADS, int CHAIN>
    static inline int32x4_t one(const int8x16_t* w, const int8_t* x) {
        int32x4_t first = vdupq_n_s32(0), second = first;  // rows 0 and 1, rows 2 and 3: two halves of each sum
        for (int from = 0; from < QUADS; from += CHAIN) {
            int16x8_t a = vdupq_n_s16(0), b = a;
            for (int i = from; i < from + CHAIN; i++) {
                int32_t four;
                memcpy(&four, x + 4 * NT * i, 4);
                const int8x8_t token = vreinterpret_s8_s32(vdup_n_s32(four));
                a = vmlal_s8(a, vget_low_s8(w[2 * i]), token);
                b = vmlal_s8(b, vget_high_s8(w[2 * i]), token);
            }
            first = vpadalq_s16(first, a);
            second = vpadalq_s16(second, b);
        }
        return vpaddq_s32(first, second);
    }
};

// Products of codes for coded.h: quads of unsigned bytes in four lanes with one quad of signed bytes. Codes of 8 bits
// are made signed.
template <int BITS> struct Dot {
    struct Sum {
        int16x8_t low, high;  // lanes 0 and 1, lanes 2 and 3: one product each
    };
    static constexpr bool centred = BITS == 8;
    static constexpr int run = BITS == 8 ? 2 : 16;
    static_assert(run * 127 * (BITS == 8 ? 128 : (1 << BITS) - 1) < 32768);

    static inline Sum start(VI) { return {vdupq_n_s16(0), vdupq_n_s16(0)}; }
    static inline Sum add(Sum sum, VI w, int32_t x) {
        if (centred) w ^= (int32_t)0x80808080;
        const int8x16_t codes = (int8x16_t)w;
        const int8x8_t four = vreinterpret_s8_s32(vdup_n_s32(x));
        return {vmlal_s8(sum.low, vget_low_s8(codes), four), vmlal_s8(sum.high, vget_high_s8(codes), four)};
    }
    static inline VI flush(VI total, Sum sum) {
        return total + (VI)vpaddq_s32(vpaddlq_s16(sum.low), vpaddlq_s16(sum.high));
    }
};

}  // namespace
