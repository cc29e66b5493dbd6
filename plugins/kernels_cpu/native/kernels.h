// The table of micro-kernels that each instruction set fills in, and the arrays they work on.
#pragma once
#include <cstdint>
#include "abi.h"
#include "store.h"

constexpr int64_t kPanelRows = 16;  // rows of a matrix that a kernel takes together
constexpr int64_t kQueryTile = 64;  // tokens whose queries walk the keys together
constexpr int64_t kKeyTile = 64;
constexpr int64_t kFewRows = 8;     // up to so many are scored key by key, from where keys are stored
constexpr int64_t kHeadStep = 32;   // heads are padded to a multiple of it: two of the widest registers
constexpr int64_t kMaxTile = 16;    // the widest tile of tokens of any table
constexpr int64_t kCodeStride = 128;  // bytes between rows of queries for quantized keys: no group is larger

// A matrix of the model; of a quantized one also its panels (packed.h), else null.
struct Matrix {
    RvMatrix source;
    const uint8_t* panels;
    int64_t panel_bytes;
};

// Activations of T tokens, [T, cols], as floats and, for quantized weights, as one or two bytes with a scale for each 32
// columns: x = d * (256 * q + r), or without r x = d * 256 * q. Tokens stand in tiles (see tile_width): the arrays of a
// tile that begins with token t begin at t * (their size for one token), and within them the tokens are innermost.
struct Activations {
    const float* x = nullptr;
    int64_t count = 0, cols = 0;
    int8_t* q = nullptr;     // tiles of [cols / 4][width][4]
    int8_t* r = nullptr;     // the same, or null
    float* d = nullptr;      // tiles of [cols / 32][width]
    float* s32 = nullptr;    // tiles of [cols / 32][width]: sums of the values
    float* s16 = nullptr;    // tiles of [cols / 16][width]
};

// How many tokens wide the tile is that begins with token t: all but the last are `tile`; the last is the next power of
// two, or three times one if `tile` is, and at most `tile`, its missing tokens zero.
inline int64_t tile_width(int64_t count, int64_t t, int64_t tile) {
    const int64_t left = count - t;
    if (left >= tile) return tile;
    int64_t width = 1;
    while (width < left) {
        if (tile % 3 == 0 && width > 1 && width / 2 * 3 >= left) return width / 2 * 3;
        width *= 2;
    }
    return width < tile ? width : tile;
}

// What a thread asks memory for while it computes, `lines` of 64 bytes with every panel: the runs from `at` to `last`.
struct Ahead {
    struct Run { const char *begin, *end; };
    Run *at, *last;
    int64_t lines;
};

// What adapters add to one product, token by token.
struct Added {
    const RvLowRank* const* of;  // [T]: of each token what an adapter has for all sites of all layers, or null
    int64_t first;               // the first of those that read this input
    int site;                    // which of them the product is of
    const float* c;              // [T, width]: shrink, for each token
    int64_t width;
    bool far;      // b is not near: it is asked for before a panel is computed
    Ahead* ahead;  // or null
};

// One sequence's queries for one key/value head, tokens [begin, end) of the batch, and keys at positions [low, high).
struct AttentionTask {
    const RvModel* model;
    const RvBatch* batch;
    int32_t layer, sequence, kv_head;
    int64_t begin, end, low, high, window;
    const float* query;  // [T, stride], this batch's
    int64_t stride;
    float* out;          // [T, heads * head_dim]
    // Instead of out, if not null: [tokens * group][head_dim + 2], for each row its sum of values before it is divided,
    // then the highest score and the sum of the weights.
    float* partial;
    float* scratch;      // attention_scratch(...) floats
};

// Tokens [begin, end) of a move, whole blocks of a quantized target, for one layer and key/value head.
struct MoveTask {
    const RvModel* model;
    const RvMove* move;
    int32_t layer, kv_head;
    int64_t begin, end;
    const float* bias;  // of this head's keys, [head_dim]; null: there is none, or quantized keys keep it
    const float *cos, *sin;
    float* scratch;  // attention_scratch(...) floats
};

struct Kernels {
    const char* name;
    int64_t tile;  // tokens that a kernel takes together
    // total (in place) += add (may be null); out = rms norm of total
    void (*norm)(float* total, const float* add, const float* weight, int64_t n, float eps, float* out);
    // x: the tokens of the tile that begins with token t of `to`, at their places in it
    void (*quantize)(const Activations& to, int64_t t, int64_t width);
    // panels [begin, end) of the packed weights, from rows of source blocks
    void (*pack)(const RvMatrix& w, int64_t begin, int64_t end, uint8_t* panels);
    // out[t * stride + r] for rows [begin, end), begin a multiple of kPanelRows, with what is added (may be null);
    // scratch: matmul_scratch(cols) bytes
    void (*matmul)(const Matrix& w, const Activations& x, int64_t begin, int64_t end, float* out, int64_t stride,
                   const Added* added, void* scratch);
    void (*decode_row)(const RvMatrix& w, int64_t row, float* out);
    void (*rope)(float* x, int64_t heads, const RvModel& model, const float* cos, const float* sin);
    void (*store_kv)(const float* x, int64_t n, int32_t type, void* out);
    void (*gated)(const float* gate, const float* up, int64_t n, int32_t activation, float* out);
    void (*attend)(const AttentionTask& task);
    void (*move)(const MoveTask& task);
    void (*softcap)(float* x, int64_t n, float cap);
    // c = scale * (a x) for one token x [cols] and `count` sites that read it, one after the other
    void (*shrink)(const RvLowRank* sites, int count, const float* x, int64_t cols, float* c);
    // out[r] += what is added to rows [begin, end) of token t, begin a multiple of kPanelRows
    void (*add)(const Added& added, int64_t t, int64_t begin, int64_t end, float* out);
};

inline bool is_float(int32_t scheme) { return scheme == RV_F32 || scheme == RV_F16 || scheme == RV_BF16; }

// Bytes of scratch for matrices of up to `cols` columns: a float panel.
inline int64_t matmul_scratch(int64_t cols) { return cols * kPanelRows * 4 + 4096; }

// Floats of scratch for a tile of keys and of values, and for each row its query, its values, its scores and numbers, and
// what quantized segments need (Coded in coded.h).
inline int64_t attention_scratch(const RvModel& m) {
    const int64_t dim = (m.head_dim + kHeadStep - 1) / kHeadStep * kHeadStep;
    const int64_t rows = kQueryTile * (m.heads / m.kv_heads) + 16, groups = m.head_dim % 64 ? 1 : m.head_dim / 64;
    return 2 * kKeyTile * dim + rows * (4 * dim + kKeyTile + 8 + groups * (2 + kCodeStride / 2)) + 1024;
}

extern const Kernels kGeneric;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

// By name ("auto", "generic", "avx2", "avx512"); null if this processor has not got it.
const Kernels* find_kernels(const char* name);
