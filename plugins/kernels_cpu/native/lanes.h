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
#if defined(__AVX512F__)
static inline V vmax(V a, V b) { return (V)_mm512_max_ps((__m512)a, (__m512)b); }
static inline V vmin(V a, V b) { return (V)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(__AVX2__)
static inline V vmax(V a, V b) { return (V)_mm256_max_ps((__m256)a, (__m256)b); }
static inline V vmin(V a, V b) { return (V)_mm256_min_ps((__m256)a, (__m256)b); }
#else
static inline V vmax(V a, V b) { return select(a > b, a, b); }
static inline V vmin(V a, V b) { return select(a < b, a, b); }
#endif
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// The two halves of a and b, woven: a0 b0 a1 b1 ... Doing this log2(kLanes) times to the registers of a square, each i
// with i + half, turns the square.
#if defined(__AVX512F__)
#define RV_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define RV_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define RV_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define RV_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define RV_LOW 0, 4, 1, 5
#define RV_HIGH 2, 6, 3, 7
#endif
#if defined(__clang__)
static inline V weave_low(V a, V b) { return __builtin_shufflevector(a, b, RV_LOW); }
static inline V weave_high(V a, V b) { return __builtin_shufflevector(a, b, RV_HIGH); }
#else
static inline V weave_low(V a, V b) { return __builtin_shuffle(a, b, VI{RV_LOW}); }
static inline V weave_high(V a, V b) { return __builtin_shuffle(a, b, VI{RV_HIGH}); }
#endif

// Turns a square of kLanes registers.
static inline void turn(V* x) {
    V y[kLanes];
#pragma GCC unroll 4
    for (int width = 1; width < kLanes; width *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / 2; i++) {
            y[2 * i] = weave_low(x[i], x[i + kLanes / 2]);
            y[2 * i + 1] = weave_high(x[i], x[i + kLanes / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; i++) x[i] = y[i];
    }
}

// Lane i: the sum over x[i]. The additions come between the steps of a turn, so that each step has half the registers.
static inline V sums(V* x) {
#pragma GCC unroll 4
    for (int count = kLanes / 2; count; count /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) x[i] = weave_low(x[i], x[i + count]) + weave_high(x[i], x[i + count]);
    return x[0];
}

#if defined(__AVX512F__)
static inline float sum(V v) { return _mm512_reduce_add_ps((__m512)v); }
static inline int32_t sum(VI v) { return _mm512_reduce_add_epi32((__m512i)v); }
static inline float largest(V v) { return _mm512_reduce_max_ps((__m512)v); }
#else
template <class R, class T> static inline T fold(R v, T (*join)(T, T)) {
    T x[kLanes];
    memcpy(x, &v, sizeof x);
    for (int width = kLanes / 2; width; width /= 2)
        for (int i = 0; i < width; i++) x[i] = join(x[i], x[i + width]);
    return x[0];
}
static inline float sum(V v) { return fold<V, float>(v, [](float a, float b) { return a + b; }); }
static inline int32_t sum(VI v) { return fold<VI, int32_t>(v, [](int32_t a, int32_t b) { return a + b; }); }
static inline float largest(V v) { return fold<V, float>(v, [](float a, float b) { return a > b ? a : b; }); }
#endif

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

// Round to nearest even; what is not a number stays so.
static inline uint16_t float_to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline float bf16_to_float(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// Widening and narrowing by intrinsics: GCC 12 takes the compiler's own conversions of short lanes apart, one by one.
static inline VI widen(const uint8_t* p) {
#if defined(__AVX512F__)
    return (VI)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    return (VI)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    VI v;
    for (int i = 0; i < kLanes; i++) v[i] = p[i];
    return v;
#endif
}
static inline VI widen(const int8_t* p) { return (widen((const uint8_t*)p) ^ 128) - 128; }

static inline VI widen(const uint16_t* p) {
#if defined(__AVX512F__)
    return (VI)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (VI)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
    VI v;
    for (int i = 0; i < kLanes; i++) v[i] = p[i];
    return v;
#endif
}

// The low bytes of every lane.
static inline void store_bytes(int8_t* p, VI v) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
    for (int i = 0; i < kLanes; i++) p[i] = (int8_t)v[i];
#endif
}

static inline V floats(VI v) { return __builtin_convertvector(v, V); }
static inline V load_bf16(const uint16_t* p) { return (V)(widen(p) << 16); }

}  // namespace
