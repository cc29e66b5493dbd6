// Portable C++: any processor, and what the others are compared with.
#include "kernels.h"
#include "lanes.h"
#include "unpack.h"

namespace {

constexpr int kTile = 4;

template <bool WIDE> static inline VI dot4(VI sum, VI w, int32_t x) {
    for (int i = 0; i < 4; i++) sum += (w >> 8 * i & 255) * (int32_t)(int8_t)(x >> 8 * i);
    return sum;
}

template <int32_t S> static float row_dot(const uint8_t* row, const Activations& x, int64_t t) {
    using F = Format<S>;
    const int8_t* q = x.q + t * x.cols;
    const float* d = x.d + t * (x.cols / 32);
    const float* sums = F::group == 32 ? x.s32 + t * (x.cols / 32) : x.s16 + t * (x.cols / 16);
    uint8_t w[F::block];
    float s[16], m[16], total = 0;
    for (int64_t b = 0; b < x.cols / F::block; b++, row += F::bytes) {
        F::unpack(row, w, s, m);
        for (int g = 0; g < F::block / F::group; g++) {
            int32_t dot = 0;
            for (int i = 0; i < F::group; i++) dot += w[g * F::group + i] * q[b * F::block + g * F::group + i];
            const int64_t at = b * (F::block / F::group) + g;
            total += s[g] * d[at * F::group / 32] * (float)dot - m[g] * sums[at];
        }
    }
    return total;
}

}  // namespace

#include "attention.h"
#include "elementwise.h"
#include "matmul.h"

extern const Kernels kGeneric = {"generic", norm, quantize, matmul, decode_row, rope, to_half, gated, attend, softcap};
