#include "decoder.h"

#include <algorithm>
#include <cstring>

namespace {

constexpr int64_t kTasksPerThread = 4;  // so that a thread whose core is taken away holds nobody up for long
constexpr int64_t kSmallTokens = 8;     // fewer are not worth waking threads for

bool quantized(const RvMatrix& w) { return !is_float(w.scheme); }

}  // namespace

RvDecoder::RvDecoder(const RvModel& description, const Kernels& table, int threads)
    : model_(description), layers_(description.layer, description.layer + description.layers), kernels_(table),
      pool_(threads) {
    model_.layer = layers_.data();
    const int64_t cols = std::max(model_.hidden, std::max(model_.inner, model_.heads * model_.head_dim));
    const int64_t floats = std::max(matmul_scratch(cols) / 4, attention_scratch(model_));
    scratch_.assign((size_t)threads, std::vector<float>((size_t)floats));
}

template <class F> void RvDecoder::each_token(int64_t count, F&& body) {
    if (count < kSmallTokens) {
        for (int64_t t = 0; t < count; t++) body(t);
        return;
    }
    const int64_t tasks = std::min(count, pool_.threads() * kTasksPerThread);
    pool_.run(tasks, [&](int64_t task, int) {
        for (int64_t t = count * task / tasks; t < count * (task + 1) / tasks; t++) body(t);
    });
}

Activations RvDecoder::describe(const float* x, int64_t count, int64_t cols, bool quantized) {
    Activations found;
    found.x = x;
    found.count = count;
    found.cols = cols;
    if (quantized) {
        const int64_t blocks = cols / 32;
        found.q = (int8_t*)bytes_.room(count * cols / 4 + 16);
        found.d = scales_.room(count * blocks * 4 + 64);
        found.s32 = found.d + count * blocks;
        found.s16 = found.s32 + count * blocks;
    }
    return found;
}

void RvDecoder::quantize_token(const Activations& x, int64_t t) {
    const int64_t blocks = x.cols / 32;
    if (x.q)
        kernels_.quantize(x.x + t * x.cols, x.cols, x.q + t * x.cols, x.d + t * blocks, x.s32 + t * blocks,
                          x.s16 + t * 2 * blocks);
}

void RvDecoder::products(const Activations& x, const Product* wanted, int count) {
    int64_t total = 0;
    for (int i = 0; i < count; i++) total += wanted[i].matrix->rows;
    const int64_t aim = total / (pool_.threads() * kTasksPerThread) + 1;
    const int64_t step = (aim + kPanelRows - 1) / kPanelRows * kPanelRows;
    int64_t tasks = 0;
    for (int i = 0; i < count; i++) tasks += (wanted[i].matrix->rows + step - 1) / step;
    pool_.run(tasks, [&](int64_t task, int worker) {
        int i = 0;
        for (int64_t own; task >= (own = (wanted[i].matrix->rows + step - 1) / step); i++) task -= own;
        const Product& product = wanted[i];
        kernels_.matmul(*product.matrix, x, task * step, std::min((task + 1) * step, product.matrix->rows), product.out,
                        product.stride, scratch_[(size_t)worker].data());
    });
}

void RvDecoder::add_deltas(const RvBatch& batch, int layer, int site, const Activations& x, float* out,
                           int64_t stride) {
    for (int64_t n = 0; n < batch.deltas_count; n++) {
        const RvDelta& delta = batch.deltas[n];
        if (delta.layer != layer || delta.site != site) continue;
        const int64_t count = delta.end - delta.begin, rows = layers_[(size_t)layer].sites[site].rows;
        float* low = delta_.room(count * (delta.rank + rows));
        float* high = low + count * delta.rank;
        const auto matrix = [](const float* data, int64_t height, int64_t width) {
            return RvMatrix{(const uint8_t*)data, nullptr, height, width, width * 4, RV_F32, 0};
        };
        const RvMatrix a = matrix(delta.a, delta.rank, x.cols), b = matrix(delta.b, rows, delta.rank);
        const Product down{&a, low, delta.rank}, up{&b, high, rows};
        Activations narrow;
        narrow.x = x.x + delta.begin * x.cols;
        narrow.count = count;
        narrow.cols = x.cols;
        products(narrow, &down, 1);
        narrow.x = low;
        narrow.cols = delta.rank;
        products(narrow, &up, 1);
        for (int64_t t = 0; t < count; t++)
            for (int64_t r = 0; r < rows; r++) out[(delta.begin + t) * stride + r] += delta.scale * high[t * rows + r];
    }
}

