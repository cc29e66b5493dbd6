// A model that is ready to run: its description, its packed weights, its threads, and the memory that steps need.
#pragma once
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

struct RvDecoder {
    RvDecoder(const RvModel& description, const Kernels& table, int threads);

    void forward(const RvBatch& batch, float* hidden);
    void logits(const float* hidden, int64_t count, float* out);

  private:
    struct Layer {
        RvLayer source;
        Matrix sites[RV_SITES];
    };
    struct Product {
        const Matrix* matrix;
        float* out;
        int64_t stride;
    };
    void pack();
    template <class F> void each_token(int64_t count, F&& body);
    template <class F> void each_tile(const Activations& x, F&& before);
    Activations describe(const float* x, int64_t count, int64_t cols, bool quantized);
    void products(const Activations& x, const Product* wanted, int count);
    void add_deltas(const RvBatch& batch, int layer, int site, const Activations& x, float* out, int64_t stride);
    void append(const RvBatch& batch, int layer, float* qkv, int64_t width);
    void plan_attention(const RvBatch& batch, int layer, const float* query, int64_t stride, float* out);
    void attention(const RvBatch& batch, int layer, const float* query, int64_t stride, float* out);
    void layer(const RvBatch& batch, int n, const float** pending);

    RvModel model_;
    std::vector<Layer> layers_;
    Matrix head_;
    const Kernels& kernels_;
    Pool pool_;
    std::unique_ptr<Pages> packed_;
    std::vector<std::vector<float>> scratch_;  // one a thread
    std::vector<AttentionTask> tasks_;
    Buffer<float> residual_, x_, qkv_, mixed_, inner_, gated_, scales_, delta_, partial_;
    Buffer<int8_t> bytes_;
};
