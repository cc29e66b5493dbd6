// Quantized weights rearranged for the kernels: panels of sixteen rows, in which four columns of a row (a quad) stand
// beside the same four of the next. One register then holds a quad of every row, and no sum crosses its lanes.
//
// A panel is its planes and then its scales, padded to whole lines of 64 bytes.
// Planes, for each 32 columns (a cell), registers of 64 bytes = [16 rows][4 columns]:
//   8 bits: quad i is register i
//   4 bits: register i has quad i below and quad i + 4 above
//   2 bits: register i has quads 4i ... 4i + 3, the first lowest
//   then, of the bits above these, 1: bit j of one register is quad j's; 2: as 2 bits above
// Scales, for each block of the scheme (32 or 256 columns): f16 d[16], if the scheme has minima f16 m[16], and in blocks
// of 256 for each group of columns a byte scale[16], and for q4_k and q5_k a byte minimum[16]. In q2_k one byte has both.
// q8_0 is kept as q + 128, so that all values are unsigned: value = scale * q - minimum.
#pragma once
#include "kernels.h"

template <int32_t S> struct Packed {
    static constexpr bool super = S == RV_Q2_K || S == RV_Q3_K || S == RV_Q4_K || S == RV_Q5_K || S == RV_Q6_K;
    static constexpr int block = super ? 256 : 32;                // columns that share d
    static constexpr int group = S == RV_Q2_K || S == RV_Q3_K || S == RV_Q6_K ? 16 : 32;  // columns that share a scale
    static constexpr int low = S == RV_Q8_0 ? 8 : S == RV_Q2_K || S == RV_Q3_K ? 2 : 4;   // bits in the first planes
    static constexpr int high = S == RV_Q6_K ? 2 : S == RV_Q5_0 || S == RV_Q5_1 || S == RV_Q5_K || S == RV_Q3_K ? 1 : 0;
    static constexpr bool minima = S == RV_Q4_1 || S == RV_Q5_1 || S == RV_Q2_K || S == RV_Q4_K || S == RV_Q5_K;
    static constexpr int offset = S == RV_Q4_0 ? 8 : S == RV_Q5_0 ? 16 : S == RV_Q8_0 ? 128 : S == RV_Q3_K ? 4
                                : S == RV_Q6_K ? 32 : 0;         // without minima: minimum = offset * scale
    static constexpr int planes = 64 * (low + high);             // bytes of a cell
    static constexpr int head = minima ? 64 : 32;                // bytes of d and m
    static constexpr int group_scales = !super ? 0 : S == RV_Q4_K || S == RV_Q5_K ? 32 : 16;
    static constexpr int scales = head + group_scales * (block / group);  // bytes of a block's scales

    static int64_t planes_bytes(int64_t cols) { return cols / 32 * planes; }
    static int64_t panel_bytes(int64_t cols) { return (planes_bytes(cols) + cols / block * scales + 63) / 64 * 64; }
};

// A scheme as a type, for templates.
template <int32_t S> struct Tag { static constexpr int32_t scheme = S; };

// Calls run(Tag<S>) for a quantized scheme; schemes were checked when the matrix was made.
template <class F> inline void with_scheme(int32_t scheme, F&& run) {
    switch (scheme) {
        case RV_Q4_0: return run(Tag<RV_Q4_0>{});
        case RV_Q4_1: return run(Tag<RV_Q4_1>{});
        case RV_Q5_0: return run(Tag<RV_Q5_0>{});
        case RV_Q5_1: return run(Tag<RV_Q5_1>{});
        case RV_Q8_0: return run(Tag<RV_Q8_0>{});
        case RV_Q2_K: return run(Tag<RV_Q2_K>{});
        case RV_Q3_K: return run(Tag<RV_Q3_K>{});
        case RV_Q4_K: return run(Tag<RV_Q4_K>{});
        case RV_Q5_K: return run(Tag<RV_Q5_K>{});
        case RV_Q6_K: return run(Tag<RV_Q6_K>{});
        default: return;
    }
}
