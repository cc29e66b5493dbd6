// A model that is ready to run: its description, its packed weights, its threads, and the memory that steps need.
#pragma once
#include <algorithm>
#include <memory>
#include <vector>
#include "kernels.h"
#include "memory.h"
#include "pool.h"

// Values on lines of 64 bytes, grown when asked for more and kept. Contents are not kept.
template <class T> class Buffer {
  public:
    T* room(int64_t count) {
        if ((int64_t)values_.size() < count + 64) values_.assign((size_t)count + 64, T{});
        return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(values_.data()) + 63) / 64 * 64);
    }

  private:
    std::vector<T> values_;
};

constexpr int64_t kTasksPerThread = 4;  // so that a thread whose core is taken away holds nobody up for long
constexpr int64_t kSmallTokens = 8;     // fewer are not worth waking threads for

struct RvDecoder {
    RvDecoder(const RvModel& description, const Kernels& table, int threads);

    void forward(const RvBatch& batch, float* hidden);
    void logits(const float* hidden, int64_t count, const RvAdapter* const* adapters, float* out);

  protected:
    struct Layer {
        RvLayer source;
        Matrix sites[RV_SITES];
    };
    struct Product {
        const Matrix* matrix;
        float* out;
        int64_t stride;
    };
    // What adapters add to products of one input: for each of its tokens the deltas of all sites, or null.
    struct Deltas {
        const RvLowRank* const* of;
        int64_t first;  // site of the first product, counted through all layers
    };
    std::unique_ptr<Pages> pack(const std::vector<Matrix*>& matrices);
    template <class F> void each_token(int64_t count, F&& body);
    template <class F> void each_tile(const Activations& x, F&& before);
    Activations describe(const float* x, int64_t count, int64_t cols, bool quantized);
    void find_deltas(const RvBatch& batch);
    void fetch_final(const RvBatch& batch) const;
    const float* add_final(const float* hidden, int64_t count, const RvAdapter* const* adapters);
    Ahead look_ahead(int64_t site, int64_t panels);
    Deltas deltas(int layer, int site, int64_t first = 0) const;
    void products(const Activations& x, const Product* wanted, int count, const Deltas& deltas);
    void append(const RvBatch& batch, int layer, float* qkv, int64_t width);
    void carry_out(const RvBatch& batch, int layer);
    void plan_attention(const RvBatch& batch, int layer, const float* query, int64_t stride, float* out);
    void attention(const RvBatch& batch, int layer, const float* query, int64_t stride, float* out);
    void feed_forward(const RvBatch& batch, int n, int64_t first, int64_t count);
    void layer(const RvBatch& batch, int n, const float** pending);

    RvModel model_;
    std::vector<Layer> layers_;
    Matrix head_;
    const Kernels& kernels_;
    Pool pool_;
    std::unique_ptr<Pages> packed_;
    std::vector<std::vector<float>> scratch_;  // one a thread
    int64_t embedded_ = 0;        // tokens since pages of embeddings were let go
    std::vector<int32_t> owner_;  // the sequence of each token
    std::vector<const RvLowRank*> deltas_;  // of each token, or empty: no sequence has an adapter
    std::vector<const RvLowRank*> several_;  // each adapter of a batch of few tokens once
    std::vector<Ahead::Run> runs_;
    int64_t shrunk_width_ = 0;              // products with a of a token that are in memory together
    std::vector<AttentionTask> tasks_;
    Buffer<float> residual_, x_, qkv_, mixed_, inner_, gated_, scales_, partial_, shrunk_;
    Buffer<int8_t> bytes_;
};

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

// before(t) for every token, and then the quantization of its tile.
template <class F> void RvDecoder::each_tile(const Activations& x, F&& before) {
    const int64_t tile = kernels_.tile;
    const auto one = [&](int64_t t) {
        for (int64_t i = t; i < std::min(t + tile, x.count); i++) before(i);
        if (x.q) kernels_.quantize(x, t, tile_width(x.count, t, tile));
    };
    if (x.count < kSmallTokens) {
        for (int64_t t = 0; t < x.count; t += tile) one(t);
        return;
    }
    pool_.run((x.count + tile - 1) / tile, [&](int64_t task, int) { one(task * tile); });
}
