// What adapters add to products, one token at a time. Of a layer's factors nothing is near: memory decides.
#pragma once
#include "kernels.h"
#include "lanes.h"

namespace {

// R rows of a with x, UNROLL sums of each, so that an addition need not wait for the last.
template <int R, int UNROLL> static inline void dot_rows(const float* a, const float* x, int64_t cols, float* c) {
    V total[R][UNROLL] = {};
    int64_t i = 0;
    for (; i + UNROLL * kLanes <= cols; i += UNROLL * kLanes)
#pragma GCC unroll 4
        for (int j = 0; j < UNROLL; j++) {
            const V wide = load(x + i + j * kLanes);
#pragma GCC unroll 4
            for (int k = 0; k < R; k++) total[k][j] += load(a + k * cols + i + j * kLanes) * wide;
        }
    for (int k = 0; k < R; k++) {
        float rest = 0;
        for (int64_t j = i; j < cols; j++) rest += a[k * cols + j] * x[j];
        V all = total[k][0];
        for (int j = 1; j < UNROLL; j++) all += total[k][j];
        c[k] = sum(all) + rest;
    }
}

static void shrink(const RvLowRank* sites, int count, const float* x, int64_t cols, float* c) {
    const float* a = nullptr;
    int64_t rows = 0, k = 0;
    for (int i = 0; i < count; i++) {
        if (!a && sites[i].rank) a = sites[i].a;
        rows += sites[i].rank;
    }
    for (; k + 4 <= rows; k += 4) dot_rows<4, 1>(a + k * cols, x, cols, c + k);
    if (rows - k == 3) dot_rows<3, 2>(a + k * cols, x, cols, c + k);
    if (rows - k == 2) dot_rows<2, 2>(a + k * cols, x, cols, c + k);
    if (rows - k == 1) dot_rows<1, 4>(a + k * cols, x, cols, c + k);
    for (int i = 0; i < count; i++)
        for (int32_t n = 0; n < sites[i].rank; n++) *c++ *= sites[i].scale;
}

static void expand(const RvLowRank& delta, const float* c, int64_t begin, int64_t end, float* out) {
    const float* b = delta.b + begin * delta.rank;
    for (int64_t r = begin; r < end; r += kPanelRows, b += kPanelRows * delta.rank) {
        if (r + kPanelRows > end) {
            for (int32_t k = 0; k < delta.rank; k++)
                for (int64_t i = r; i < end; i++) out[i] += b[k * kPanelRows + i - r] * c[k];
            return;
        }
        for (int64_t j = 0; j < kPanelRows; j += kLanes) {
            V y = load(out + r + j);
            for (int32_t k = 0; k < delta.rank; k++) y += load(b + k * kPanelRows + j) * c[k];
            store(out + r + j, y);
        }
    }
}

}  // namespace
