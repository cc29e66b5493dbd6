// The rotation of quantized keys and values: Hadamard matrices as large a power of two as divides the length.
#pragma once
#include "lanes.h"

namespace {

// Every step adds and subtracts the halves and weaves the results, which moves each bit of the index up by one: after as
// many steps as there are bits, all are where they were.
template <int COUNT> static inline void hadamard_registers(float* x, float norm) {
    V a[COUNT], b[COUNT];
    for (int i = 0; i < COUNT; i++) a[i] = load(x + i * kLanes) * norm;
#pragma GCC unroll 1
    for (int step = 1; step < COUNT * kLanes; step *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < COUNT / 2; i++) {
            const V sum = a[i] + a[i + COUNT / 2], difference = a[i] - a[i + COUNT / 2];
            b[2 * i] = weave_low(sum, difference);
            b[2 * i + 1] = weave_high(sum, difference);
        }
#pragma GCC unroll 16
        for (int i = 0; i < COUNT; i++) a[i] = b[i];
    }
    for (int i = 0; i < COUNT; i++) store(x + i * kLanes, a[i]);
}

// In place; the matrix is symmetric and orthogonal, so this is also the way back.
static void hadamard(float* x, int64_t dim) {
    const int64_t size = dim & -dim;
    const float norm = 1.0f / __builtin_sqrtf((float)size);
    for (int64_t from = 0; from < dim; from += size, x += size) {
        if (size == 2 * kLanes) hadamard_registers<2>(x, norm);
        else if (size == 4 * kLanes) hadamard_registers<4>(x, norm);
        else if (size == 8 * kLanes) hadamard_registers<8>(x, norm);
        else if (size == 16 * kLanes) hadamard_registers<16>(x, norm);
        else {
            for (int64_t i = 0; i < size; i++) x[i] *= norm;
            for (int64_t apart = 1; apart < size; apart *= 2)
                for (int64_t i = 0; i < size; i += 2 * apart)
                    for (int64_t j = i; j < i + apart; j++) {
                        const float a = x[j], b = x[j + apart];
                        x[j] = a + b;
                        x[j + apart] = a - b;
                    }
        }
    }
}

}  // namespace
