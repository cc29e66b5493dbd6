// The rows of an attention task (a token and a query head each) on their way through the keys, and what does not depend
// on how keys are stored: which positions a row sees, and the online softmax.
#pragma once
#include "kernels.h"
#include "lanes.h"
#include "packed.h"

namespace {

constexpr float kUnseen = -1e30f;
constexpr int kRowStep = kLanes == 16 ? 6 : 4;  // rows whose sums a loop keeps in registers
constexpr int kWide = kLanes == 16 ? 4 : 2;     // registers of keys beside them

struct Rows {
    int64_t count, full, group, padded;  // full: count rounded up to kRowStep
    float *keys, *values, *query, *mixed, *scores, *best, *weight;
    int32_t *first, *last;  // the positions [first, last) that each sees of the segment
    float* rest;            // scratch that is left
};

// Which positions of a segment each row sees, and all together.
struct Seen { int64_t low, high; };

static inline Seen look(const AttentionTask& task, const Rows& rows, const RvSegment& segment) {
    const RvBatch& batch = *task.batch;
    const bool newest = &segment == batch.segments + batch.segments_count - 1;
    const int64_t start = segment.starts[task.sequence], end = start + segment.lengths[task.sequence];
    Seen seen{end, start};
    for (int64_t t = task.begin, r = 0; t < task.end; t++) {
        const int64_t own = batch.positions[t];
        int64_t first = most(start, task.low), last = least(least(end, task.high), own + 1);
        if (task.window) first = most(first, own - task.window + 1);
        if (batch.boundary && newest) first = most(first, batch.boundary[t]);
        if (batch.boundary && !newest) last = least(last, batch.boundary[t]);
        if (first < last) seen = {least(seen.low, first), most(seen.high, last)};
        for (int64_t stop = r + rows.group; r < stop; r++) {
            rows.first[r] = (int32_t)first;
            rows.last[r] = (int32_t)last;
        }
    }
    return seen;
}

// [kKeyTile][padded] to [padded][kKeyTile], of the first `count` keys rounded up to whole registers.
static void turn_keys(const float* keys, int64_t count, int64_t padded, float* turned) {
    for (int64_t key = 0; key < count; key += kLanes)
        for (int64_t k = 0; k < padded; k += kLanes) {
            V square[kLanes];
            for (int i = 0; i < kLanes; i++) square[i] = load(keys + (key + i) * padded + k);
            turn(square);
            for (int i = 0; i < kLanes; i++) store(turned + (k + i) * kKeyTile + key, square[i]);
        }
}

// scores[row][key], the keys as [padded][kKeyTile]: no sums across lanes.
static void score_rows(const float* query, int64_t rows, int64_t padded, const float* turned, float* scores) {
    for (int64_t r = 0; r < rows; r += kRowStep)
        for (int64_t key = 0; key < kKeyTile; key += kWide * kLanes) {
            V s[kRowStep][kWide] = {};
            for (int64_t k = 0; k < padded; k++) {
                V wide[kWide];
#pragma GCC unroll 4
                for (int j = 0; j < kWide; j++) wide[j] = load(turned + k * kKeyTile + key + j * kLanes);
#pragma GCC unroll 6
                for (int i = 0; i < kRowStep; i++)
#pragma GCC unroll 4
                    for (int j = 0; j < kWide; j++) s[i][j] += wide[j] * query[(r + i) * padded + k];
            }
#pragma GCC unroll 6
            for (int i = 0; i < kRowStep; i++)
#pragma GCC unroll 4
                for (int j = 0; j < kWide; j++) store(scores + (r + i) * kKeyTile + key + j * kLanes, s[i][j]);
        }
}

// run(tag of count) for a count in [1, kFewRows].
template <class F> static inline void with_rows(int64_t count, F&& run) {
    switch (count) {
        case 1: return run(Tag<1>{});
        case 2: return run(Tag<2>{});
        case 3: return run(Tag<3>{});
        case 4: return run(Tag<4>{});
        case 5: return run(Tag<5>{});
        case 6: return run(Tag<6>{});
        case 7: return run(Tag<7>{});
        default: return run(Tag<8>{});
    }
}

// One row of scores, of `wide` keys from position `from` on, as the weights of its softmax so far; what came before fades
// with a larger maximum.
static inline void soften(const AttentionTask& task, const Rows& rows, int64_t r, int64_t from, int64_t wide) {
    float* row = rows.scores + r * kKeyTile;
    const float cap = task.model->attention_softcap;
    if (cap > 0)
        for (int64_t i = 0; i < wide; i += kLanes) store(row + i, vtanh(load(row + i) / cap) * cap);
    for (int64_t i = 0; i < least(rows.first[r] - from, wide); i++) row[i] = kUnseen;
    for (int64_t i = most(0, rows.last[r] - from); i < wide; i++) row[i] = kUnseen;
    V top = load(row);
    for (int64_t i = kLanes; i < wide; i += kLanes) top = vmax(top, load(row + i));
    const float highest = largest(top), next = highest > rows.best[r] ? highest : rows.best[r];
    if (next == kUnseen) {  // this token sees none of these keys
        memset(row, 0, (size_t)wide * 4);
        return;
    }
    V total{};
    for (int64_t i = 0; i < wide; i += kLanes) {
        const V p = vexp(load(row + i) - next);
        store(row + i, p);
        total += p;
    }
    if (next != rows.best[r]) {
        const float fade = vexp(splat(rows.best[r] - next))[0];
        float* mixed = rows.mixed + r * rows.padded;
        rows.weight[r] *= fade;
        for (int64_t k = 0; k < rows.padded; k += kLanes) store(mixed + k, load(mixed + k) * fade);
        rows.best[r] = next;
    }
    rows.weight[r] += sum(total);
}

}  // namespace
