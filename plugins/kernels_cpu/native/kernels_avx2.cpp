// AVX2, FMA and F16C. Products of bytes are added up in 16 bits as long as they cannot overflow, then in 32.
#include <immintrin.h>
#include "kernels.h"
#include "lanes.h"

namespace {

constexpr int64_t kTile = 4;

template <int BITS> struct Dot {
    using Sum = __m256i;  // 16 bits: a pair of products is at most 2 * (2^BITS - 1) * 127
    static constexpr int run = BITS <= 4 ? 8 : BITS == 5 ? 4 : 2;
    static constexpr bool centred = false;
    static_assert(run * 2 * ((1 << BITS) - 1) * 127 < 32768);
    static inline Sum start(VI) { return _mm256_setzero_si256(); }
    static inline Sum add(Sum sum, VI w, int32_t x) {
        return _mm256_add_epi16(sum, _mm256_maddubs_epi16((__m256i)w, _mm256_set1_epi32(x)));
    }
    static inline VI flush(VI total, Sum sum) { return total + (VI)_mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};

// Bytes q + 128: as their magnitudes, the activations taking the sign; two products are at most 2 * 128 * 127.
template <> struct Dot<8> {
    using Sum = __m256i;
    static constexpr int run = 1;
    static constexpr bool centred = true;
    static inline Sum start(VI) { return _mm256_setzero_si256(); }
    static inline Sum add(Sum, VI w, int32_t x) {
        const __m256i q = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8((char)0x80));
        return _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(_mm256_set1_epi32(x), q));
    }
    static inline VI flush(VI total, Sum sum) { return total + (VI)_mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
};

}  // namespace

#include "table.h"

extern const Kernels kAvx2 = RV_TABLE("avx2");
