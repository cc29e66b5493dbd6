// A model that is ready to run: its description, its threads, and the memory that steps need.
#pragma once
#include <memory>
#include <vector>
#include "kernels.h"
#include "pool.h"

// Floats, grown when asked for more and kept. Contents are not kept.
class Buffer {
  public:
    float* room(int64_t count) {
        if ((int64_t)values_.size() < count) values_.assign((size_t)count, 0.0f);
        return values_.data();
    }

  private:
    std::vector<float> values_;
};

struct RvDecoder {
    RvDecoder(const RvModel& description, const Kernels& table, int threads);

    void forward(const RvBatch& batch, float* hidden);
    void logits(const float* hidden, int64_t count, float* out);

  private:
    struct Product {
        const RvMatrix* matrix;
        float* out;
        int64_t stride;
    };
    template <class F> void each_token(int64_t count, F&& body);
    Activations describe(const float* x, int64_t count, int64_t cols, bool quantized);
    void quantize_token(const Activations& x, int64_t t);
    void products(const Activations& x, const Product* wanted, int count);
    void add_deltas(const RvBatch& batch, int layer, int site, const Activations& x, float* out, int64_t stride);
    void attention(const RvBatch& batch, int layer);
    void matmul(const RvMatrix& w, const float* x, int64_t count, float* out);
    void layer(const RvBatch& batch, int n, const float** pending);

    RvModel model_;
    std::vector<RvLayer> layers_;
    const Kernels& kernels_;
    Pool pool_;
    std::vector<std::vector<float>> scratch_;  // one a thread
    Buffer residual_, x_, qkv_, mixed_, inner_, gated_, bytes_, scales_, delta_;
};