void RvDecoder::attention(const RvBatch& batch, int layer) {
    const int64_t width = (int64_t)(model_.heads + 2 * model_.kv_heads) * model_.head_dim;
    const float* query = qkv_.room(batch.tokens_count * width);
    float* out = mixed_.room(batch.tokens_count * model_.heads * model_.head_dim);
    // Tiles of every sequence, one after the other, for each key/value head.
    int64_t tiles = 0;
    for (int64_t b = 0; b < batch.sequences; b++)
        tiles += (batch.cu_q[b + 1] - batch.cu_q[b] + kQueryTile - 1) / kQueryTile;
    pool_.run(tiles * model_.kv_heads, [&](int64_t task, int worker) {
        int64_t tile = tiles - 1 - task / model_.kv_heads, b = 0;  // the last tile sees most keys: it goes first
        for (int64_t own; tile >= (own = (batch.cu_q[b + 1] - batch.cu_q[b] + kQueryTile - 1) / kQueryTile); b++)
            tile -= own;
        const int64_t begin = batch.cu_q[b] + tile * kQueryTile;
        const int64_t end = std::min(begin + kQueryTile, (int64_t)batch.cu_q[b + 1]);
        kernels_.attend({&model_, &batch, layer, (int32_t)b, (int32_t)(task % model_.kv_heads), begin, end,
                         layers_[(size_t)layer].window, query, width, out, scratch_[(size_t)worker].data()});
    });
}

