// Flash attention (arXiv 2205.14135, 2307.08691): a tile of one sequence's tokens, all query heads of one key/value
// head together as the rows of small matrix products, walks the keys of every segment once with an online softmax.
#pragma once
#include "dot.h"
#include "kernels.h"

namespace {

constexpr float kUnseen = -1e30f;

// A task's rows, tokens outermost, on their way through the keys. Widths are head_dim rounded up, the rest zero.
struct Rows {
    int64_t count, group, width;
    float *keys, *values;            // [kKeyTile, width] of the tile
    float *query, *mixed, *scores;   // [count, width], [count, width], [count, kKeyTile]
    float *best, *weight;            // [count] highest score so far, sum of the softmax's weights so far
};

// Keys or values [from, from + count) of a segment as floats.
template <int32_t STORED>
static void gather(const RvSegment& segment, const void* stored, const AttentionTask& task, int64_t from,
                   int64_t count, int64_t width, float* out) {
    constexpr int64_t bytes = STORED == RV_F32 ? 4 : 2;
    const int64_t dim = task.model->head_dim, size = segment.block_size;
    const int32_t* table = segment.table + (int64_t)task.sequence * segment.table_stride;
    for (int64_t i = 0; i < count; i++, out += width) {
        const int64_t at = from + i;
        const int64_t row = ((int64_t)table[at / size] * task.model->kv_heads + task.kv_head) * size + at % size;
        const uint8_t* source = (const uint8_t*)stored + row * dim * bytes;
        int64_t k = 0;
        for (; k + 4 <= dim; k += 4) vst1q_f32(out + k, load4<STORED>(source, k));
        for (; k < dim; k++) out[k] = load1<STORED>(source, k);
    }
}

static void score(const Rows& rows, int64_t keys) {
    int64_t r = 0;
    for (; r + 4 <= rows.count; r += 4)
        for (int64_t key = 0; key < keys; key += 4) {
            float32x4_t found[4];
            dot4x4<RV_F32>((const uint8_t*)(rows.keys + key * rows.width), rows.width * 4, rows.query + r * rows.width,
                           rows.width, rows.width, found);
            for (int i = 0; i < 4; i++) vst1q_f32(rows.scores + (r + i) * kKeyTile + key, found[i]);
        }
    for (; r < rows.count; r++)
        for (int64_t key = 0; key < keys; key++)
            rows.scores[r * kKeyTile + key] =
                dot<RV_F32>((const uint8_t*)(rows.query + r * rows.width), rows.keys + key * rows.width, rows.width);
}

// mixed += scores @ values, four rows and sixteen columns at a time.
static void mix(const Rows& rows, int64_t keys) {
    int64_t r = 0;
    for (; r + 4 <= rows.count; r += 4)
        for (int64_t k = 0; k < rows.width; k += 16) {
            float32x4_t total[4][4];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) total[i][j] = vld1q_f32(rows.mixed + (r + i) * rows.width + k + 4 * j);
            for (int64_t key = 0; key < keys; key++) {
                float32x4_t value[4];
                for (int j = 0; j < 4; j++) value[j] = vld1q_f32(rows.values + key * rows.width + k + 4 * j);
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++)
                        total[i][j] = vfmaq_n_f32(total[i][j], value[j], rows.scores[(r + i) * kKeyTile + key]);
            }
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) vst1q_f32(rows.mixed + (r + i) * rows.width + k + 4 * j, total[i][j]);
        }
    for (; r < rows.count; r++)
        for (int64_t key = 0; key < keys; key++)
            axpy(rows.scores[r * kKeyTile + key], rows.values + key * rows.width, rows.mixed + r * rows.width,
                 rows.width);
}

// e^(x - highest) in place, x[wide] with wide a multiple of 4; returns their sum.
static inline float softmax(float* x, int64_t wide, float highest) {
    float32x4_t total = vdupq_n_f32(0.0f);
    for (int64_t i = 0; i < wide; i += 4) {
        const float32x4_t p = exponential(vsubq_f32(vld1q_f32(x + i), vdupq_n_f32(highest)));
        vst1q_f32(x + i, p);
        total = vaddq_f32(total, p);
    }
    return vaddvq_f32(total);
}

