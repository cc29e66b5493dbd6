// One row of quantized weights with one token, 32 values in a register; shared by AVX2 and AVX-512.
// The including file has defined dot32<WIDE>(sum, unsigned weights, signed activations).
#pragma once
#include <immintrin.h>
#include "kernels.h"
#include "lanes.h"
#include "unpack.h"

namespace {

typedef __m256i Bytes;

static inline Bytes bytes32(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }

static inline Bytes nibbles32(const uint8_t* p) {
    const __m128i both = _mm_loadu_si128((const __m128i*)p);
    const Bytes wide = _mm256_inserti128_si256(_mm256_castsi128_si256(both), _mm_srli_epi16(both, 4), 1);
    return _mm256_and_si256(wide, _mm256_set1_epi8(15));
}

// Bit i of `bits` as 16 in byte i.
static inline Bytes fifth_bits(uint32_t bits) {
    const Bytes spread = _mm256_shuffle_epi8(
        _mm256_set1_epi32((int)bits),
        _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
    const Bytes own = _mm256_set1_epi64x((long long)0x8040201008040201);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, own), own), _mm256_set1_epi8(16));
}

static inline Bytes bits_at(Bytes x, int shift, int mask) {
    return _mm256_and_si256(_mm256_srl_epi16(x, _mm_cvtsi32_si128(shift)), _mm256_set1_epi8((char)mask));
}

static inline Bytes shifted(Bytes x, int shift) { return _mm256_sll_epi16(x, _mm_cvtsi32_si128(shift)); }

static inline float sum8(__m256 v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
}

// 32-value blocks: weights of one block, and what is subtracted for each of its units of scale.
template <int32_t S> static inline Bytes block_bytes(const uint8_t* p) {
    if constexpr (S == RV_Q4_0) return nibbles32(p + 2);
    if constexpr (S == RV_Q4_1) return nibbles32(p + 4);
    if constexpr (S == RV_Q5_0) return _mm256_or_si256(nibbles32(p + 6), fifth_bits(u32(p + 2)));
    if constexpr (S == RV_Q5_1) return _mm256_or_si256(nibbles32(p + 8), fifth_bits(u32(p + 4)));
    return _mm256_xor_si256(bytes32(p + 2), _mm256_set1_epi8((char)0x80));
}

template <int32_t S> static inline float simple_dot(const uint8_t* row, const int8_t* q, const float* d,
                                                    const float* s32, int64_t blocks) {
    constexpr bool has_minimum = S == RV_Q4_1 || S == RV_Q5_1;
    constexpr float offset = has_minimum ? -1.0f : S == RV_Q4_0 ? 8.0f : S == RV_Q5_0 ? 16.0f : 128.0f;
    __m256 total[2] = {};
    float less[2] = {};
    const auto one = [&](int64_t b, int to) {
        const uint8_t* p = row + b * Format<S>::bytes;
        const Bytes dot = dot32<S == RV_Q8_0>(_mm256_setzero_si256(), block_bytes<S>(p), bytes32(q + 32 * b));
        const float scale = half_at(p);
        total[to] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(scale * d[b]), total[to]);
        less[to] += (has_minimum ? half_at(p + 2) : scale) * s32[b];
    };
    int64_t b = 0;
    for (; b + 2 <= blocks; b += 2) one(b, 0), one(b + 1, 1);
    if (b < blocks) one(b, 0);
    return sum8(_mm256_add_ps(total[0], total[1])) - offset * (less[0] + less[1]);
}

// The g-th 32 values of a 256-value block.
template <int32_t S> static inline Bytes group_bytes(const uint8_t* p, int g) {
    if constexpr (S == RV_Q2_K) return bits_at(bytes32(p + 16 + 32 * (g / 4)), 2 * (g % 4), 3);
    if constexpr (S == RV_Q3_K)
        return _mm256_or_si256(bits_at(bytes32(p + 32 + 32 * (g / 4)), 2 * (g % 4), 3),
                               shifted(bits_at(bytes32(p), g, 1), 2));
    if constexpr (S == RV_Q4_K) return bits_at(bytes32(p + 16 + 32 * (g / 2)), 4 * (g % 2), 15);
    if constexpr (S == RV_Q5_K)
        return _mm256_or_si256(bits_at(bytes32(p + 48 + 32 * (g / 2)), 4 * (g % 2), 15),
                               shifted(bits_at(bytes32(p + 16), g, 1), 4));
    const int plane = g % 4;
    const Bytes low = bits_at(bytes32(p + 64 * (g / 4) + 32 * (plane % 2)), 4 * (plane / 2), 15);
    return _mm256_or_si256(low, shifted(bits_at(bytes32(p + 128 + 32 * (g / 4)), 2 * plane, 3), 4));
}

