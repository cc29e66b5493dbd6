// Attention over paged segments of every type, in double: windows, soft caps, groups of heads, boundaries, key biases,
// and split keys. Of quantized keys and values, what is restored from them counts.
#include "stored.h"

namespace {

struct Case {
    int32_t heads, kv_heads, dim;
    int64_t tokens, context, window;  // tokens are the last of `context`
    float softcap;
    int32_t types[2];   // of an older and of the newest segment
    int32_t block;      // tokens in blocks of the older one
    bool bounded;       // every token has a boundary of its own; the newest segment then has all keys
    float bias;         // how large the key bias is; 0: none
    int32_t rope_dim, interleaved;
};

constexpr int32_t F32 = RV_KV_F32, F16 = RV_KV_F16, BF16 = RV_KV_BF16, Q8 = RV_KV_Q8, Q4 = RV_KV_Q4;

const Case kCases[] = {
    {4, 4, 16, 1, 1, 0, 0, {F16, F32}, 16, false, 0, 0, 0},
    {4, 4, 64, 1, 100, 0, 0, {F16, F16}, 16, false, 0, 0, 0},
    {7, 1, 24, 5, 70, 0, 0, {F32, BF16}, 16, false, 0, 0, 0},
    {6, 2, 80, 33, 33, 0, 5, {F16, F32}, 16, false, 0, 0, 0},
    {4, 1, 128, 64, 130, 17, 0, {BF16, F16}, 16, false, 0, 0, 0},
    {3, 3, 33, 9, 200, 5, 2, {F32, F32}, 16, false, 0, 0, 0},
    {8, 2, 32, 2, 129, 64, 0, {F16, F16}, 16, false, 0, 0, 0},
    {2, 1, 16, 64, 130, 1, 0, {F32, F16}, 16, false, 0, 0, 0},
    {6, 2, 64, 40, 150, 0, 0, {F32, F32}, 16, true, 0, 0, 0},
    {7, 1, 48, 5, 170, 60, 0, {F16, F32}, 24, true, 0, 0, 0},

    {1, 1, 64, 1, 200, 0, 0, {Q8, F16}, 16, false, 0, 0, 0},
    {3, 1, 64, 1, 150, 0, 0, {Q8, F32}, 32, true, 0, 0, 0},
    {14, 2, 64, 64, 210, 0, 0, {Q8, F16}, 48, true, 2, 64, 0},
    {7, 1, 128, 1, 190, 90, 0, {Q8, F16}, 16, true, 3, 128, 0},
    {2, 2, 24, 3, 120, 0, 5, {Q8, F32}, 16, true, 2, 16, 1},
    {4, 2, 96, 9, 100, 30, 0, {Q8, BF16}, 16, false, 0, 0, 0},
    {6, 2, 16, 33, 130, 0, 0, {Q8, F16}, 64, true, 1, 16, 0},
    {5, 1, 80, 1, 160, 0, 2, {Q8, F16}, 16, true, 1, 40, 1},

    {1, 1, 64, 1, 200, 0, 0, {Q4, F16}, 16, false, 0, 0, 0},
    {3, 1, 64, 1, 150, 0, 0, {Q4, F32}, 32, true, 0, 0, 0},
    {14, 2, 64, 17, 210, 0, 0, {Q4, F16}, 48, true, 2, 64, 0},
    {7, 1, 128, 1, 190, 90, 0, {Q4, F16}, 16, true, 3, 128, 0},
    {2, 2, 24, 3, 120, 0, 5, {Q4, F32}, 16, true, 2, 16, 1},
    {4, 2, 96, 9, 100, 30, 0, {Q4, BF16}, 16, false, 0, 0, 0},
    {6, 2, 16, 33, 130, 0, 0, {Q4, F16}, 64, true, 1, 16, 0},
    {5, 1, 80, 1, 160, 0, 2, {Q4, F16}, 16, true, 1, 40, 1},
};

RvModel model_of(const Case& c) {
    RvModel model{};
    model.heads = c.heads;
    model.kv_heads = c.kv_heads;
    model.head_dim = c.dim;
    model.rope_dim = c.rope_dim;
    model.rope_interleaved = c.interleaved;
    model.scale = (c.bias > 0 ? 1.0f : 2.0f) / std::sqrt((float)c.dim);
    model.attention_softcap = c.softcap;
    model.center_keys = c.bias > 0;
    return model;
}

// One sequence of several. Its keys up to `older` stand in the first segment, the others in the second.
struct World {
    static constexpr int32_t kNewest = 16, kSequences = 2;  // tokens in blocks of the newest segment
    const Case& c;
    const Kernels& table;
    const Kernels& base;
    RvModel model;
    int64_t older, per[2];       // blocks of a sequence
    Turns turns;
    RvLayer layer{};
    RvBatch batch{};
    RvSegment segments[2];
    Stored stored[2];
    std::vector<int64_t> positions;
    std::vector<int32_t> boundary, tables[2];
    int32_t lengths[2][kSequences], starts[2][kSequences];
    std::vector<float> query;                 // [tokens, stride]
    std::vector<float> keys[2], values[2];    // of each segment as read from it: [context and a block, kv_heads, dim]
    const float *cos[kSequences], *sin[kSequences];
    int64_t stride;

