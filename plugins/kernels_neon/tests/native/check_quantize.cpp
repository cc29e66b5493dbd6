// The bytes, scales and sums of activations, against the same arithmetic one value at a time.
#include "activations.h"

static void check_cell(const Quantized& a, int64_t t, int64_t k, Check& check) {
    const float* x = a.x.data() + t * a.view.cols + k;
    float top = 0;
    for (int i = 0; i < 32; i++) top = std::fmax(top, std::fabs(x[i]));
    const bool tiny = top < 1e-36f;  // such a block is lost
    const float inverse = tiny ? 0.0f : 127.0f / top, d = tiny ? 0.0f : top / 127.0f / 256.0f;
    double sums[2] = {}, size = 0;
    for (int i = 0; i < 32; i++) {
        const size_t at = a.byte_at(t, k + i);
        const double value = a.value(t, k + i);
        sums[i / 16] += value;
        size += std::fabs(value);
        const float scaled = x[i] * inverse, whole = std::nearbyintf(scaled);
        const float left = std::fmin(std::fmax((scaled - whole) * 256.0f, -127.0f), 127.0f);
        check.that(a.q[at] == (int)whole, "q of token %d column %d", (int)t, (int)k + i);
        const bool fine = a.view.r != nullptr;
        check.that(a.r[at] == (fine ? (int)std::nearbyintf(left) : 99), "r of token %d column %d", (int)t, (int)k + i);
        check.close(value, x[i], (fine ? 1.01 : 128.01) * d + top * 2e-7 + 1e-36, "value of token %d column %d", (int)t,
                    (int)k + i);
    }
    check.close(a.d[a.cell_at(t, k)], d, d * 1e-6, "d of token %d column %d", (int)t, (int)k);
    const double allowed = size * 1e-6;
    check.close(a.s32[a.cell_at(t, k)], sums[0] + sums[1], allowed, "s32 of token %d column %d", (int)t, (int)k);
    for (int g = 0; g < 2; g++)
        check.close(a.s16[a.cell_at(t, k + 16 * g, 16)], sums[g], allowed, "s16 of token %d column %d", (int)t, (int)k);
}

void check_quantize(const Tables& tables, Check& check) {
    Random random;
    for (const int64_t cols : {32, 96, 256, 544})
        for (int64_t n = 2; n < 24; n++) {
            const int64_t tokens = n / 2;
            const Quantized a(tables, activations(random, tokens, cols), tokens, cols, n % 2 ? 16 : 8);
            for (int64_t t = 0; t < tokens; t++)
                for (int64_t k = 0; k < cols; k += 32) check_cell(a, t, k, check);
            const int64_t first = (tokens - 1) / a.tile * a.tile;
            for (int64_t t = tokens; t < first + tile_width(tokens, first, a.tile); t++)
                for (int64_t k = 0; k < cols; k++)
                    check.that(a.value(t, k) == 0, "missing token %d column %d is not zero", (int)t, (int)k);
        }
}
