// A task of attention: its rows are set up, walk the segments, and are put where they belong. The including file has
// defined walk<TYPE>, the walk over float keys, and Dot (quantized.h).
#pragma once
#include "coded.h"
#include "rows.h"

namespace {

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
    rows.first = (int32_t*)(rows.weight + rows.full);
    rows.last = rows.first + rows.full;
    rows.rest = (float*)(rows.last + rows.full);
    const bool few = rows.count <= kFewRows && dim % (2 * kLanes) == 0;
    memset(rows.query, 0, (size_t)(rows.full * (2 * rows.padded + kKeyTile)) * 4);
    for (int64_t t = task.begin, r = 0; t < task.end; t++)
        for (int64_t head = task.kv_head * rows.group; r < (t - task.begin + 1) * rows.group; r++, head++) {
            const float* from = task.query + t * task.stride + head * dim;
            for (int64_t k = 0; k < dim; k++) rows.query[r * rows.padded + k] = from[k] * model.scale;
        }
    for (int64_t r = 0; r < rows.full; r++) rows.best[r] = kUnseen, rows.weight[r] = 0;

    Coded coded;
    for (int64_t n = 0; n < task.batch->segments_count; n++) {
        const RvSegment& segment = task.batch->segments[n];
        const Seen seen = look(task, rows, segment);
        if (seen.low >= seen.high) continue;
        if (segment.type == RV_KV_F16) walk<RV_KV_F16>(task, rows, segment, seen, few);
        else if (segment.type == RV_KV_BF16) walk<RV_KV_BF16>(task, rows, segment, seen, few);
        else if (segment.type == RV_KV_F32) walk<RV_KV_F32>(task, rows, segment, seen, few);
        else if (segment.type == RV_KV_Q8) walk_coded<8>(task, rows, segment, seen, few, coded);
        else walk_coded<4>(task, rows, segment, seen, few, coded);
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
