// AVX-512 with VNNI: four products of bytes and their sum in one instruction.
#include <immintrin.h>
#include "kernels.h"
#include "lanes.h"
#include "unpack.h"

namespace {

constexpr int kTile = 12;

template <bool WIDE> static inline __m256i dot32(__m256i sum, __m256i w, __m256i x) {
    return _mm256_dpbusd_epi32(sum, w, x);
}

template <bool WIDE> static inline VI dot4(VI sum, VI w, int32_t x) {
    return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
}

}  // namespace

#include "row_dot_x86.h"
#include "attention.h"
#include "elementwise.h"
#include "matmul.h"

extern const Kernels kAvx512 = {"avx512", norm, quantize, matmul, decode_row, rope, to_half, gated, attend, softcap};
