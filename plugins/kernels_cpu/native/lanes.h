// A register of floats, in the compiler's own vector types: one source for every instruction set.
// Everything is static: each translation unit must keep its own copy, compiled with its own flags.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

// No wider than a register: GCC keeps wider vectors in memory.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float V __attribute__((vector_size(4 * kLanes)));
typedef int32_t VI __attribute__((vector_size(4 * kLanes)));

static inline V splat(float x) { return V{} + x; }
static inline V load(const float* p) { V v; memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }
static inline V select(VI mask, V a, V b) { return (V)(((VI)a & mask) | ((VI)b & ~mask)); }
static inline V vmax(V a, V b) { return select(a > b, a, b); }
static inline V vmin(V a, V b) { return select(a < b, a, b); }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

static inline float sum(V v) {
    float x[kLanes];
    memcpy(x, &v, sizeof x);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    return x[0];
}

static inline float largest(V v) {
    float x[kLanes];
    memcpy(x, &v, sizeof x);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
    return x[0];
}

// e^x to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Tiny results become 0.
static inline V vexp(V x) {
    const VI gone = x < -87.0f;
    x = vmin(vmax(x, splat(-87.0f)), splat(88.0f));
    const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    V n = x * 1.44269504f + magic;
    n = n - magic;
    V r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    V p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const VI power = (__builtin_convertvector(n, VI) + 127) << 23;
    return select(gone, V{}, p * (V)power);
}

static inline V vtanh(V x) {
    const V e = vexp(vmin(vmax(x * 2.0f, splat(-40.0f)), splat(40.0f)));
    return (e - 1.0f) / (e + 1.0f);
}

static inline float half_to_float(uint16_t h) {
#if defined(__F16C__)
    return _cvtsh_ss(h);
#else
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t bits;
    if (rest >= 0x7c00) bits = 0x7f800000 | (rest & 0x3ff) << 13;
    else if (rest >= 0x0400) bits = (rest << 13) + (112u << 23);
    else {  // subnormal: exact in a float
        const float f = (float)rest * 5.9604644775390625e-8f;
        memcpy(&bits, &f, 4);
    }
    bits |= sign;
    float out;
    memcpy(&out, &bits, 4);
    return out;
#endif
}

// Round to nearest even, as NumPy does.
static inline uint16_t float_to_half(float f) {
#if defined(__F16C__)
    return (uint16_t)_cvtss_sh(f, 0);
#else
    uint32_t bits;
    memcpy(&bits, &f, 4);
    const uint32_t sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (rest < 0x38800000) {  // subnormal half: adding 0.5 leaves its bits at the bottom, rounded by the hardware
        float magnitude;
        memcpy(&magnitude, &rest, 4);
        magnitude += 0.5f;
        uint32_t low;
        memcpy(&low, &magnitude, 4);
        return (uint16_t)(sign | (low - 0x3f000000));
    }
    const uint32_t even = rest >> 13 & 1;
    return (uint16_t)(sign | ((rest - (112u << 23) + 0xfff + even) >> 13));
#endif
}

static inline V load_half(const uint16_t* p) {
#if defined(__AVX512F__)
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
    return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    V v;
    for (int i = 0; i < kLanes; i++) v[i] = half_to_float(p[i]);
    return v;
#endif
}

static inline V load_bf16(const uint16_t* p) {
    typedef uint16_t H __attribute__((vector_size(2 * kLanes)));
    H h;
    memcpy(&h, p, sizeof h);
    return (V)(__builtin_convertvector(h, VI) << 16);
}

}  // namespace
