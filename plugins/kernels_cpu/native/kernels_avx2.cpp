// AVX2, FMA and F16C. Products of bytes are added in 16 bits only where they cannot overflow: weights up to 127.
#include <immintrin.h>
#include "kernels.h"
#include "lanes.h"
#include "unpack.h"

namespace {

constexpr int kTile = 3;

template <bool WIDE> static inline __m256i dot32(__m256i sum, __m256i w, __m256i x) {
    if constexpr (WIDE) {  // even and odd bytes apart, in 16 bits
        const __m256i even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
        const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
        return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd)));
    } else {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
    }
}

template <bool WIDE> static inline VI dot4(VI sum, VI w, int32_t x) {
    return (VI)dot32<WIDE>((__m256i)sum, (__m256i)w, _mm256_set1_epi32(x));
}

}  // namespace

#include "row_dot_x86.h"
#include "attention.h"
#include "elementwise.h"
#include "matmul.h"

extern const Kernels kAvx2 = {"avx2", norm, quantize, matmul, decode_row, rope, to_half, gated, attend, softcap};