// One row of scores, of keys at positions `from` and on, as weights; what came before fades with a higher score.
static void soften(const AttentionTask& task, const Rows& rows, int64_t r, int64_t from, int64_t found) {
    float* row = rows.scores + r * kKeyTile;
    const float cap = task.model->attention_softcap;
    const int64_t wide = round_up(found, 4), own = task.batch->positions[task.begin + r / rows.group];
    if (cap > 0)
        for (int64_t i = 0; i < wide; i += 4)
            vst1q_f32(row + i, vmulq_n_f32(tangent(vmulq_n_f32(vld1q_f32(row + i), 1.0f / cap)), cap));
    const int64_t first = task.window ? least(wide, most(0, own - task.window + 1 - from)) : 0;
    for (int64_t i = 0; i < first; i++) row[i] = kUnseen;
    for (int64_t i = most(first, least(found, own + 1 - from)); i < wide; i++) row[i] = kUnseen;
    float32x4_t top = vdupq_n_f32(rows.best[r]);
    for (int64_t i = 0; i < wide; i += 4) top = vmaxq_f32(top, vld1q_f32(row + i));
    const float highest = vmaxvq_f32(top);
    if (highest == kUnseen) {  // this token sees none of these keys, nor any before them
        memset(row, 0, (size_t)wide * 4);
        return;
    }
    const float total = softmax(row, wide, highest);
    if (highest != rows.best[r]) {
        const float fade = vgetq_lane_f32(exponential(vdupq_n_f32(rows.best[r] - highest)), 0);
        float* mixed = rows.mixed + r * rows.width;
        for (int64_t k = 0; k < rows.width; k += 4) vst1q_f32(mixed + k, vmulq_n_f32(vld1q_f32(mixed + k), fade));
        rows.weight[r] *= fade;
        rows.best[r] = highest;
    }
    rows.weight[r] += total;
}

template <int32_t STORED>
static void walk(const AttentionTask& task, const Rows& rows, const RvSegment& segment) {
    const int64_t start = segment.starts[task.sequence];
    const int64_t high = least(segment.lengths[task.sequence], task.high - start);
    for (int64_t at = most(0, task.low - start); at < high; at += kKeyTile) {
        const int64_t found = least(kKeyTile, high - at);
        gather<STORED>(segment, segment.keys[task.layer], task, at, found, rows.width, rows.keys);
        gather<STORED>(segment, segment.values[task.layer], task, at, found, rows.width, rows.values);
        score(rows, found);
        for (int64_t r = 0; r < rows.count; r++) soften(task, rows, r, start + at, found);
        mix(rows, found);
    }
}

static void finish(const AttentionTask& task, const Rows& rows) {
    const int64_t dim = task.model->head_dim;
    for (int64_t r = 0; r < rows.count; r++) {
        const float* mixed = rows.mixed + r * rows.width;
        if (task.partial) {
            float* to = task.partial + r * (dim + 2);
            memcpy(to, mixed, (size_t)dim * 4);
            to[dim] = rows.best[r];
            to[dim + 1] = rows.weight[r];
            continue;
        }
        const int64_t head = task.kv_head * rows.group + r % rows.group;
        float* to = task.out + ((task.begin + r / rows.group) * task.model->heads + head) * dim;
        for (int64_t k = 0; k < dim; k++) to[k] = mixed[k] / rows.weight[r];
    }
}

static void attend(const AttentionTask& task) {
    const RvModel& model = *task.model;
    const int64_t dim = model.head_dim;
    Rows rows;
    rows.group = model.heads / model.kv_heads;
    rows.count = (task.end - task.begin) * rows.group;
    rows.width = round_up(dim, kHeadStep);
    rows.keys = task.scratch;
    rows.values = rows.keys + kKeyTile * rows.width;
    rows.query = rows.values + kKeyTile * rows.width;
    rows.mixed = rows.query + rows.count * rows.width;
    rows.scores = rows.mixed + rows.count * rows.width;
    rows.best = rows.scores + rows.count * kKeyTile;
    rows.weight = rows.best + rows.count;
    // Also what lies behind head_dim and behind the last key: it takes part, so it must be finite.
    memset(task.scratch, 0, (size_t)((rows.weight + rows.count) - task.scratch) * 4);
    for (int64_t r = 0; r < rows.count; r++) {
        const int64_t head = task.kv_head * rows.group + r % rows.group;
        const float* from = task.query + (task.begin + r / rows.group) * task.stride + head * dim;
        for (int64_t k = 0; k < dim; k++) rows.query[r * rows.width + k] = from[k] * model.scale;
        rows.best[r] = kUnseen;
    }
    for (int64_t n = 0; n < task.batch->segments_count; n++) {
        const RvSegment& segment = task.batch->segments[n];
        if (segment.type == RV_KV_F16) walk<RV_F16>(task, rows, segment);
        else if (segment.type == RV_KV_BF16) walk<RV_BF16>(task, rows, segment);
        else walk<RV_F32>(task, rows, segment);
    }
    finish(task, rows);
}

}  // namespace
