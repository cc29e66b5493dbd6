// The product of a matrix of any scheme with any number of tokens.
#pragma once
#include "float.h"
#include "low_rank.h"
#include "quantized.h"

namespace {

static void matmul(const Matrix& w, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride,
                   const Added* added, void* scratch) {
    if (!is_float(w.source.scheme)) return quantized_matmul(w, x, begin, end, out, stride, added);
    float_matmul(w.source, x, begin, end, out, stride, (float*)scratch);
    for (int64_t t = 0; added && t < x.count; t++) add_rows(*added, t, begin, end, out + t * stride);
}

}  // namespace
