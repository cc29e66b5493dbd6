// Attention over paged segments of every type, in double: windows, soft caps, groups of heads, and split keys.
#include <algorithm>
#include "check.h"

namespace {

struct Case {
    int32_t heads, kv_heads, dim;
    int64_t tokens, context, window;  // tokens are the last of `context`
    float softcap;
    int32_t types[2];  // of an older and of the newest segment
};

const Case kCases[] = {
    {4, 4, 16, 1, 1, 0, 0, {RV_KV_F16, RV_KV_F32}},      {4, 4, 64, 1, 100, 0, 0, {RV_KV_F16, RV_KV_F16}},
    {7, 1, 24, 5, 70, 0, 0, {RV_KV_F32, RV_KV_BF16}},    {6, 2, 80, 33, 33, 0, 5, {RV_KV_F16, RV_KV_F32}},
    {4, 1, 128, 64, 130, 17, 0, {RV_KV_BF16, RV_KV_F16}}, {3, 3, 33, 9, 200, 5, 2, {RV_KV_F32, RV_KV_F32}},
    {8, 2, 32, 2, 129, 64, 0, {RV_KV_F16, RV_KV_F16}},   {2, 1, 16, 64, 130, 1, 0, {RV_KV_F32, RV_KV_F16}},
};

// One sequence of several: its keys up to `older` stand in the first segment, the others in the second.
struct World {
    static constexpr int kBlock = 16, kSequences = 2;
    const Case& c;
    const Kernels& base;
    int64_t older, blocks;
    RvModel model{};
    RvBatch batch{};
    RvSegment segments[2]{};
    std::vector<int64_t> positions;
    std::vector<int32_t> tables[2];
    int32_t lengths[2][kSequences], starts[2][kSequences];
    std::vector<float> keys, values, query;  // [context, kv_heads, dim], [tokens, stride]
    std::vector<uint8_t> stored[2][2];       // [segment][keys, values]
    void* pointers[2][2];
    int64_t stride;

    World(const Case& shape, const Kernels& kernels, Random& random)
        : c(shape), base(kernels), older(shape.context / 3), blocks(2 * (shape.context / kBlock + 1) + 1) {
        model.heads = c.heads;
        model.kv_heads = c.kv_heads;
        model.head_dim = c.dim;
        model.scale = 2.0f / std::sqrt((float)c.dim);
        model.attention_softcap = c.softcap;
        for (int64_t t = 0; t < c.tokens; t++) positions.push_back(c.context - c.tokens + t);
        batch.positions = positions.data();
        batch.segments_count = 2;
        batch.segments = segments;
        stride = c.heads * c.dim + 5;
        query = random.normals(c.tokens * stride);
        keys = random.normals(c.context * c.kv_heads * c.dim);
        values = random.normals(c.context * c.kv_heads * c.dim);
        for (int n = 0; n < 2; n++) fill(n, random);
    }

    void fill(int n, Random& random) {
        const int64_t first = n ? older : 0, count = n ? c.context - older : older, per = blocks / 2;
        const int64_t width = c.types[n] == RV_KV_F32 ? 4 : 2;
        for (int64_t i = 0; i < blocks; i++) tables[n].push_back((int32_t)i);
        for (int64_t i = blocks - 1; i > 0; i--)
            std::swap(tables[n][(size_t)i], tables[n][(size_t)random.below(i + 1)]);
        for (auto& side : stored[n]) side.assign((size_t)(blocks * c.kv_heads * kBlock * c.dim * width), 0xff);  // NaN
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = 0; k < c.kv_heads; k++) {
                const int64_t block = tables[n][(size_t)(per + i / kBlock)];
                const int64_t to = ((block * c.kv_heads + k) * kBlock + i % kBlock) * c.dim * width;
                const int64_t from = ((first + i) * c.kv_heads + k) * c.dim;
                keep(keys.data() + from, c.types[n], stored[n][0].data() + to);
                keep(values.data() + from, c.types[n], stored[n][1].data() + to);
            }
        lengths[n][0] = 0, lengths[n][1] = (int32_t)count;
        starts[n][0] = 0, starts[n][1] = (int32_t)first;
        for (int side = 0; side < 2; side++) pointers[n][side] = stored[n][side].data();
        segments[n] = {c.types[n], kBlock, (int32_t)per, 0, tables[n].data(), lengths[n], starts[n], &pointers[n][0],
                       &pointers[n][1]};
    }

    // Stores a row, and leaves in its place what was stored.
    void keep(float* row, int32_t type, uint8_t* to) {
        base.store_kv(row, c.dim, type, to);
        const int32_t scheme = type == RV_KV_F32 ? RV_F32 : type == RV_KV_F16 ? RV_F16 : RV_BF16;
        base.decode_row({to, nullptr, 1, c.dim, 0, scheme, 0}, 0, row);
    }

    double want(int64_t t, int64_t head, int64_t k) const {
        const int64_t own = positions[(size_t)t], kv = head / (c.heads / c.kv_heads);
        double total = 0, sum = 0;
        for (int64_t at = c.window ? std::max((int64_t)0, own - c.window + 1) : 0; at <= own; at++) {
            double score = 0;
            for (int64_t i = 0; i < c.dim; i++)
                score += (double)query[(size_t)(t * stride + head * c.dim + i)] *
                         keys[(size_t)((at * c.kv_heads + kv) * c.dim + i)] * model.scale;
            if (c.softcap > 0) score = std::tanh(score / c.softcap) * c.softcap;
            total += std::exp(score);
            sum += std::exp(score) * values[(size_t)((at * c.kv_heads + kv) * c.dim + k)];
        }
        return sum / total;
    }
};

void check_case(const Case& c, const Tables& tables, Random& random, Check& check) {
    World world(c, *tables.base, random);
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
    for (int64_t t = 0; t < c.tokens; t++)
        for (int64_t head = 0; head < c.heads; head++)
            for (int64_t k = 0; k < c.dim; k++) {
                const size_t at = (size_t)((t * c.heads + head) * c.dim + k);
                const double want = world.want(t, head, k);
                check.close(whole[at], want, 5e-6, "context %d, token %d, head %d", (int)c.context, (int)t, (int)head);
                check.close(split[at], want, 5e-6, "in parts: context %d, token %d", (int)c.context, (int)t);
            }
}

}  // namespace

void check_attention(const Tables& tables, Check& check) {
    Random random;
    for (const Case& c : kCases) check_case(c, tables, random, check);
}
