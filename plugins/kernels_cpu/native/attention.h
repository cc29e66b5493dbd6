// Attention with an online softmax (arXiv 2205.14135, 2307.08691): a tile of one sequence's tokens, all query heads of
// one key/value head together, walks the keys of every segment once. Memory does not grow with the context.
#pragma once
#include "rows.h"

namespace {

template <int32_t TYPE> static inline V load_stored(const void* p, int64_t at) {
    if constexpr (TYPE == RV_KV_F16) return load_half((const uint16_t*)p + at);
    if constexpr (TYPE == RV_KV_BF16) return load_bf16((const uint16_t*)p + at);
    return load((const float*)p + at);
}

template <int32_t TYPE> static inline float one_stored(const void* p, int64_t at) {
    if constexpr (TYPE == RV_KV_F16) return half_to_float(((const uint16_t*)p)[at]);
    if constexpr (TYPE == RV_KV_BF16) return bf16_to_float(((const uint16_t*)p)[at]);
    return ((const float*)p)[at];
}

// Where the keys or values [from, from + count) of a segment begin, in elements.
static inline void find_places(const RvSegment& segment, const AttentionTask& task, int64_t from, int64_t count,
                               int64_t* places) {
    const int64_t size = segment.block_size, heads = task.model->kv_heads, dim = task.model->head_dim;
    const int32_t* block = segment.table + (int64_t)task.sequence * segment.table_stride + from / size;
    int64_t offset = from % size;
    for (int64_t i = 0; i < count; block++, offset = 0) {
        int64_t at = ((*block * heads + task.kv_head) * size + offset) * dim;
        for (const int64_t stop = least(count, i + size - offset); i < stop; i++, at += dim) places[i] = at;
    }
}

// Keys or values at places as float [count, padded], zeros behind head_dim.
template <int32_t TYPE>
static void gather(const void* stored, const int64_t* places, int64_t count, int64_t dim, int64_t padded, float* out) {
    for (int64_t i = 0; i < count; i++, out += padded) {
        const int64_t at = places[i];
        int64_t k = 0;
        for (; k + kLanes <= dim; k += kLanes) store(out + k, load_stored<TYPE>(stored, at + k));
        for (; k < dim; k++) out[k] = one_stored<TYPE>(stored, at + k);
        for (; k < padded; k++) out[k] = 0;
    }
}

// scores[row][key] of R rows, from keys as they are stored; head_dim is a multiple of a register.
template <int32_t TYPE, int R, class F>
static inline void score_few(const void* stored, const int64_t* places, int64_t count, int64_t dim, const float* query,
                             int64_t padded, float* scores, F&& before) {
    for (int64_t key = 0; key < count; key += kLanes) {
        before(key);
        V products[R][kLanes];
        const int64_t found = least(kLanes, count - key);
        for (int64_t i = 0; i < found; i++) {
            V s[R] = {};
            for (int64_t k = 0; k < dim; k += kLanes) {
                const V one = load_stored<TYPE>(stored, places[key + i] + k);
#pragma GCC unroll 8
                for (int n = 0; n < R; n++) s[n] += one * load(query + n * padded + k);
            }
#pragma GCC unroll 8
            for (int n = 0; n < R; n++) products[n][i] = s[n];
        }
        for (int n = 0; n < R; n++) {
            for (int64_t i = found; i < kLanes; i++) products[n][i] = V{};
            store(scores + n * kKeyTile + key, sums(products[n]));
        }
    }
}

// mixed[row] += scores[row] @ values for R rows, WIDE registers of columns at a time; value(key, k) loads one.
template <int R, int WIDE, class F>
static inline void mix_rows(const float* scores, int64_t count, int64_t padded, float* mixed, F&& value) {
    for (int64_t k = 0; k < padded; k += WIDE * kLanes) {
        V total[R][WIDE];
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++) total[i][j] = load(mixed + i * padded + k + j * kLanes);
        for (int64_t key = 0; key < count; key++) {
            V one[WIDE];
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++) one[j] = value(key, k + j * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < R; i++)
#pragma GCC unroll 4
                for (int j = 0; j < WIDE; j++) total[i][j] += one[j] * scores[i * kKeyTile + key];
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
#pragma GCC unroll 4
            for (int j = 0; j < WIDE; j++) store(mixed + i * padded + k + j * kLanes, total[i][j]);
    }
}