    World(const Case& shape, const Tables& used, Random& random)
        : c(shape), table(*used.table), base(*used.base), model(model_of(shape)),
          older(shape.bounded ? shape.context * 3 / 4 / shape.block * shape.block : shape.context / 3),
          per{shape.context / shape.block + 1, shape.context / kNewest + 1},
          turns(model, shape.context + shape.block, shape.bias, random),
          stored{{model, shape.types[0], shape.block, 2 * per[0] + 1},
                 {model, shape.types[1], kNewest, 2 * per[1] + 1}} {
        for (int64_t t = 0; t < c.tokens; t++) positions.push_back(c.context - c.tokens + t);
        for (int64_t t = 0; t < c.tokens && c.bounded; t++)
            boundary.push_back((int32_t)std::min(older, random.below(2 * positions[(size_t)t] / 3 + 2)));
        if (c.bounded && c.tokens > 2) boundary[1] = 0, boundary[2] = (int32_t)std::min(older, positions[2]);
        layer.sites[RV_K].bias = c.bias > 0 ? turns.bias.data() : nullptr;
        model.layer = &layer;
        for (int b = 0; b < kSequences; b++) cos[b] = turns.cos.data(), sin[b] = turns.sin.data();
        batch.positions = positions.data();
        batch.segments_count = 2;
        batch.segments = segments;
        batch.boundary = c.bounded ? boundary.data() : nullptr;
        batch.cos = cos, batch.sin = sin;
        stride = c.heads * c.dim + 5;
        query = random.normals(c.tokens * stride);
        for (int side = 0; side < 2; side++) {
            std::vector<float>& rows = side ? values[0] : keys[0];
            rows = random.normals((c.context + c.block) * c.kv_heads * c.dim);
            for (int64_t i = 0; i < (c.context + c.block) * c.kv_heads && !side; i++) {
                const std::vector<double> bias = turns.at(model, i % c.kv_heads, i / c.kv_heads);
                for (int64_t k = 0; k < c.dim; k++) rows[(size_t)(i * c.dim + k)] += (float)bias[(size_t)k];
            }
        }
        keys[1] = keys[0], values[1] = values[0];
        for (int n = 0; n < 2; n++) fill(n, random);
    }

    void fill(int n, Random& random) {
        const int64_t first = n && !c.bounded ? older : 0, count = n ? c.context - first : older;
        const int64_t size = n ? kNewest : c.block;
        for (const int64_t block : shuffled(2 * per[n] + 1, random)) tables[n].push_back((int32_t)block);
        std::vector<int64_t> slots, all;
        for (int64_t i = 0; i < (count + size - 1) / size * size; i++) {
            slots.push_back(tables[n][(size_t)(per[n] + i / size)] * size + i % size);
            all.push_back(i);
        }
        if (is_coded(c.types[n])) {
            Stored floats(model, F32, (int32_t)all.size() + 1, 1);
            exchange(n, all, floats);
            move_tokens(table, floats, stored[n], all, slots, all, c.bias > 0 ? &turns : nullptr);
            move_tokens(table, stored[n], floats, slots, all, all, c.bias > 0 ? &turns : nullptr);
            exchange(n, all, floats);
        } else {
            for (int64_t i = 0; i < count; i++)
                for (int64_t head = 0; head < c.kv_heads; head++) {
                    const int64_t from = ((first + i) * c.kv_heads + head) * c.dim;
                    keep(keys[n].data() + from, c.types[n], stored[n].at(true, slots[(size_t)i], head));
                    keep(values[n].data() + from, c.types[n], stored[n].at(false, slots[(size_t)i], head));
                }
        }
        lengths[n][0] = 0, lengths[n][1] = (int32_t)count;
        starts[n][0] = 0, starts[n][1] = (int32_t)first;
        segments[n] = stored[n].segment;
        segments[n].table_stride = (int32_t)per[n];
        segments[n].table = tables[n].data();
        segments[n].lengths = lengths[n];
        segments[n].starts = starts[n];
    }

    // The keys and values of a segment for those that some storage of floats has, and the other way round.
    void exchange(int n, const std::vector<int64_t>& tokens, Stored& floats) {
        for (const int64_t i : tokens)
            for (int64_t at = i * c.kv_heads * c.dim; at < (i + 1) * c.kv_heads * c.dim; at++) {
                const int64_t head = at / c.dim % c.kv_heads, k = at % c.dim;
                std::swap(((float*)floats.at(true, i, head))[k], keys[n][(size_t)at]);
                std::swap(((float*)floats.at(false, i, head))[k], values[n][(size_t)at]);
            }
    }