static inline __m256 floats_of(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
static inline __m256 floats_of(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

// Scales of sixteen (or eight) groups as floats, and the weighted sum of what is subtracted.
template <int32_t S>
static inline __m256 super_scales(const uint8_t* p, const float* s32, const float* s16, float* scale) {
    const auto put = [&](int at, float d, __m256 s) {
        _mm256_store_ps(scale + at, _mm256_mul_ps(_mm256_set1_ps(d), s));
    };
    if constexpr (S == RV_Q4_K || S == RV_Q5_K) {
        uint8_t s[8], m[8];
        six_bits(p + 4, s, m);
        put(0, half_at(p), floats_of(s));
        return _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(half_at(p + 2)), floats_of(m)), _mm256_loadu_ps(s32));
    } else if constexpr (S == RV_Q2_K) {
        uint8_t s[16], m[16];
        for (int i = 0; i < 16; i++) s[i] = p[i] & 15, m[i] = p[i] >> 4;
        for (int i = 0; i < 16; i += 8) put(i, half_at(p + 80), floats_of(s + i));
        const __m256 a = _mm256_mul_ps(floats_of(m), _mm256_loadu_ps(s16));
        const __m256 b = _mm256_mul_ps(floats_of(m + 8), _mm256_loadu_ps(s16 + 8));
        return _mm256_mul_ps(_mm256_set1_ps(half_at(p + 82)), _mm256_add_ps(a, b));
    } else {
        int8_t s[16];
        const float d = half_at(p + (S == RV_Q3_K ? 108 : 208));
        if constexpr (S == RV_Q3_K) six_bits_q3(p + 96, s);
        else memcpy(s, p + 192, 16);
        for (int i = 0; i < 16; i += 8) put(i, d, floats_of(s + i));
        const __m256 a = _mm256_mul_ps(_mm256_load_ps(scale), _mm256_loadu_ps(s16));
        const __m256 b = _mm256_mul_ps(_mm256_load_ps(scale + 8), _mm256_loadu_ps(s16 + 8));
        return _mm256_mul_ps(_mm256_set1_ps(S == RV_Q3_K ? 4.0f : 32.0f), _mm256_add_ps(a, b));
    }
}

template <int32_t S> static inline float super_dot(const uint8_t* row, const int8_t* q, const float* d,
                                                   const float* s32, const float* s16, int64_t blocks) {
    __m256 total[2] = {}, less = _mm256_setzero_ps();
    for (int64_t b = 0; b < blocks; b++, row += Format<S>::bytes, q += 256, d += 8, s32 += 8, s16 += 16) {
        alignas(32) float scale[16];
        less = _mm256_add_ps(less, super_scales<S>(row, s32, s16, scale));
        if constexpr (Format<S>::group == 32)
            _mm256_store_ps(scale, _mm256_mul_ps(_mm256_load_ps(scale), _mm256_loadu_ps(d)));
#pragma GCC unroll 8
        for (int g = 0; g < 8; g++) {
            const Bytes dot = dot32<false>(_mm256_setzero_si256(), group_bytes<S>(row, g), bytes32(q + 32 * g));
            __m256 factor;
            if constexpr (Format<S>::group == 32) factor = _mm256_broadcast_ss(scale + g);
            else {
                const __m128 low = _mm_broadcast_ss(scale + 2 * g), high = _mm_broadcast_ss(scale + 2 * g + 1);
                factor = _mm256_mul_ps(_mm256_set_m128(high, low), _mm256_broadcast_ss(d + g));
            }
            total[g % 2] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), factor, total[g % 2]);
        }
    }
    return sum8(_mm256_sub_ps(_mm256_add_ps(total[0], total[1]), less));
}

template <int32_t S> static float row_dot(const uint8_t* row, const Activations& x, int64_t t) {
    const int8_t* q = x.q + t * x.cols;
    const float *d = x.d + t * (x.cols / 32), *s32 = x.s32 + t * (x.cols / 32), *s16 = x.s16 + t * (x.cols / 16);
    if constexpr (Format<S>::block == 32) return simple_dot<S>(row, q, d, s32, x.cols / 32);
    else return super_dot<S>(row, q, d, s32, s16, x.cols / 256);
}

}  // namespace
