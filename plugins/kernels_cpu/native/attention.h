// Attention with an online softmax (arXiv 2205.14135, 2307.08691): a tile of one sequence's tokens, all query heads of
// one key/value head together, walks the keys of every segment once. Memory does not grow with the context.
#pragma once
#include "kernels.h"
#include "lanes.h"

namespace {

constexpr float kUnseen = -1e30f;

// Keys or values of positions [from, from + count) of a segment as float [count, padded], zeros behind head_dim.
static void gather(const RvSegment& segment, const void* stored, const AttentionTask& task, int64_t from,
                   int64_t count, int64_t padded, float* out) {
    const int64_t dim = task.model->head_dim, size = segment.block_size, heads = task.model->kv_heads;
    const int32_t* table = segment.table + (int64_t)task.sequence * segment.table_stride;
    for (int64_t i = 0; i < count; i++, out += padded) {
        const int64_t at = from + i, row = ((int64_t)table[at / size] * heads + task.kv_head) * size + at % size;
        int64_t k = 0;
        if (segment.half) {
            const uint16_t* source = (const uint16_t*)stored + row * dim;
            for (; k + kLanes <= dim; k += kLanes) store(out + k, load_half(source + k));
            for (; k < dim; k++) out[k] = half_to_float(source[k]);
        } else {
            memcpy(out, (const float*)stored + row * dim, (size_t)dim * 4);
            k = dim;
        }
        for (; k < padded; k++) out[k] = 0;
    }
}

// scores[row][key] for four rows at a time, the keys as [padded][kKeyTile]: no horizontal sums.
static void score_rows(const float* query, int64_t rows, int64_t padded, const float* turned, float* scores) {
    constexpr int kWide = kLanes == 16 ? 4 : 2;  // as many sums as registers hold
    for (int64_t r = 0; r < rows; r += 4)
        for (int64_t key = 0; key < kKeyTile; key += kWide * kLanes) {
            V s[4][kWide] = {};
            for (int64_t k = 0; k < padded; k++)
                for (int j = 0; j < kWide; j++) {
                    const V one = load(turned + k * kKeyTile + key + j * kLanes);
                    for (int i = 0; i < 4; i++) s[i][j] += one * query[(r + i) * padded + k];
                }
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < kWide; j++) store(scores + (r + i) * kKeyTile + key + j * kLanes, s[i][j]);
        }
}

static void score_few(const float* query, int64_t rows, int64_t padded, const float* keys, int64_t count,
                      float* scores) {
    for (int64_t key = 0; key < count; key++)
        for (int64_t r = 0; r < rows; r++) {
            V s{};
            for (int64_t k = 0; k < padded; k += kLanes)
                s += load(query + r * padded + k) * load(keys + key * padded + k);
            scores[r * kKeyTile + key] = sum(s);
        }
}

// mixed[row] += scores[row] @ values, four rows and two registers of columns at a time.
static void mix(const float* scores, int64_t rows, const float* values, int64_t count, int64_t padded, float* mixed) {
    for (int64_t r = 0; r < rows; r += 4)
        for (int64_t k = 0; k < padded; k += 2 * kLanes) {
            V sum_of[4][2];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 2; j++) sum_of[i][j] = load(mixed + (r + i) * padded + k + j * kLanes);
            for (int64_t key = 0; key < count; key++)
                for (int j = 0; j < 2; j++) {
                    const V value = load(values + key * padded + k + j * kLanes);
                    for (int i = 0; i < 4; i++) sum_of[i][j] += value * scores[(r + i) * kKeyTile + key];
                }
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 2; j++) store(mixed + (r + i) * padded + k + j * kLanes, sum_of[i][j]);
        }
}

