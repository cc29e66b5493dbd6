// Attention with an online softmax (arXiv 2205.14135, 2307.08691): a tile of one sequence's tokens, all query heads of
// one key/value head together, walks the keys of every segment once. Memory does not grow with the context.
#pragma once
#include "kernels.h"
#include "lanes.h"
#include "packed.h"

namespace {

constexpr float kUnseen = -1e30f;
constexpr int kRowStep = kLanes == 16 ? 6 : 4;  // rows whose sums a loop keeps in registers
constexpr int kWide = kLanes == 16 ? 4 : 2;     // registers of keys beside them

// Up to so many rows are scored key by key, from where keys are stored; more are worth turning the keys.
constexpr int64_t kFewRows = 8;

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

// Where the keys or values of a position begin, in elements.
static inline int64_t stored_at(const RvSegment& segment, const AttentionTask& task, int64_t at) {
    const int32_t block = segment.table[(int64_t)task.sequence * segment.table_stride + at / segment.block_size];
    return (((int64_t)block * task.model->kv_heads + task.kv_head) * segment.block_size + at % segment.block_size) *
           task.model->head_dim;
}

// Keys or values [from, from + count) of a segment as float [count, padded], zeros behind head_dim.
template <int32_t TYPE>
static void gather(const RvSegment& segment, const void* stored, const AttentionTask& task, int64_t from,
                   int64_t count, int64_t padded, float* out) {
    const int64_t dim = task.model->head_dim;
    for (int64_t i = 0; i < count; i++, out += padded) {
        const int64_t at = stored_at(segment, task, from + i);
        int64_t k = 0;
        for (; k + kLanes <= dim; k += kLanes) store(out + k, load_stored<TYPE>(stored, at + k));
        for (; k < dim; k++) out[k] = one_stored<TYPE>(stored, at + k);
        for (; k < padded; k++) out[k] = 0;
    }
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

// The same for R rows, from keys as they are stored; head_dim is a multiple of a register.
template <int32_t TYPE, int R>
static void score_few(const void* stored, const int64_t* places, int64_t count, int64_t dim, const float* query,
                      int64_t padded, float* scores) {
    for (int64_t key = 0; key < count; key += kLanes) {
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

// The rows of a task on their way through the keys.
struct Rows {
    int64_t count, full, group, padded;  // full: count rounded up to kRowStep
    float *keys, *values, *query, *mixed, *scores, *best, *weight;
};

// One row of scores as the weights of its softmax so far; what came before fades with a larger maximum.
static inline void soften(const AttentionTask& task, const Rows& rows, int64_t r, int64_t from, int64_t found) {
    float* row = rows.scores + r * kKeyTile;
    const float cap = task.model->attention_softcap;
    const int64_t wide = round_up(found, kLanes), own = task.batch->positions[task.begin + r / rows.group];
    if (cap > 0)
        for (int64_t i = 0; i < wide; i += kLanes) store(row + i, vtanh(load(row + i) / cap) * cap);
    for (int64_t i = most(0, least(found, own + 1 - from)); i < wide; i++) row[i] = kUnseen;
    if (task.window)
        for (int64_t i = 0; i < least(own - task.window + 1 - from, wide); i++) row[i] = kUnseen;
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

static inline void prefetch_row(const uint8_t* row, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 3);
}

// A tile of keys for few rows, and for many.
template <int32_t TYPE>
static void few_rows(const AttentionTask& task, const Rows& rows, const RvSegment& segment, int64_t at, int64_t found) {
    const void *keys = segment.keys[task.layer], *values = segment.values[task.layer];
    const int64_t start = segment.starts[task.sequence], padded = rows.padded;
    // What comes next is fetched ahead: this tile's values, and a row further on the keys of the next tile.
    const int64_t length = segment.lengths[task.sequence], bytes = task.model->head_dim * (TYPE == RV_KV_F32 ? 4 : 2);
    int64_t places[kKeyTile];
    for (int64_t i = 0; i < found; i++) {
        places[i] = stored_at(segment, task, at + i);
        prefetch_row((const uint8_t*)values + places[i] * (TYPE == RV_KV_F32 ? 4 : 2), bytes);
        if (at + kKeyTile + i < length)
            prefetch_row((const uint8_t*)keys + stored_at(segment, task, at + kKeyTile + i) * (TYPE == RV_KV_F32 ? 4 : 2),
                         bytes);
    }
    with_rows(rows.count, [&](auto tag) {
        constexpr int R = decltype(tag)::scheme;
        score_few<TYPE, R>(keys, places, found, task.model->head_dim, rows.query, padded, rows.scores);
        for (int64_t r = 0; r < R; r++) soften(task, rows, r, start + at, found);
        mix<R>(rows.scores, found, padded, rows.mixed,
               [&](int64_t key, int64_t k) { return load_stored<TYPE>(values, places[key] + k); });
    });
}

template <int32_t TYPE>
static void many_rows(const AttentionTask& task, const Rows& rows, const RvSegment& segment, int64_t at,
                      int64_t found) {
    const int64_t padded = rows.padded;
    gather<TYPE>(segment, segment.keys[task.layer], task, at, found, padded, rows.values);
    turn_keys(rows.values, found, padded, rows.keys);
    score_rows(rows.query, rows.full, padded, rows.keys, rows.scores);
    for (int64_t r = 0; r < rows.count; r++) soften(task, rows, r, segment.starts[task.sequence] + at, found);
    gather<TYPE>(segment, segment.values[task.layer], task, at, found, padded, rows.values);
    for (int64_t r = 0; r < rows.full; r += kRowStep)
        mix<kRowStep>(rows.scores + r * kKeyTile, found, padded, rows.mixed + r * padded,
                      [&](int64_t key, int64_t k) { return load(rows.values + key * padded + k); });
}

template <int32_t TYPE>
static void walk(const AttentionTask& task, const Rows& rows, const RvSegment& segment, bool few) {
    const int64_t start = segment.starts[task.sequence];
    const int64_t low = most(0, task.low - start), high = least(segment.lengths[task.sequence], task.high - start);
    for (int64_t at = low; at < high; at += kKeyTile) {
        const int64_t found = least(kKeyTile, high - at);
        if (few) few_rows<TYPE>(task, rows, segment, at, found);
        else many_rows<TYPE>(task, rows, segment, at, found);
    }
}

static void attend(const AttentionTask& task) {
    const RvModel& model = *task.model;
    const int64_t dim = model.head_dim, count = task.end - task.begin;
    Rows rows;
    rows.group = model.heads / model.kv_heads;
    rows.padded = round_up(dim, kHeadStep);
    rows.count = count * rows.group;
    rows.full = round_up(rows.count, kRowStep);
    rows.keys = task.scratch;
    rows.values = rows.keys + kKeyTile * rows.padded;
    rows.query = rows.values + kKeyTile * rows.padded;
    rows.mixed = rows.query + rows.full * rows.padded;
    rows.scores = rows.mixed + rows.full * rows.padded;
    rows.best = rows.scores + rows.full * kKeyTile;
    rows.weight = rows.best + rows.full;
    const bool few = rows.count <= kFewRows && dim % (2 * kLanes) == 0;
    memset(rows.query, 0, (size_t)(rows.full * (2 * rows.padded + kKeyTile)) * 4);
    if (!few) memset(rows.keys, 0, (size_t)(2 * kKeyTile * rows.padded) * 4);
    for (int64_t r = 0; r < rows.count; r++) {
        const float* from =
            task.query + (task.begin + r / rows.group) * task.stride + (task.kv_head * rows.group + r % rows.group) * dim;
        for (int64_t k = 0; k < dim; k++) rows.query[r * rows.padded + k] = from[k] * model.scale;
    }
    for (int64_t r = 0; r < rows.full; r++) rows.best[r] = kUnseen, rows.weight[r] = 0;

    for (int64_t n = 0; n < task.batch->segments_count; n++) {
        const RvSegment& segment = task.batch->segments[n];
        if (segment.type == RV_KV_F16) walk<RV_KV_F16>(task, rows, segment, few);
        else if (segment.type == RV_KV_BF16) walk<RV_KV_BF16>(task, rows, segment, few);
        else walk<RV_KV_F32>(task, rows, segment, few);
    }
    for (int64_t r = 0; r < rows.count; r++) {
        const float* mixed = rows.mixed + r * rows.padded;
        if (task.partial) {
            float* to = task.partial + r * (dim + 2);
            memcpy(to, mixed, (size_t)dim * 4);
            to[dim] = rows.best[r];
            to[dim + 1] = rows.weight[r];
        } else {
            float* to = task.out + ((task.begin + r / rows.group) * model.heads + task.kv_head * rows.group +
                                    r % rows.group) * dim;
            const float whole = 1.0f / rows.weight[r];
            for (int64_t k = 0; k < dim; k++) to[k] = mixed[k] * whole;
        }
    }
}

}  // namespace
