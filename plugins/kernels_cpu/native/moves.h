// Copies tokens between storages of any kinds: on write, into quantized blocks (store.h), and out of them again.
#pragma once
#include "attention.h"
#include "elementwise.h"
#include "hadamard.h"
#include "store.h"

namespace {

// += sign times the bias of keys as it stands at a position.
static void add_bias(const MoveTask& task, int64_t position, float sign, float* scratch, float* x) {
    const RvModel& model = *task.model;
    const int64_t at = position * (model.rope_dim / 2);
    memcpy(scratch, task.bias, (size_t)model.head_dim * 4);
    rope(scratch, 1, model, task.cos + at, task.sin + at);
    for (int64_t k = 0; k < model.head_dim; k++) x[k] += sign * scratch[k];
}

static inline float code_at(const uint8_t* codes, int64_t word, int64_t byte, int64_t quad, bool four_bits) {
    const int code = codes[4 * word + byte];
    return four_bits ? (float)(quad % 2 ? code >> 4 : code & 15) - 7.5f : (float)code - 127.5f;
}

// One quantized key or value, turned back; of keys without their bias.
static void read_coded(const StoreLayout& layout, bool four_bits, const uint8_t* stored, const uint8_t* mean,
                       int64_t head, int64_t slot, float* out) {
    const int64_t block = slot / layout.size, token = slot % layout.size, lane = token % kPanelTokens;
    const int64_t panel = token - lane, each = four_bits ? 2 : 1;  // quads in a word
    const uint8_t* codes = stored + layout.codes(block, head, panel);
    const uint16_t* scales = (const uint16_t*)(stored + layout.scales(block, head, panel));
    for (int64_t k = 0; k < layout.dim; k++) {
        const float scale = half_to_float(scales[k / layout.group * kPanelTokens + lane]);
        const int64_t quad = mean ? k / 4 : lane / 4, word = mean ? quad / each * kPanelTokens + lane
                                                                  : quad / each * layout.dim + k;
        out[k] = scale * code_at(codes, word, mean ? k % 4 : lane % 4, quad, four_bits);
    }
    if (mean) {
        mean += layout.mean(block, head);
        uint16_t scale;
        memcpy(&scale, mean + layout.dim, 2);
        for (int64_t k = 0; k < layout.dim; k++) out[k] += half_to_float(scale) * ((float)mean[k] - 127.5f);
    }
    hadamard(out, layout.dim);
}

// One key or value of a move's source as floats.
static void read_one(const MoveTask& task, bool key, int64_t i, float* scratch, float* out) {
    const RvSegment& from = task.move->source;
    const uint8_t* stored = (const uint8_t*)(key ? from.keys : from.values)[task.layer];
    const int64_t dim = task.model->head_dim, slot = task.move->from_slots[i], size = from.block_size;
    if (is_coded(from.type)) {
        const uint8_t* mean = key ? (const uint8_t*)from.means[task.layer] : nullptr;
        read_coded(StoreLayout(*task.model, from), from.type == RV_KV_Q4, stored, mean, task.kv_head, slot, out);
        if (key && task.bias) add_bias(task, task.move->positions[i], 1.0f, scratch, out);
        return;
    }
    const int64_t at = ((slot / size * task.model->kv_heads + task.kv_head) * size + slot % size) * dim;
    if (from.type == RV_KV_F16) gather<RV_KV_F16>(stored, &at, 1, dim, dim, out);
    else if (from.type == RV_KV_BF16) gather<RV_KV_BF16>(stored, &at, 1, dim, dim, out);
    else gather<RV_KV_F32>(stored, &at, 1, dim, dim, out);
    if (key && task.bias && is_coded(task.move->target.type))
        add_bias(task, task.move->positions[i], -1.0f, scratch, out);
}

// The f16 scale nearest to `wanted`: within what f16 holds, and never 0, by which codes are divided.
static inline float scale_of(float wanted) {
    return half_to_float(float_to_half(wanted < 6e-8f ? 6e-8f : wanted > 65504.0f ? 65504.0f : wanted));
}

static inline V nearest(V x) { return (x + 12582912.0f) - 12582912.0f; }  // 1.5 * 2^23: adding it rounds to an integer

// The mean of a block's keys, turned and coded; the floats it stands for.
static void write_mean(float* mean, int64_t dim, uint8_t* out) {
    hadamard(mean, dim);
    float top = 0;
    for (int64_t k = 0; k < dim; k++) top = __builtin_fmaxf(top, __builtin_fabsf(mean[k]));
    const float scale = scale_of(top / 127.5f);
    const uint16_t half = float_to_half(scale);
    memcpy(out + dim, &half, 2);
    for (int64_t k = 0; k < dim; k++) {
        const float code = __builtin_nearbyintf(mean[k] / scale + 127.5f);
        out[k] = (uint8_t)(code < 0 ? 0 : code > 255 ? 255 : code);
        mean[k] = ((float)out[k] - 127.5f) * scale;
    }
}

// Codes and scales of one group of values [group][16 tokens]: the scale is the one of least squared error among shares of
// what the largest value needs, as cutting that off may serve the others.
template <int BITS> static void code_group(const float* x, int64_t group, uint8_t* codes, uint16_t* scales) {
    constexpr float shares[] = {1.0f, 0.93f, 0.86f, 0.8f}, middle = BITS == 4 ? 7.5f : 127.5f;
    for (int64_t lane = 0; lane < kPanelTokens; lane += kLanes, x += kLanes, codes += kLanes) {
        V top{}, scale{}, best = splat(3e38f);
        for (int64_t k = 0; k < group; k++) {
            const V one = load(x + k * kPanelTokens);
            top = vmax(top, vmax(one, -one));
        }
        for (int i = 0; i < (BITS == 4 ? 4 : 1); i++) {
            V tried;
            for (int j = 0; j < kLanes; j++) tried[j] = scale_of(top[j] * (shares[i] / middle));
            const V inverse = 1.0f / tried;
            V error{};
            for (int64_t k = 0; k < group && BITS == 4; k++) {
                const V one = load(x + k * kPanelTokens);
                const V code = vmin(vmax(nearest(one * inverse + middle), V{}), splat(2 * middle));
                const V off = (code - middle) * tried - one;
                error += off * off;
            }
            scale = select(error < best, tried, scale);
            best = vmin(error, best);
        }
        const V inverse = 1.0f / scale;
        for (int64_t k = 0; k < group; k++)
            store_bytes((int8_t*)codes + k * kPanelTokens,
                        __builtin_convertvector(vmin(vmax(nearest(load(x + k * kPanelTokens) * inverse + middle), V{}),
                                                     splat(2 * middle)), VI));
        for (int j = 0; j < kLanes; j++) scales[lane + j] = float_to_half(scale[j]);
    }
}

// Codes [D][16 tokens] to their places.
template <int BITS> static void pack_codes(const uint8_t* codes, int64_t dim, bool key, uint8_t* out) {
    constexpr int64_t each = BITS == 4 ? 2 : 1;
    if (key) {
        for (int64_t i = 0; i < dim / 4; i += each, codes += 4 * each * kPanelTokens) {
            uint32_t words[kPanelTokens] = {};
            for (int64_t k = 0; k < 4 * each; k++)
                for (int64_t lane = 0; lane < kPanelTokens; lane++)
                    words[lane] |= (uint32_t)codes[k * kPanelTokens + lane] << (8 * (k % 4) + 4 * (k / 4));
            memcpy(out, words, sizeof words);
            out += sizeof words;
        }
        return;
    }
    for (int64_t i = 0; i < kPanelTokens; i += 4 * each)
        for (int64_t k = 0; k < dim; k++, out += 4) {
            uint32_t quads[each], word = 0;
            memcpy(quads, codes + k * kPanelTokens + i, sizeof quads);
            for (int64_t quad = 0; quad < each; quad++) word |= quads[quad] << 4 * quad;
            memcpy(out, &word, 4);
        }
}

// [16 tokens][wide] to [wide][16 tokens].
static void turn_panel(const float* rows, int64_t wide, float* panel) {
    for (int64_t lane = 0; lane < kPanelTokens; lane += kLanes)
        for (int64_t k = 0; k < wide; k += kLanes) {
            V square[kLanes];
            for (int i = 0; i < kLanes; i++) square[i] = load(rows + (lane + i) * wide + k);
            turn(square);
            for (int i = 0; i < kLanes; i++) store(panel + (k + i) * kPanelTokens + lane, square[i]);
        }
}

// Whole blocks of a quantized target.
template <int BITS> static void write_blocks(const MoveTask& task, bool key) {
    const RvSegment& to = task.move->target;
    const StoreLayout layout(*task.model, to);
    const int64_t dim = layout.dim;
    uint8_t* stored = (uint8_t*)(key ? to.keys : to.values)[task.layer];
    const int64_t wide = round_up(dim, kLanes);
    float *rows = task.scratch, *scratch = rows + kPanelTokens * wide, *mean = scratch + wide, *panel = mean + wide;
    uint8_t* codes = (uint8_t*)(panel + wide * kPanelTokens);
    for (int64_t i = task.begin; i < task.end; i += layout.size) {
        const int64_t block = task.move->to_slots[i] / layout.size;
        memset(mean, 0, (size_t)dim * 4);
        if (key) {
            for (int64_t token = 0; token < layout.size; token++) {
                read_one(task, true, i + token, scratch, rows);
                for (int64_t k = 0; k < dim; k++) mean[k] += rows[k];
            }
            for (int64_t k = 0; k < dim; k++) mean[k] /= (float)layout.size;
            write_mean(mean, dim, (uint8_t*)to.means[task.layer] + layout.mean(block, task.kv_head));
        }
        for (int64_t token = 0; token < layout.size; token += kPanelTokens) {
            for (int64_t lane = 0; lane < kPanelTokens; lane++) {
                float* row = rows + lane * wide;
                read_one(task, key, i + token + lane, scratch, row);
                hadamard(row, dim);
                for (int64_t k = 0; k < dim; k++) row[k] -= mean[k];
            }
            turn_panel(rows, wide, panel);
            uint16_t* scales = (uint16_t*)(stored + layout.scales(block, task.kv_head, token));
            for (int64_t g = 0; g < layout.groups; g++)
                code_group<BITS>(panel + g * layout.group * kPanelTokens, layout.group,
                                 codes + g * layout.group * kPanelTokens, scales + g * kPanelTokens);
            pack_codes<BITS>(codes, dim, key, stored + layout.codes(block, task.kv_head, token));
        }
    }
}

static void move(const MoveTask& task) {
    const RvSegment& to = task.move->target;
    const int64_t dim = task.model->head_dim, size = to.block_size, bytes = to.type == RV_KV_F32 ? 4 : 2;
    for (int kind = 0; kind < 2; kind++) {
        const bool key = !kind;
        if (to.type == RV_KV_Q4) write_blocks<4>(task, key);
        else if (to.type == RV_KV_Q8) write_blocks<8>(task, key);
        else
            for (int64_t i = task.begin; i < task.end; i++) {
                const int64_t slot = task.move->to_slots[i];
                const int64_t at = ((slot / size * task.model->kv_heads + task.kv_head) * size + slot % size) * dim;
                read_one(task, key, i, task.scratch + dim, task.scratch);
                store_kv(task.scratch, dim, to.type, (uint8_t*)(key ? to.keys : to.values)[task.layer] + at * bytes);
            }
    }
}

}  // namespace
