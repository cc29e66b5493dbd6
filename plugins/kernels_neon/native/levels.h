// Levels of the architecture: what a processor may have beyond armv8-a, and what differs with it.
#pragma once
#include "kernels.h"

enum : int32_t { kPlainLevel, kDotprodLevel, kI8mmLevel, kLevels };

constexpr int64_t kTokens = 4;  // of a tile, at every level

// The first two belong together: they share a layout of the bytes.
struct Level {
    void (*quantize)(const Activations& to, int64_t t, int64_t width);
    void (*matmul)(const Matrix& w, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride,
                   void* scratch);
    void (*attend)(const AttentionTask& task);
};

extern const Level kPlain, kDotprod, kI8mm;

// Attention, in files of their own.
void attend_plain(const AttentionTask& task);
void attend_dotprod(const AttentionTask& task);
void attend_i8mm(const AttentionTask& task);

// The highest level that this processor has; each includes those below it.
int32_t best_level();
