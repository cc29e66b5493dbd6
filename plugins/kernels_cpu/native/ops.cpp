// Single operations for eager models, over the threads, the scratch memory and the loops of a decoder without layers.
// Python has checked every shape and index; one caller at a time.
#include "ops.h"

#include <algorithm>
#include <cstring>

#include "packed.h"

namespace {

RvModel without_layers(int32_t activation_bits) {
    RvModel model{};
    model.head_dim = model.heads = model.kv_heads = 1;
    model.activation_bits = activation_bits;
    return model;
}

}  // namespace

RvOps::RvOps(const Kernels& table, int threads, int32_t activation_bits)
    : RvDecoder(without_layers(activation_bits), table, threads) {
    layers_.resize(1);  // for the window of attention
}

void RvOps::need_scratch(int64_t floats) {
    for (auto& one : scratch_)
        if ((int64_t)one.size() < floats) one.resize((size_t)floats);
}

std::unique_ptr<RvWeight> RvOps::prepare(const RvMatrix* parts, int64_t count) {
    auto weight = std::make_unique<RvWeight>();
    std::vector<Matrix*> found;
    for (int64_t i = 0; i < count; i++) weight->parts.push_back({parts[i], nullptr, 0});
    for (Matrix& part : weight->parts) found.push_back(&part);
    weight->packed = pack(found);
    return weight;
}

void RvOps::linear(const RvWeight& weight, const float* x, int64_t count, float* out) {
    bool quantized = false;
    int64_t rows = 0;
    for (const Matrix& part : weight.parts) {
        quantized |= !is_float(part.source.scheme);
        rows += part.source.rows;
    }
    const int64_t cols = weight.parts[0].source.cols;
    need_scratch(matmul_scratch(cols) / 4);
    const Activations in = describe(x, count, cols, quantized);
    if (in.q) each_tile(in, [](int64_t) {});
    std::vector<Product> wanted;
    for (const Matrix& part : weight.parts) {
        wanted.push_back({&part, out, rows});
        out += part.source.rows;
    }
    products(in, wanted.data(), (int)wanted.size(), {});
}

void RvOps::embed(const RvMatrix& weight, const int64_t* tokens, int64_t count, float* out) {
    each_token(count, [&](int64_t t) { kernels_.decode_row(weight, tokens[t], out + t * weight.cols); });
}

void RvOps::norm(float* total, const float* add, const float* weight, int64_t count, int64_t cols, float eps,
                 float* out) {
    each_token(count, [&](int64_t t) {
        kernels_.norm(total + t * cols, add ? add + t * cols : nullptr, weight, cols, eps, out + t * cols);
    });
}

void RvOps::rope(float* x, int64_t count, const RvShape& shape, const float* cos, const float* sin) {
    model_.head_dim = shape.head_dim;
    model_.rope_dim = shape.rope_dim;
    model_.rope_interleaved = shape.rope_interleaved;
    const int64_t width = (int64_t)shape.heads * shape.head_dim, half = shape.rope_dim / 2;
    each_token(count, [&](int64_t t) {
        kernels_.rope(x + t * width, shape.heads, model_, cos + t * half, sin + t * half);
    });
}

void RvOps::gated(const float* both, int64_t count, int64_t inner, int32_t activation, float* out) {
    each_token(count, [&](int64_t t) {
        const float* gate = both + t * 2 * inner;
        kernels_.gated(gate, gate + inner, inner, activation, out + t * inner);
    });
}

void RvOps::append(const RvSegment& to, const RvShape& shape, const int64_t* slots, int64_t count, const float* key,
                   const float* value) {
    const int64_t size = to.block_size, dim = shape.head_dim, heads = shape.kv_heads;
    const int64_t bytes = to.type == RV_KV_F32 ? 4 : 2;
    each_token(count, [&](int64_t t) {
        for (int64_t k = 0; k < heads; k++) {
            const int64_t at = ((slots[t] / size * heads + k) * size + slots[t] % size) * dim * bytes;
            kernels_.store_kv(key + (t * heads + k) * dim, dim, to.type, (uint8_t*)to.keys[0] + at);
            kernels_.store_kv(value + (t * heads + k) * dim, dim, to.type, (uint8_t*)to.values[0] + at);
        }
    });
}

void RvOps::attend(const RvBatch& batch, const RvShape& shape, const float* query, float* out) {
    model_.heads = shape.heads;
    model_.kv_heads = shape.kv_heads;
    model_.head_dim = shape.head_dim;
    model_.scale = shape.scale;
    model_.attention_softcap = shape.softcap;
    layers_[0].source.window = shape.window;
    need_scratch(attention_scratch(model_));
    attention(batch, 0, query, (int64_t)shape.heads * shape.head_dim, out);
}