template <int R, class F>
static inline void mix(const float* scores, int64_t count, int64_t padded, float* mixed, F&& value) {
    if constexpr (R <= 4 && kLanes == 16)  // few rows alone would leave the adders waiting for each other
        if (padded % (4 * kLanes) == 0) return mix_rows<R, 4>(scores, count, padded, mixed, value);
    mix_rows<R, 2>(scores, count, padded, mixed, value);
}

constexpr int64_t kAheadKeys = 2 * kKeyTile;  // how far ahead of a tile memory is asked

// Asks memory for keys or values. Without the empty instruction GCC finds that calls of this do nothing, and drops them.
static inline void fetch(const void* stored, const int64_t* places, int64_t count, int64_t size, int64_t dim) {
    asm volatile("");
    for (int64_t i = 0; i < count; i++)
        for (int64_t k = 0; k < dim * size; k += 64)
            __builtin_prefetch((const uint8_t*)stored + places[i] * size + k, 0, 2);
}

// A tile of keys for few rows, and for many; of the next tile, keys and values are fetched ahead.
template <int32_t TYPE>
static void few_rows(const AttentionTask& task, const Rows& rows, const RvSegment& segment, int64_t from,
                     const int64_t* places, int64_t count, const int64_t* next, int64_t ahead) {
    constexpr int64_t size = TYPE == RV_KV_F32 ? 4 : 2;
    const void *keys = segment.keys[task.layer], *values = segment.values[task.layer];
    const int64_t dim = task.model->head_dim, padded = rows.padded;
    with_rows(rows.count, [&](auto tag) {
        constexpr int R = decltype(tag)::scheme;
        score_few<TYPE, R>(keys, places, count, dim, rows.query, padded, rows.scores, [&](int64_t key) {
            fetch(keys, next + key, least(kLanes, ahead - key), size, dim);
            fetch(values, next + key, least(kLanes, ahead - key), size, dim);
        });
        for (int64_t r = 0; r < R; r++) soften(task, rows, r, from, round_up(count, kLanes));
        mix<R>(rows.scores, count, padded, rows.mixed,
               [&](int64_t key, int64_t k) { return load_stored<TYPE>(values, places[key] + k); });
    });
}

template <int32_t TYPE>
static void many_rows(const AttentionTask& task, const Rows& rows, const RvSegment& segment, int64_t from,
                      const int64_t* places, int64_t count) {
    const int64_t dim = task.model->head_dim, padded = rows.padded;
    gather<TYPE>(segment.keys[task.layer], places, count, dim, padded, rows.values);
    turn_keys(rows.values, count, padded, rows.keys);
    score_rows(rows.query, rows.full, padded, rows.keys, rows.scores);
    for (int64_t r = 0; r < rows.count; r++) soften(task, rows, r, from, round_up(count, kLanes));
    gather<TYPE>(segment.values[task.layer], places, count, dim, padded, rows.values);
    for (int64_t r = 0; r < rows.full; r += kRowStep)
        mix<kRowStep>(rows.scores + r * kKeyTile, count, padded, rows.mixed + r * padded,
                      [&](int64_t key, int64_t k) { return load(rows.values + key * padded + k); });
}

template <int32_t TYPE>
static void walk(const AttentionTask& task, const Rows& rows, const RvSegment& segment, Seen seen, bool few) {
    const int64_t start = segment.starts[task.sequence];
    const int64_t size = TYPE == RV_KV_F32 ? 4 : 2, dim = task.model->head_dim;
    int64_t places[kKeyTile], next[kKeyTile];
    for (int64_t at = seen.low; few && at < least(seen.high, seen.low + kAheadKeys); at += kKeyTile) {
        const int64_t count = least(kKeyTile, seen.high - at);
        find_places(segment, task, at - start, count, next);
        fetch(segment.keys[task.layer], next, count, size, dim);
        fetch(segment.values[task.layer], next, count, size, dim);
    }
    for (int64_t at = seen.low; at < seen.high; at += kKeyTile) {
        const int64_t count = least(kKeyTile, seen.high - at);
        find_places(segment, task, at - start, count, places);
        if (few) {
            const int64_t ahead = most(0, least(kKeyTile, seen.high - at - kAheadKeys));
            find_places(segment, task, at + kAheadKeys - start, ahead, next);
            few_rows<TYPE>(task, rows, segment, at, places, count, next, ahead);
        } else many_rows<TYPE>(task, rows, segment, at, places, count);
    }
}

}  // namespace

#include "attend.h"
