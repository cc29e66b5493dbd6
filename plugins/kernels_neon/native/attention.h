// Flash attention (arXiv 2205.14135, 2307.08691): a tile of one sequence's tokens, all query heads of one key/value
// head together as the rows of small matrix products, walks the keys of every segment once with an online softmax.
// Here is the walk over float keys; quantized ones are walked as kernels_cpu does it (coded.h), with the products of
// bytes that the including file has defined (Dot).
#pragma once
#include "dot.h"
#include "levels.h"
#include "rows.h"

namespace {

// Keys or values [from, from + count) of a segment as floats, zeros behind head_dim.
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
        for (; k < width; k++) out[k] = 0;
    }
}

static void score(const Rows& rows, int64_t keys) {
    int64_t r = 0;
    for (; r + 4 <= rows.count; r += 4)
        for (int64_t key = 0; key < keys; key += 4) {
            float32x4_t found[4];
            dot4x4<RV_F32>((const uint8_t*)(rows.keys + key * rows.padded), rows.padded * 4,
                           rows.query + r * rows.padded, rows.padded, rows.padded, found);
            for (int i = 0; i < 4; i++) vst1q_f32(rows.scores + (r + i) * kKeyTile + key, found[i]);
        }
    for (; r < rows.count; r++)
        for (int64_t key = 0; key < keys; key++)
            rows.scores[r * kKeyTile + key] =
                dot<RV_F32>((const uint8_t*)(rows.query + r * rows.padded), rows.keys + key * rows.padded, rows.padded);
}

// mixed += scores @ values, four rows and sixteen columns at a time.
static void mix(const Rows& rows, int64_t keys) {
    int64_t r = 0;
    for (; r + 4 <= rows.count; r += 4)
        for (int64_t k = 0; k < rows.padded; k += 16) {
            float32x4_t total[4][4];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) total[i][j] = vld1q_f32(rows.mixed + (r + i) * rows.padded + k + 4 * j);
            for (int64_t key = 0; key < keys; key++) {
                float32x4_t value[4];
                for (int j = 0; j < 4; j++) value[j] = vld1q_f32(rows.values + key * rows.padded + k + 4 * j);
                for (int i = 0; i < 4; i++)
                    for (int j = 0; j < 4; j++)
                        total[i][j] = vfmaq_n_f32(total[i][j], value[j], rows.scores[(r + i) * kKeyTile + key]);
            }
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 4; j++) vst1q_f32(rows.mixed + (r + i) * rows.padded + k + 4 * j, total[i][j]);
        }
    for (; r < rows.count; r++)
        for (int64_t key = 0; key < keys; key++)
            axpy(rows.scores[r * kKeyTile + key], rows.values + key * rows.padded, rows.mixed + r * rows.padded,
                 rows.padded);
}

template <int32_t TYPE>
static void walk(const AttentionTask& task, const Rows& rows, const RvSegment& segment, Seen seen, bool) {
    constexpr int32_t stored = TYPE == RV_KV_F32 ? RV_F32 : TYPE == RV_KV_F16 ? RV_F16 : RV_BF16;
    const int64_t start = segment.starts[task.sequence];
    for (int64_t at = seen.low; at < seen.high; at += kKeyTile) {
        const int64_t found = least(kKeyTile, seen.high - at);
        gather<stored>(segment, segment.keys[task.layer], task, at - start, found, rows.padded, rows.keys);
        gather<stored>(segment, segment.values[task.layer], task, at - start, found, rows.padded, rows.values);
        score(rows, found);
        for (int64_t r = 0; r < rows.count; r++) soften(task, rows, r, at, round_up(found, kLanes));
        mix(rows, found);
    }
}

}  // namespace

#include "attend.h"
