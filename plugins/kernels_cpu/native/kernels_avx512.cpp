// AVX-512 with VNNI: four products of bytes and their sum in one instruction.
#include <immintrin.h>
#include "kernels.h"
#include "lanes.h"

namespace {

constexpr int64_t kTile = 12;  // sums and totals of twelve tokens fill 24 of 32 registers

template <int BITS> struct Dot {
    using Sum = VI;
    static constexpr int run = 8;
    static constexpr bool centred = false;
    static inline VI start(VI sum) { return sum; }
    static inline VI add(VI sum, VI w, int32_t x) {
        return (VI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, _mm512_set1_epi32(x));
    }
    static inline VI flush(VI, VI sum) { return sum; }
};

}  // namespace

#include "table.h"

extern const Kernels kAvx512 = RV_TABLE("avx512");
