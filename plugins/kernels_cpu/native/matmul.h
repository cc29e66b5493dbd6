// The product of a matrix of any scheme with any number of tokens.
#pragma once
#include "float.h"
#include "quantized.h"

namespace {

static void matmul(const Matrix& w, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride,
                   void* scratch) {
    if (is_float(w.source.scheme)) float_matmul(w.source, x, begin, end, out, stride, (float*)scratch);
    else quantized_matmul(w, x, begin, end, out, stride);
}

}  // namespace
