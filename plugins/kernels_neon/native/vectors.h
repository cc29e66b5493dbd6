// Loads, sums and the exponential for registers of four floats.
// Everything is static: each translation unit keeps its own copy, compiled for its own level of the architecture.
#pragma once
#include <arm_neon.h>
#include <cstdint>
#include <cstring>
#include <utility>
#include "abi.h"
#include "lanes.h"

namespace {

// run(constant 0), run(constant 1), ... for instructions whose lane is part of the instruction.
template <class F, int... I>
__attribute__((always_inline)) static inline void repeat(F&& run, std::integer_sequence<int, I...>) {
    (run(std::integral_constant<int, I>{}), ...);
}
template <int N, class F> __attribute__((always_inline)) static inline void repeat(F&& run) {
    repeat(run, std::make_integer_sequence<int, N>{});
}

// Four float weights of a row, from column k.
template <int32_t S> static inline float32x4_t load4(const uint8_t* row, int64_t k) {
    if constexpr (S == RV_F32) return vreinterpretq_f32_u8(vld1q_u8(row + 4 * k));
    const uint16x4_t bits = vreinterpret_u16_u8(vld1_u8(row + 2 * k));
    if constexpr (S == RV_F16) return vcvt_f32_f16(vreinterpret_f16_u16(bits));
    return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}

template <int32_t S> static inline float load1(const uint8_t* row, int64_t k) {
    if constexpr (S == RV_F32) {
        float value;
        memcpy(&value, row + 4 * k, 4);
        return value;
    }
    uint16_t bits;
    memcpy(&bits, row + 2 * k, 2);
    if constexpr (S == RV_F16) return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0);
    return vgetq_lane_f32(vreinterpretq_f32_u32(vdupq_n_u32((uint32_t)bits << 16)), 0);
}

static inline float32x4_t halves(const uint8_t* p) { return load4<RV_F16>(p, 0); }

// Lane i of the result: the sum of x[i].
static inline float32x4_t sums(const float32x4_t x[4]) {
    return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
}

// e^x to about one unit in the last place: 2^n times a Taylor series on [-ln 2 / 2, ln 2 / 2]. Below e^-87: zero.
static inline float32x4_t exponential(float32x4_t x) {
    const uint32x4_t gone = vcltq_f32(x, vdupq_n_f32(-87.0f));
    x = vminq_f32(vmaxq_f32(x, vdupq_n_f32(-87.0f)), vdupq_n_f32(88.0f));
    const float32x4_t n = vrndnq_f32(vmulq_n_f32(x, 1.44269504f));
    // ln 2 in two parts: the first has so few bits that its product with n is exact.
    float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0.693359375f));
    r = vfmaq_f32(r, n, vdupq_n_f32(2.12194440e-4f));
    float32x4_t p = vdupq_n_f32(1.0f / 5040);
    for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = vfmaq_f32(vdupq_n_f32(term), p, r);
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    p = vmulq_f32(p, vreinterpretq_f32_s32(power));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(p), gone));
}

static inline float32x4_t tangent(float32x4_t x) {
    const float32x4_t bound = vdupq_n_f32(20.0f), one = vdupq_n_f32(1.0f);
    const float32x4_t e = exponential(vmulq_n_f32(vminq_f32(vmaxq_f32(x, vnegq_f32(bound)), bound), 2.0f));
    return vdivq_f32(vsubq_f32(e, one), vaddq_f32(e, one));
}

}  // namespace
