// Activations with the memory that they need, and the values that their bytes stand for: 16 or 8 bits, or floats if 32.
#pragma once
#include "check.h"

struct Quantized {
    Activations view;
    std::vector<float> x;
    std::vector<int8_t> q, r;
    std::vector<float> d, s32, s16;
    int64_t tile;
    int run;

    Quantized(const Tables& tables, std::vector<float> values, int64_t count, int64_t cols, int bits = 16)
        : x(std::move(values)), tile(tables.table->tile), run(tables.run) {
        view.x = x.data();
        view.count = count;
        view.cols = cols;
        if (bits == 32) return;
        const size_t room = (size_t)((count + tile) * cols);
        q.assign(room, 99);  // what nobody writes must not matter
        r.assign(room, 99);
        d.assign(room / 32, NAN);
        s32.assign(room / 32, NAN);
        s16.assign(room / 16, NAN);
        view.q = q.data();
        view.r = bits == 16 ? r.data() : nullptr;
        view.d = d.data();
        view.s32 = s32.data();
        view.s16 = s16.data();
        for (int64_t t = 0; t < count; t += tile) tables.table->quantize(view, t, tile_width(count, t, tile));
    }

    // Where things of token t and column k are.
    size_t byte_at(int64_t t, int64_t k) const {
        const int64_t first = t / tile * tile, width = tile_width(view.count, first, tile);
        return (size_t)(first * view.cols + (k / run * width + t - first) * run + k % run);
    }
    size_t cell_at(int64_t t, int64_t k, int64_t size = 32) const {
        const int64_t first = t / tile * tile, width = tile_width(view.count, first, tile);
        return (size_t)(first * (view.cols / size) + k / size * width + t - first);
    }
    double value(int64_t t, int64_t k) const {
        if (q.empty()) return x[(size_t)(t * view.cols + k)];
        const size_t at = byte_at(t, k);
        return (double)d[cell_at(t, k)] * (256 * q[at] + (view.r ? r[at] : 0));
    }
};

// Normal values with blocks of zeros, a zero token, outliers, and a block so small that its scale is subnormal.
inline std::vector<float> activations(Random& random, int64_t count, int64_t cols) {
    std::vector<float> x = random.normals(count * cols);
    const auto scale = [&](int64_t t, int64_t from, int64_t to, float by) {
        for (int64_t k = from; k < to && k < cols; k++) x[(size_t)(t * cols + k)] *= by;
    };
    for (int64_t t = 0; t < count; t++) {
        scale(t, 32 * random.below(cols / 32), cols, 0.01f);
        const int64_t cell = 32 * random.below(cols / 32);
        scale(t, cell, cell + 32, t % 3 ? 0.0f : 1e4f);
        x[(size_t)(t * cols + random.below(cols))] *= 300.0f;
    }
    if (count > 2) scale(1, 0, cols, 0.0f);
    scale(count - 1, 0, 32, 1e-39f);
    return x;
}