static void attend(const AttentionTask& task) {
    const RvModel& model = *task.model;
    const int64_t group = model.heads / model.kv_heads, dim = model.head_dim, padded = round_up(dim, kHeadStep);
    const int64_t count = task.end - task.begin, rows = count * group, full = round_up(rows, 4);
    float *keys = task.scratch, *values = keys + kKeyTile * padded, *query = values + kKeyTile * padded;
    float *mixed = query + full * padded, *scores = mixed + full * padded, *best = scores + full * kKeyTile;
    float* weight = best + full;
    memset(query, 0, (size_t)(2 * full * padded + full * kKeyTile) * 4);
    for (int64_t t = 0; t < count; t++)
        for (int64_t g = 0; g < group; g++) {
            const float* from = task.query + (task.begin + t) * task.stride + (task.kv_head * group + g) * dim;
            for (int64_t k = 0; k < dim; k++) query[(t * group + g) * padded + k] = from[k] * model.scale;
        }
    for (int64_t r = 0; r < full; r++) best[r] = kUnseen, weight[r] = 0;

    const int64_t* position = task.batch->positions + task.begin;
    const int64_t last = position[count - 1], first = task.window ? most(0, position[0] - task.window + 1) : 0;
    for (int64_t n = 0; n < task.batch->segments_count; n++) {
        const RvSegment& segment = task.batch->segments[n];
        const int64_t start = segment.starts[task.sequence];
        const int64_t stop = least(segment.lengths[task.sequence], last + 1 - start);
        for (int64_t at = most(0, first - start); at < stop; at += kKeyTile) {
            const int64_t found = least(kKeyTile, stop - at), from = start + at;
            gather(segment, segment.keys[task.layer], task, at, found, padded, keys);
            if (rows < 8) {
                score_few(query, rows, padded, keys, found, scores);
            } else {
                for (int64_t key = 0; key < found; key++)  // the room for values holds the turned keys until then
                    for (int64_t k = 0; k < padded; k++) values[k * kKeyTile + key] = keys[key * padded + k];
                score_rows(query, full, padded, values, scores);
            }
            gather(segment, segment.values[task.layer], task, at, found, padded, values);
            const int64_t wide = round_up(found, kLanes);
            for (int64_t r = 0; r < rows; r++) {
                float* row = scores + r * kKeyTile;
                const int64_t own = position[r / group], low = task.window ? own - task.window + 1 : 0;
                if (model.attention_softcap > 0)
                    for (int64_t i = 0; i < wide; i += kLanes)
                        store(row + i, vtanh(load(row + i) / model.attention_softcap) * model.attention_softcap);
                for (int64_t i = most(0, own + 1 - from); i < wide; i++) row[i] = kUnseen;
                for (int64_t i = found; i < wide; i++) row[i] = kUnseen;
                for (int64_t i = 0; i < least(low - from, wide); i++) row[i] = kUnseen;
                V top = load(row);
                for (int64_t i = kLanes; i < wide; i += kLanes) top = vmax(top, load(row + i));
                const float highest = largest(top), next = highest > best[r] ? highest : best[r];
                if (next == kUnseen) {  // this token sees none of these keys
                    memset(row, 0, (size_t)wide * 4);
                    continue;
                }
                V total{};
                for (int64_t i = 0; i < wide; i += kLanes) {
                    const V p = vexp(load(row + i) - next);
                    store(row + i, p);
                    total += p;
                }
                if (next != best[r]) {
                    const float fade = vexp(splat(best[r] - next))[0];
                    weight[r] *= fade;
                    for (int64_t k = 0; k < padded; k += kLanes)
                        store(mixed + r * padded + k, load(mixed + r * padded + k) * fade);
                    best[r] = next;
                }
                weight[r] += sum(total);
            }
            mix(scores, full, values, found, padded, mixed);
        }
    }
    for (int64_t t = 0; t < count; t++)
        for (int64_t g = 0; g < group; g++) {
            const int64_t r = t * group + g;
            float* to = task.out + ((task.begin + t) * model.heads + task.kv_head * group + g) * dim;
            for (int64_t k = 0; k < dim; k++) to[k] = mixed[r * padded + k] / weight[r];
        }
}

}  // namespace
