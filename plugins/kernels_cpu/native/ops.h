// Single operations over the loops of RvDecoder.
#pragma once
#include <memory>
#include <vector>
#include "decoder.h"

// Matrices of equal width, stacked by rows.
struct RvWeight {
    std::vector<Matrix> parts;
    std::unique_ptr<Pages> packed;
};

struct RvOps : RvDecoder {
    RvOps(const Kernels& table, int threads, int32_t activation_bits);

    std::unique_ptr<RvWeight> prepare(const RvMatrix* parts, int64_t count);
    void linear(const RvWeight& weight, const float* x, int64_t count, float* out);
    void embed(const RvMatrix& weight, const int64_t* tokens, int64_t count, float* out);
    void norm(float* total, const float* add, const float* weight, int64_t count, int64_t cols, float eps, float* out);
    void rope(float* x, int64_t count, const RvShape& shape, const float* cos, const float* sin);
    void gated(const float* both, int64_t count, int64_t inner, int32_t activation, float* out);
    void append(const RvSegment& to, const RvShape& shape, const int64_t* slots, int64_t count, const float* key,
                const float* value);
    void attend(const RvBatch& batch, const RvShape& shape, const float* query, float* out);

  private:
    void need_scratch(int64_t floats);
};
