// Attention over quantized segments (store.h), without decoding them: queries are turned as the keys are and rounded to
// two bytes, and so are the weights of a tile of values, each with the value's scale in it; then both are products of
// bytes. Sums of values stay turned for as long as a segment lasts.
#pragma once
#include "bytes.h"
#include "hadamard.h"
#include "rows.h"
#include "store.h"

namespace {

constexpr int kCodeRows = kLanes == 16 ? 8 : 4;  // rows that pass over a code together
constexpr int64_t kTilePanels = kKeyTile / kPanelTokens;

// What is added to the dot product of codes, for each unit of what they are multiplied with: Dot<8> may take q + 128 as q.
template <int BITS> constexpr float kMiddle = BITS == 4 ? 7.5f : Dot<BITS>::centred ? -0.5f : 127.5f;

// The queries of a task as quantized keys take them.
struct Coded {
    float* turned = nullptr;  // [full][padded]
    float *unit, *sum;        // [groups][full]: a query is unit * (256 * q + r); the sum of it times the middle
    int8_t *q, *r;            // [groups][full][kCodeStride]
    float* base;              // [full]: what the mean of a block adds to every score, and what the key bias does
    // The key bias b, turned to position p, adds cos(p) . x + sin(p) . y, swing being x, y; and `fixed`.
    float *swing, *fixed;     // [full][padded], [full]
    const float* bias = nullptr;
};

// Values (`count` rounded up to whole registers, zeros behind it) as two bytes with a scale; returns their sum.
static inline float code_values(const float* x, int64_t count, int8_t* q, int8_t* r, float& unit) {
    V top{};
    for (int64_t i = 0; i < count; i += kLanes) top = vmax(top, vmax(load(x + i), -load(x + i)));
    const float found = largest(top), inverse = found > 1e-36f ? 127.0f / found : 0.0f;
    unit = found > 1e-36f ? found / (127.0f * 256.0f) : 0.0f;
    V total{};
    for (int64_t i = 0; i < count; i += kLanes) total += split_bytes(load(x + i) * inverse, q + i, r + i);
    return unit * sum(total);
}

// The bias of a key at position p, times a query: as what cos and sin of p are multiplied with, and what is left.
static inline float swing_of(const RvModel& model, const float* bias, const float* query, float* out) {
    const int64_t half = model.rope_dim / 2, step = model.rope_interleaved ? 2 : 1;
    const int64_t apart = model.rope_interleaved ? 1 : half;
    for (int64_t i = 0; i < half; i++) {
        const float a = bias[i * step], b = bias[i * step + apart];
        const float x = query[i * step], y = query[i * step + apart];
        out[i] = a * x + b * y;
        out[half + i] = a * y - b * x;
    }
    float fixed = 0;
    for (int64_t k = model.rope_dim; k < model.head_dim; k++) fixed += bias[k] * query[k];
    return fixed;
}

template <int BITS> static void code_queries(const AttentionTask& task, const Rows& rows, Coded& coded) {
    const RvModel& model = *task.model;
    const int64_t dim = model.head_dim, group = dim % 64 ? dim : 64, groups = dim / group, full = rows.full;
    if (!coded.turned) {
        coded.turned = rows.rest;
        coded.swing = coded.turned + full * rows.padded;
        coded.base = coded.swing + full * rows.padded;
        coded.fixed = coded.base + full;
        coded.unit = coded.fixed + full;
        coded.sum = coded.unit + groups * full;
        coded.q = (int8_t*)(coded.sum + groups * full);
        coded.r = coded.q + groups * full * kCodeStride;
        const float* bias = task.batch->cos && model.center_keys ? model.layer[task.layer].sites[RV_K].bias : nullptr;
        coded.bias = bias ? bias + task.kv_head * dim : nullptr;
        memcpy(coded.turned, rows.query, (size_t)(full * rows.padded) * 4);
        for (int64_t r = 0; r < rows.count; r++) {
            hadamard(coded.turned + r * rows.padded, dim);
            if (!bias) continue;
            float* swing = coded.swing + r * rows.padded;
            for (int64_t k = model.rope_dim; k < rows.padded; k++) swing[k] = 0;
            coded.fixed[r] = swing_of(model, coded.bias, rows.query + r * rows.padded, swing);
        }
    }
    for (int64_t r = 0; r < rows.count; r++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t n = g * full + r, at = n * kCodeStride;
            const float total = code_values(coded.turned + r * rows.padded + g * group, round_up(group, kLanes),
                                            coded.q + at, coded.r + at, coded.unit[n]);
            coded.sum[n] = kMiddle<BITS> * total;
        }
}

// Sums of products of codes, `step` bytes from one register of them to the next, with the two bytes of NT rows that are
// STRIDE bytes apart, added up apart.
template <int BITS, int NT, int STRIDE>
static inline void dot_codes(const uint8_t* codes, int64_t step, int64_t registers, const int8_t* q, const int8_t* r,
                             VI* high, VI* low) {
    using D = Dot<BITS>;
    constexpr int quads = BITS == 4 ? 2 : 1;
    constexpr int64_t run = D::run / quads;
    for (int64_t i = 0; i < registers; i += run) {
        typename D::Sum a[NT], b[NT];
#pragma GCC unroll 8
        for (int n = 0; n < NT; n++) a[n] = D::start(high[n]), b[n] = D::start(low[n]);
        for (int64_t j = i; j < least(i + run, registers); j++) {
            const VI both = integers(codes + j * step);
#pragma GCC unroll 2
            for (int part = 0; part < quads; part++) {
                const VI w = BITS == 4 ? both >> 4 * part & 0x0f0f0f0f : both;
                const int64_t at = 4 * (quads * j + part);
#pragma GCC unroll 8
                for (int n = 0; n < NT; n++) {
                    a[n] = D::add(a[n], w, four(q + n * STRIDE + at));
                    b[n] = D::add(b[n], w, four(r + n * STRIDE + at));
                }
            }
        }
#pragma GCC unroll 8
        for (int n = 0; n < NT; n++) high[n] = D::flush(high[n], a[n]), low[n] = D::flush(low[n], b[n]);
    }
}

// A panel of 16 tokens, and the block it is in.
struct Panel {
    const uint8_t *keys, *key_scales, *values, *value_scales, *mean;
};

// Asks memory for a panel of the next tile. Without the empty instruction GCC finds that calls of this do nothing.
static inline void fetch(const StoreLayout& layout, const Panel& panel) {
    asm volatile("");
    for (int64_t i = 0; i < kPanelTokens * layout.row; i += 64) {
        __builtin_prefetch(panel.keys + i, 0, 3);
        __builtin_prefetch(panel.values + i, 0, 3);
    }
    for (int64_t i = 0; i < kPanelTokens * 2 * layout.groups; i += 64) {
        __builtin_prefetch(panel.key_scales + i, 0, 3);
        __builtin_prefetch(panel.value_scales + i, 0, 3);
    }
    __builtin_prefetch(panel.mean, 0, 3);
}

// scores of a panel for NT rows from row r on; what they hold already is added where there is a key bias.
template <int BITS, int NT>
static inline void score_panel(const StoreLayout& layout, const Panel& panel, const Rows& rows, const Coded& coded,
                               int64_t r, float* scores) {
    const int64_t group = layout.group;
    for (int part = 0; part < kParts; part++) {
        V total[NT];
#pragma GCC unroll 8
        for (int n = 0; n < NT; n++) {
            total[n] = splat(coded.base[r + n]);
            if (coded.bias) total[n] += load(scores + n * kKeyTile + part * kLanes);
        }
        for (int64_t g = 0; g < layout.groups; g++) {
            const int64_t at = g * rows.full + r;
            VI high[NT] = {}, low[NT] = {};
            dot_codes<BITS, NT, kCodeStride>(panel.keys + g * group * 2 * BITS + part * 4 * kLanes, 64,
                                             group * BITS / 32, coded.q + at * kCodeStride, coded.r + at * kCodeStride,
                                             high, low);
            const V scale = load_half((const uint16_t*)panel.key_scales + g * kPanelTokens + part * kLanes);
#pragma GCC unroll 8
            for (int n = 0; n < NT; n++)
                total[n] += scale * (floats((high[n] << 8) + low[n]) * coded.unit[at + n] - coded.sum[at + n]);
        }
#pragma GCC unroll 8
        for (int n = 0; n < NT; n++) store(scores + n * kKeyTile + part * kLanes, total[n]);
    }
}

// mixed += the scores of NT rows, by now weights, times the values of some panels.
template <int BITS, int NT>
static inline void mix_panels(const StoreLayout& layout, const Panel* panels, int64_t count, int64_t padded,
                              const float* scores, float* mixed) {
    for (int64_t g = 0; g < layout.groups; g++) {
        alignas(64) int8_t q[NT * kKeyTile], r[NT * kKeyTile];
        float unit[NT], sum[NT];
        for (int n = 0; n < NT; n++) {
            float weights[kKeyTile];
            for (int64_t p = 0; p < count; p++)
                for (int64_t i = 0; i < kPanelTokens; i += kLanes)
                    store(weights + p * kPanelTokens + i,
                          load(scores + n * kKeyTile + p * kPanelTokens + i) *
                              load_half((const uint16_t*)panels[p].value_scales + g * kPanelTokens + i));
            sum[n] = kMiddle<BITS> *
                     code_values(weights, count * kPanelTokens, q + n * kKeyTile, r + n * kKeyTile, unit[n]);
        }
        // The last register of a head may reach over its end, there and in the codes: what comes of it is never read.
        for (int64_t k = g * layout.group; k < (g + 1) * layout.group; k += kLanes) {
            VI high[NT] = {}, low[NT] = {};
            for (int64_t p = 0; p < count; p++)
                dot_codes<BITS, NT, kKeyTile>(panels[p].values + 4 * k, 4 * layout.dim, BITS / 2,
                                              q + p * kPanelTokens, r + p * kPanelTokens, high, low);
#pragma GCC unroll 8
            for (int n = 0; n < NT; n++) {
                float* to = mixed + n * padded + k;
                store(to, load(to) + (floats((high[n] << 8) + low[n]) * unit[n] - sum[n]));
            }
        }
    }
}

// run(tag of the number, first row) for the rows, kCodeRows at a time.
template <class F> static inline void each_code_rows(int64_t count, F&& run) {
    for (int64_t r = 0; r < count; r += kCodeRows) with_rows(least(kCodeRows, count - r), [&](auto tag) {
        constexpr int NT = decltype(tag)::scheme;
        if constexpr (NT <= kCodeRows) run(tag, r);
    });
}

// base: what the mean of a block adds.
static inline void add_mean(const StoreLayout& layout, const uint8_t* mean, const Rows& rows, const Coded& coded,
                            float* decoded) {
    uint16_t scale;
    memcpy(&scale, mean + layout.dim, 2);
    const float unit = half_to_float(scale);
    for (int64_t k = 0; k < layout.dim; k++) decoded[k] = ((float)mean[k] - 127.5f) * unit;
    for (int64_t k = layout.dim; k < rows.padded; k++) decoded[k] = 0;
    for (int64_t r = 0; r < rows.count; r++) {
        V total{};
        for (int64_t k = 0; k < rows.padded; k += kLanes)
            total += load(coded.turned + r * rows.padded + k) * load(decoded + k);
        coded.base[r] = sum(total) + (coded.bias ? coded.fixed[r] : 0.0f);
    }
}

// scores = what the key bias adds at `count` positions from `from` on, but for the fixed part.
static inline void score_swing(const AttentionTask& task, const Rows& rows, const Coded& coded, int64_t from,
                               int64_t count, bool few) {
    const int64_t half = task.model->rope_dim / 2, padded = rows.padded;
    const float *cos = task.batch->cos[task.sequence] + from * half, *sin = task.batch->sin[task.sequence] + from * half;
    if (few && half % kLanes == 0) {
        with_rows(rows.count, [&](auto tag) {
            constexpr int R = decltype(tag)::scheme;
            for (int64_t key = 0; key < count; key += kLanes) {
                V products[R][kLanes] = {};
                for (int64_t i = 0; i < least(kLanes, count - key); i++) {
                    V s[R] = {};
                    for (int64_t k = 0; k < half; k += kLanes) {
                        const V c = load(cos + (key + i) * half + k), d = load(sin + (key + i) * half + k);
#pragma GCC unroll 8
                        for (int n = 0; n < R; n++)
                            s[n] += c * load(coded.swing + n * padded + k) + d * load(coded.swing + n * padded + half + k);
                    }
#pragma GCC unroll 8
                    for (int n = 0; n < R; n++) products[n][i] = s[n];
                }
                for (int n = 0; n < R; n++) store(rows.scores + n * kKeyTile + key, sums(products[n]));
            }
        });
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        float* row = rows.values + i * padded;
        memcpy(row, cos + i * half, (size_t)half * 4);
        memcpy(row + half, sin + i * half, (size_t)half * 4);
        for (int64_t k = 2 * half; k < padded; k++) row[k] = 0;
    }
    turn_keys(rows.values, count, padded, rows.keys);
    score_rows(coded.swing, rows.full, padded, rows.keys, rows.scores);
}

template <int BITS>
static void walk_coded(const AttentionTask& task, const Rows& rows, const RvSegment& segment, Seen seen, bool few,
                       Coded& coded) {
    const StoreLayout layout(*task.model, segment);
    const int64_t start = segment.starts[task.sequence], padded = rows.padded;
    const int32_t* table = segment.table + (int64_t)task.sequence * segment.table_stride;
    const uint8_t *keys = (const uint8_t*)segment.keys[task.layer], *values = (const uint8_t*)segment.values[task.layer];
    const uint8_t* means = (const uint8_t*)segment.means[task.layer];
    const int64_t end = seen.high - start;
    // Tiles end where whole ones would, so that most are of one block.
    const auto tile = [&](int64_t at, Panel* panels) {
        const int64_t found = most(0, least(kKeyTile - at % kKeyTile, end - at));
        for (int64_t p = 0; p * kPanelTokens < found; p++, at += kPanelTokens) {
            const int64_t block = table[at / layout.size], offset = at % layout.size;
            const int64_t codes = layout.codes(block, task.kv_head, offset);
            const int64_t scales = layout.scales(block, task.kv_head, offset);
            panels[p] = {keys + codes, keys + scales, values + codes, values + scales,
                         means + layout.mean(block, task.kv_head)};
        }
        return found;
    };
    Panel tiles[2][kTilePanels], *panels = tiles[0], *next = tiles[1];
    const uint8_t* mean = nullptr;
    int64_t at = (seen.low - start) / kPanelTokens * kPanelTokens, found = tile(at, panels);
    for (int64_t p = 0; p * kPanelTokens < found; p++) fetch(layout, panels[p]);
    code_queries<BITS>(task, rows, coded);
    for (int64_t r = 0; r < rows.count; r++) hadamard(rows.mixed + r * padded, layout.dim);
    while (found) {
        const int64_t count = (found + kPanelTokens - 1) / kPanelTokens, ahead = tile(at + found, next);
        if (coded.bias) score_swing(task, rows, coded, start + at, found, few);
        for (int64_t p = 0; p < count; p++) {
            if (p * kPanelTokens < ahead) fetch(layout, next[p]);
            if (panels[p].mean != mean) add_mean(layout, mean = panels[p].mean, rows, coded, rows.values);
            each_code_rows(rows.count, [&](auto tag, int64_t r) {
                score_panel<BITS, decltype(tag)::scheme>(layout, panels[p], rows, coded, r,
                                                         rows.scores + r * kKeyTile + p * kPanelTokens);
            });
        }
        for (int64_t r = 0; r < rows.count; r++) soften(task, rows, r, start + at, count * kPanelTokens);
        each_code_rows(rows.count, [&](auto tag, int64_t r) {
            mix_panels<BITS, decltype(tag)::scheme>(layout, panels, count, padded, rows.scores + r * kKeyTile,
                                                    rows.mixed + r * padded);
        });
        Panel* const done = panels;
        panels = next;
        next = done;
        at += found;
        found = ahead;
    }
    for (int64_t r = 0; r < rows.count; r++) hadamard(rows.mixed + r * padded, layout.dim);
}

}  // namespace