// `pending` is what the next norm adds to the residual: the output of the last product.
void RvDecoder::layer(const RvBatch& batch, int n, const float** pending) {
    const RvLayer& layer = layers_[(size_t)n];
    const RvMatrix* w = layer.sites;
    const int64_t count = batch.tokens_count, hidden = model_.hidden, inner = model_.inner, dim = model_.head_dim;
    const int64_t q = model_.heads * dim, kv = model_.kv_heads * dim, width = q + 2 * kv;
    float *residual = residual_.room(count * hidden), *x = x_.room(count * hidden);
    float *qkv = qkv_.room(count * width), *mixed = mixed_.room(count * q);
    float *both = inner_.room(count * 2 * inner), *gated = gated_.room(count * inner);

    Activations in = describe(x, count, hidden, quantized(w[RV_Q]) || quantized(w[RV_K]) || quantized(w[RV_V]));
    const float* add = *pending;
    each_token(count, [&](int64_t t) {
        kernels_.norm(residual + t * hidden, add ? add + t * hidden : nullptr, layer.attn_norm, hidden, model_.eps,
                      x + t * hidden);
        quantize_token(in, t);
    });
    const Product heads[] = {{&w[RV_Q], qkv, width}, {&w[RV_K], qkv + q, width}, {&w[RV_V], qkv + q + kv, width}};
    products(in, heads, 3);
    for (int site = RV_Q; site <= RV_V; site++) add_deltas(batch, n, site, in, heads[site].out, width);

    const RvSegment& newest = batch.segments[batch.segments_count - 1];
    each_token(count, [&](int64_t t) {
        const int64_t b = std::upper_bound(batch.cu_q, batch.cu_q + batch.sequences + 1, (int32_t)t) - batch.cu_q - 1;
        const int64_t at = batch.positions[t] * (model_.rope_dim / 2);
        float* row = qkv + t * width;
        kernels_.rope(row, model_.heads + model_.kv_heads, model_, batch.cos[b] + at, batch.sin[b] + at);
        const int64_t size = newest.block_size, block = batch.slots[t] / size, offset = batch.slots[t] % size;
        for (int64_t k = 0; k < model_.kv_heads; k++) {
            const int64_t to = ((block * model_.kv_heads + k) * size + offset) * dim;
            const float *key = row + q + k * dim, *value = key + kv;
            if (newest.half) {
                kernels_.to_half(key, dim, (uint16_t*)newest.keys[n] + to);
                kernels_.to_half(value, dim, (uint16_t*)newest.values[n] + to);
            } else {
                memcpy((float*)newest.keys[n] + to, key, (size_t)dim * 4);
                memcpy((float*)newest.values[n] + to, value, (size_t)dim * 4);
            }
        }
    });
    attention(batch, n);

    in = describe(mixed, count, q, quantized(w[RV_O]));
    if (in.q) each_token(count, [&](int64_t t) { quantize_token(in, t); });
    const Product out{&w[RV_O], x, hidden};
    products(in, &out, 1);
    add_deltas(batch, n, RV_O, in, x, hidden);

    in = describe(x, count, hidden, quantized(w[RV_GATE]) || quantized(w[RV_UP]));
    each_token(count, [&](int64_t t) {
        kernels_.norm(residual + t * hidden, x + t * hidden, layer.mlp_norm, hidden, model_.eps, x + t * hidden);
        quantize_token(in, t);
    });
    const Product halves[] = {{&w[RV_GATE], both, 2 * inner}, {&w[RV_UP], both + inner, 2 * inner}};
    products(in, halves, 2);
    add_deltas(batch, n, RV_GATE, in, both, 2 * inner);
    add_deltas(batch, n, RV_UP, in, both + inner, 2 * inner);

    in = describe(gated, count, inner, quantized(w[RV_DOWN]));
    each_token(count, [&](int64_t t) {
        const float* gate = both + t * 2 * inner;
        kernels_.gated(gate, gate + inner, inner, model_.activation, gated + t * inner);
        quantize_token(in, t);
    });
    const Product down{&w[RV_DOWN], x, hidden};
    products(in, &down, 1);
    add_deltas(batch, n, RV_DOWN, in, x, hidden);
    *pending = x;
}

void RvDecoder::forward(const RvBatch& batch, float* hidden) {
    const int64_t count = batch.tokens_count, width = model_.hidden;
    float* residual = residual_.room(count * width);
    each_token(count, [&](int64_t t) {
        kernels_.decode_row(model_.embed, batch.tokens[t], residual + t * width, nullptr);
    });
    const float* pending = nullptr;
    for (int n = 0; n < model_.layers; n++) layer(batch, n, &pending);
    // A row may be wanted twice: the sum is formed in the output, the residual stays as it is.
    float* total = qkv_.room(width);
    for (int64_t r = 0; r < batch.rows_count; r++) {
        memcpy(total, residual + batch.rows[r] * width, (size_t)width * 4);
        kernels_.norm(total, pending + batch.rows[r] * width, model_.final_norm, width, model_.eps, hidden + r * width);
    }
}

void RvDecoder::logits(const float* hidden, int64_t count, float* out) {
    matmul(model_.head, hidden, count, out);
    if (model_.logit_softcap > 0)
        each_token(count, [&](int64_t t) {
            kernels_.softcap(out + t * model_.vocab, model_.vocab, model_.logit_softcap);
        });
}

void RvDecoder::matmul(const RvMatrix& w, const float* x, int64_t count, float* out) {
    const Activations in = describe(x, count, w.cols, quantized(w));
    if (in.q) each_token(count, [&](int64_t t) { quantize_token(in, t); });
    const Product product{&w, out, w.rows};
    products(in, &product, 1);
}
