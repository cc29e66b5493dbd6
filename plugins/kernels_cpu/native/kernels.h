// The table of micro-kernels that each instruction set fills in, and the arrays they work on.
#pragma once
#include <cstdint>
#include "abi.h"

// Activations of T tokens, [T, cols], as floats and, for quantized weights, as int8 in blocks of 32:
// x = d * q, and sums are d * (sum of q), for the minima and offsets of the weights.
struct Activations {
    const float* x = nullptr;
    int64_t count = 0, cols = 0;
    int8_t* q = nullptr;     // [T, cols]
    float* d = nullptr;      // [T, cols / 32]
    float* s32 = nullptr;    // [T, cols / 32]
    float* s16 = nullptr;    // [T, cols / 16]
};

// One sequence's queries for one key/value head, tokens [begin, end) of the batch.
struct AttentionTask {
    const RvModel* model;
    const RvBatch* batch;
    int32_t layer, sequence, kv_head;
    int64_t begin, end, window;
    const float* query;  // [T, stride], this batch's
    int64_t stride;
    float* out;          // [T, heads * head_dim]
    float* scratch;      // attention_scratch(...) floats
};

struct Kernels {
    const char* name;
    // total (in place) += add (may be null); out = rms norm of total
    void (*norm)(float* total, const float* add, const float* weight, int64_t n, float eps, float* out);
    void (*quantize)(const float* x, int64_t n, int8_t* q, float* d, float* s32, float* s16);
    // out[t * stride + r] for rows [begin, end); scratch holds a panel
    void (*matmul)(const RvMatrix& w, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride,
                   void* scratch);
    void (*decode_row)(const RvMatrix& w, int64_t row, float* out, void* scratch);
    void (*rope)(float* x, int64_t heads, const RvModel& model, const float* cos, const float* sin);
    void (*to_half)(const float* x, int64_t n, uint16_t* out);
    void (*gated)(const float* gate, const float* up, int64_t n, int32_t activation, float* out);
    void (*attend)(const AttentionTask& task);
    void (*softcap)(float* x, int64_t n, float cap);
};

constexpr int64_t kPanelRows = 16;   // rows of a matrix that are unpacked together
constexpr int64_t kQueryTile = 32;   // tokens whose queries walk the keys together
constexpr int64_t kKeyTile = 64;
constexpr int64_t kHeadStep = 32;   // heads are padded to a multiple of it: two of the widest registers

inline bool is_float(int32_t scheme) { return scheme == RV_F32 || scheme == RV_F16 || scheme == RV_BF16; }

// Bytes of scratch for matrices of up to `cols` columns: a float panel is the largest.
inline int64_t matmul_scratch(int64_t cols) { return cols * kPanelRows * 4 + cols * 12 + 4096; }

inline int64_t attention_scratch(const RvModel& m) {
    const int64_t dim = (m.head_dim + kHeadStep - 1) / kHeadStep * kHeadStep;
    const int64_t rows = kQueryTile * (m.heads / m.kv_heads) + 4;
    return 2 * kKeyTile * dim + rows * (2 * dim + kKeyTile + 2) + 64;
}

extern const Kernels kGeneric;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// By name ("auto", "generic", "avx2", "avx512"); null if this processor has not got it.
const Kernels* find_kernels(const char* name);
