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

// Asks for the rows of b that a panel of tokens [t, t + count) needs, once for tokens of one sequence, and for what comes
// later.
static inline void ask(const Added& added, int64_t t, int64_t count, int64_t r) {
    const RvLowRank* last = nullptr;
    for (int64_t n = 0; n < count; n++) {
        const RvLowRank* sites = added.of[t + n];
        if (!sites || sites == last) continue;
        last = sites;
        const RvLowRank& delta = sites[added.first + added.site];
        for (int32_t k = 0; k < delta.rank; k++) __builtin_prefetch(delta.b + r * delta.rank + k * kPanelRows, 0, 3);
    }
    if (!added.ahead) return;
    Ahead& ahead = *added.ahead;
    for (int64_t n = ahead.lines; n && ahead.at < ahead.last; n--) {
        __builtin_prefetch(ahead.at->begin, 0, 2);
        if ((ahead.at->begin += 64) >= ahead.at->end) ahead.at++;
    }
}

// found[n][kPanelRows] += b c for tokens t + n and the rows of the panel that begins with r.
static inline void add_panel(const Added& added, int64_t t, int64_t count, int64_t r, float* found) {
    for (int64_t n = 0, end; n < count; n = end) {
        const RvLowRank* sites = added.of[t + n];
        for (end = n + 1; end < count && added.of[t + end] == sites;) end++;  // tokens of one sequence, mostly
        if (!sites || !sites[added.first + added.site].rank) continue;
        sites += added.first;
        const RvLowRank& delta = sites[added.site];
        const float *b = delta.b + r * delta.rank, *c = added.c + t * added.width;
        for (int i = 0; i < added.site; i++) c += sites[i].rank;
        for (int32_t k = 0; k < delta.rank; k++, b += kPanelRows, c++)
            for (int64_t j = 0; j < kPanelRows; j += kLanes) {
                const V own = load(b + j);
                for (int64_t i = n; i < end; i++) {
                    V y = load(found + i * kPanelRows + j);
                    y += own * c[i * added.width];
                    store(found + i * kPanelRows + j, y);
                }
            }
    }
}

// The same for rows [begin, end) of one token, in place.
static void add_rows(const Added& added, int64_t t, int64_t begin, int64_t end, float* out) {
    for (int64_t r = begin; r < end; r += kPanelRows) {
        float found[kPanelRows] = {};
        const size_t bytes = (size_t)least(kPanelRows, end - r) * 4;
        memcpy(found, out + r, bytes);
        add_panel(added, t, 1, r, found);
        memcpy(out + r, found, bytes);
    }
}

}  // namespace