    // Stores a row, and leaves in its place what was stored.
    void keep(float* row, int32_t type, uint8_t* to) {
        base.store_kv(row, c.dim, type, to);
        const int32_t scheme = type == F32 ? RV_F32 : type == F16 ? RV_F16 : RV_BF16;
        base.decode_row({to, nullptr, 1, c.dim, 0, scheme, 0}, 0, row);
    }

    // [dim]
    std::vector<double> want(int64_t t, int64_t head) const {
        const int64_t own = positions[(size_t)t], kv = head / (c.heads / c.kv_heads);
        const int64_t newest = c.bounded ? boundary[(size_t)t] : older;
        double total = 0;
        std::vector<double> sum((size_t)c.dim);
        for (int64_t at = c.window ? std::max((int64_t)0, own - c.window + 1) : 0; at <= own; at++) {
            const size_t from = (size_t)((at * c.kv_heads + kv) * c.dim);
            const float *key = keys[at >= newest].data() + from, *value = values[at >= newest].data() + from;
            double score = 0;
            for (int64_t i = 0; i < c.dim; i++)
                score += (double)query[(size_t)(t * stride + head * c.dim + i)] * key[i] * model.scale;
            if (c.softcap > 0) score = std::tanh(score / c.softcap) * c.softcap;
            const double weight = std::exp(score);
            total += weight;
            for (int64_t k = 0; k < c.dim; k++) sum[(size_t)k] += weight * value[k];
        }
        for (double& one : sum) one /= total;
        return sum;
    }
};

void check_case(const Case& c, const Tables& tables, Random& random, Check& check) {
    World world(c, tables, random);
    const int64_t group = c.heads / c.kv_heads, width = c.dim + 2;
    std::vector<float> whole((size_t)(c.tokens * c.heads * c.dim), NAN), split = whole;
    std::vector<float> scratch((size_t)attention_scratch(world.model), NAN);
    const int64_t low = c.window ? std::max((int64_t)0, world.positions[0] - c.window + 1) : 0;
    for (int32_t kv = 0; kv < c.kv_heads; kv++) {
        AttentionTask task{&world.model, &world.batch, 0, 1, kv, 0, c.tokens, low, c.context, c.window,
                           world.query.data(), world.stride, whole.data(), nullptr, scratch.data()};
        tables.table->attend(task);
        // The same in two runs of keys, put together.
        const int64_t middle = (low + c.context) / 2, rows = c.tokens * group;
        std::vector<float> parts[2];
        for (int n = 0; n < 2; n++) {
            parts[n].assign((size_t)(rows * width), NAN);
            task.partial = parts[n].data();
            task.low = n ? middle : low;
            task.high = n ? c.context : middle;
            tables.table->attend(task);
        }
        for (int64_t r = 0; r < rows; r++) {
            const float *a = parts[0].data() + r * width, *b = parts[1].data() + r * width;
            const double best = std::max(a[c.dim], b[c.dim]);
            const double fa = std::exp(a[c.dim] - best), fb = std::exp(b[c.dim] - best);
            for (int64_t k = 0; k < c.dim; k++)
                split[(size_t)(((r / group) * c.heads + kv * group + r % group) * c.dim + k)] =
                    (float)((a[k] * fa + b[k] * fb) / (a[c.dim + 1] * fa + b[c.dim + 1] * fb));
        }
    }
    // Queries and weights are rounded to two bytes where keys are quantized.
    const double allowed = is_coded(c.types[0]) ? 3e-4 : 5e-6;
    for (int64_t t = 0; t < c.tokens; t++)
        for (int64_t head = 0; head < c.heads; head++) {
            const std::vector<double> want = world.want(t, head);
            for (int64_t k = 0; k < c.dim; k++) {
                const size_t at = (size_t)((t * c.heads + head) * c.dim + k);
                const int context = (int)c.context, token = (int)t;
                check.close(whole[at], want[(size_t)k], allowed, "context %d, token %d, head %d", context, token,
                            (int)head);
                check.close(split[at], want[(size_t)k], allowed, "in parts: context %d, token %d", context, token);
            }
        }
}

}  // namespace

void check_attention(const Tables& tables, Check& check) {
    const struct {
        const char* name;
        int32_t type;
    } parts[] = {{"attention", -1}, {"attention-q8", Q8}, {"attention-q4", Q4}};
    for (const auto& part : parts) {
        Random random;
        for (const Case& c : kCases)
            if (is_coded(c.types[0]) ? c.types[0] == part.type : part.type < 0) check_case(c, tables, random, check);
        check.report(tables.table->name, part.name);
    }
}
