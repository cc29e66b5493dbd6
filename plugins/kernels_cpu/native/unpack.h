// Blocks of weights as unsigned bytes with a scale and a minimum for each group: value = scale * q - minimum.
// Layouts: the GGML library's block_q4_0 ... block_q6_K.
#pragma once
#include "abi.h"
#include "lanes.h"
#include "packed.h"

namespace {

static inline uint16_t u16(const uint8_t* p) { uint16_t h; memcpy(&h, p, 2); return h; }
static inline uint32_t u32(const uint8_t* p) { uint32_t h; memcpy(&h, p, 4); return h; }
static inline float half_at(const uint8_t* p) { return half_to_float(u16(p)); }

// Eight 6-bit scales and eight 6-bit minima in twelve bytes (q4_k, q5_k).
static inline void six_bits(const uint8_t* p, uint8_t* scales, uint8_t* minima) {
    const uint32_t a = u32(p), b = u32(p + 4), c = u32(p + 8);
    const uint32_t s[2] = {a & 0x3f3f3f3f, (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030)};
    const uint32_t m[2] = {b & 0x3f3f3f3f, (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030)};
    memcpy(scales, s, 8);
    memcpy(minima, m, 8);
}

// Sixteen 6-bit scales in twelve bytes (q3_k), 32 to be subtracted.
static inline void six_bits_q3(const uint8_t* p, int8_t* scales) {
    for (int i = 0; i < 16; i++) {
        const int low = i < 8 ? p[i] & 15 : p[i - 8] >> 4;
        scales[i] = (int8_t)((low | (p[8 + i % 4] >> 2 * (i / 4) & 3) << 4) - 32);
    }
}

template <int RUN> static inline void nibbles(const uint8_t* p, uint8_t* q) {
    typedef uint8_t Run __attribute__((vector_size(16)));  // no aliasing for the compiler to fear
    for (unsigned i = 0; i < RUN; i += sizeof(Run)) {
        Run both;
        memcpy(&both, p + i, sizeof both);
        const Run low = both & 15, high = both >> 4;
        memcpy(q + i, &low, sizeof low);
        memcpy(q + RUN + i, &high, sizeof high);
    }
}

// Of one block: its values as unsigned bytes, and a scale and a minimum for each group (as in Packed<S>).
template <int32_t S> struct Format;

#define RV_FORMAT(S, BLOCK, BYTES)                                               \
    template <> struct Format<S> {                                               \
        static constexpr int block = BLOCK, bytes = BYTES;                       \
        static inline void values(const uint8_t* p, uint8_t* q);                 \
        static inline void scales(const uint8_t* p, float* scale, float* minimum); \
    };
RV_FORMAT(RV_Q4_0, 32, 18)
RV_FORMAT(RV_Q4_1, 32, 20)
RV_FORMAT(RV_Q5_0, 32, 22)
RV_FORMAT(RV_Q5_1, 32, 24)
RV_FORMAT(RV_Q8_0, 32, 34)
RV_FORMAT(RV_Q2_K, 256, 84)
RV_FORMAT(RV_Q3_K, 256, 110)
RV_FORMAT(RV_Q4_K, 256, 144)
RV_FORMAT(RV_Q5_K, 256, 176)
RV_FORMAT(RV_Q6_K, 256, 210)
#undef RV_FORMAT

static inline void fifth_bits(uint32_t high, uint8_t* q) {
    for (int i = 0; i < 32; i++) q[i] = (uint8_t)(q[i] | (high >> i & 1) << 4);
}
inline void Format<RV_Q4_0>::values(const uint8_t* p, uint8_t* q) { nibbles<16>(p + 2, q); }
inline void Format<RV_Q4_1>::values(const uint8_t* p, uint8_t* q) { nibbles<16>(p + 4, q); }
inline void Format<RV_Q5_0>::values(const uint8_t* p, uint8_t* q) {
    const uint32_t high = u32(p + 2);
    nibbles<16>(p + 6, q);
    fifth_bits(high, q);
}
inline void Format<RV_Q5_1>::values(const uint8_t* p, uint8_t* q) {
    const uint32_t high = u32(p + 4);
    nibbles<16>(p + 8, q);
    fifth_bits(high, q);
}
inline void Format<RV_Q8_0>::values(const uint8_t* p, uint8_t* q) {
    for (int i = 0; i < 32; i++) q[i] = p[2 + i] ^ 0x80;  // q + 128
}
inline void Format<RV_Q2_K>::values(const uint8_t* p, uint8_t* q) {
    for (int h = 0; h < 2; h++)
        for (int plane = 0; plane < 4; plane++)
            for (int i = 0; i < 32; i++) q[128 * h + 32 * plane + i] = p[16 + 32 * h + i] >> 2 * plane & 3;
}
inline void Format<RV_Q3_K>::values(const uint8_t* p, uint8_t* q) {
    for (int g = 0; g < 8; g++)
        for (int i = 0; i < 32; i++)
            q[32 * g + i] = (uint8_t)((p[32 + 32 * (g / 4) + i] >> 2 * (g % 4) & 3) | (p[i] >> g & 1) << 2);
}
inline void Format<RV_Q4_K>::values(const uint8_t* p, uint8_t* q) {
    for (int j = 0; j < 4; j++) nibbles<32>(p + 16 + 32 * j, q + 64 * j);
}
inline void Format<RV_Q5_K>::values(const uint8_t* p, uint8_t* q) {
    for (int j = 0; j < 4; j++) nibbles<32>(p + 48 + 32 * j, q + 64 * j);
    for (int g = 0; g < 8; g++)
        for (int i = 0; i < 32; i++) q[32 * g + i] = (uint8_t)(q[32 * g + i] | (p[16 + i] >> g & 1) << 4);
}
inline void Format<RV_Q6_K>::values(const uint8_t* p, uint8_t* q) {
    for (int h = 0; h < 2; h++) {
        nibbles<64>(p + 64 * h, q + 128 * h);
        for (int plane = 0; plane < 4; plane++)
            for (int i = 0; i < 32; i++) {
                uint8_t& to = q[128 * h + 32 * plane + i];
                to = (uint8_t)(to | (p[128 + 32 * h + i] >> 2 * plane & 3) << 4);
            }
    }
}

// Blocks of 32: one scale first, then a minimum that is added, or none and a fixed offset.
static inline void plain_scales(const uint8_t* p, bool minima, int offset, float* scale, float* minimum) {
    scale[0] = half_at(p);
    minimum[0] = minima ? -half_at(p + 2) : (float)offset * scale[0];
}
#define RV_PLAIN(S)                                                                              \
    inline void Format<S>::scales(const uint8_t* p, float* scale, float* minimum) {              \
        plain_scales(p, Packed<S>::minima, Packed<S>::offset, scale, minimum);                   \
    }
RV_PLAIN(RV_Q4_0)
RV_PLAIN(RV_Q4_1)
RV_PLAIN(RV_Q5_0)
RV_PLAIN(RV_Q5_1)
RV_PLAIN(RV_Q8_0)
#undef RV_PLAIN
inline void Format<RV_Q2_K>::scales(const uint8_t* p, float* scale, float* minimum) {
    const float d = half_at(p + 80), dmin = half_at(p + 82);
    for (int i = 0; i < 16; i++) scale[i] = d * (float)(p[i] & 15), minimum[i] = dmin * (float)(p[i] >> 4);
}
inline void Format<RV_Q3_K>::scales(const uint8_t* p, float* scale, float* minimum) {
    int8_t s[16];
    six_bits_q3(p + 96, s);
    const float d = half_at(p + 108);
    for (int i = 0; i < 16; i++) scale[i] = d * (float)s[i], minimum[i] = 4 * scale[i];
}
static inline void six_bit_scales(const uint8_t* p, float* scale, float* minimum) {
    uint8_t s[8], m[8];
    six_bits(p + 4, s, m);
    const float d = half_at(p), dmin = half_at(p + 2);
    for (int i = 0; i < 8; i++) scale[i] = d * (float)s[i], minimum[i] = dmin * (float)m[i];
}
inline void Format<RV_Q4_K>::scales(const uint8_t* p, float* s, float* m) { six_bit_scales(p, s, m); }
inline void Format<RV_Q5_K>::scales(const uint8_t* p, float* s, float* m) { six_bit_scales(p, s, m); }
inline void Format<RV_Q6_K>::scales(const uint8_t* p, float* scale, float* minimum) {
    const float d = half_at(p + 208);
    for (int i = 0; i < 16; i++) scale[i] = d * (float)(int8_t)p[192 + i], minimum[i] = 32 * scale[i];
}

// Sixteen float weights, from column k of a row.
static inline V load_weights(int32_t scheme, const uint8_t* row, int64_t k) {
    if (scheme == RV_F32) { V v; memcpy(&v, row + 4 * k, sizeof v); return v; }
    return scheme == RV_F16 ? load_half((const uint16_t*)row + k) : load_bf16((const uint16_t*)row + k);
}
static inline float load_weight(int32_t scheme, const uint8_t* row, int64_t k) {
    if (scheme == RV_F32) { float v; memcpy(&v, row + 4 * k, 4); return v; }
    if (scheme == RV_F16) return half_at(row + 2 * k);
    return bf16_to_float(u16(row + 2 * k));
}

}  // namespace
