// The extern "C" interface that Python loads with ctypes. Field order and types are mirrored in abi.py.
#pragma once
#include <cstdint>

#define RV_ABI_VERSION 6
#define RV_API extern "C" __attribute__((visibility("default")))

extern "C" {

// GGML type numbers, the ones that GGUF files use.
enum RvScheme : int32_t {
    RV_F32 = 0, RV_F16 = 1, RV_Q4_0 = 2, RV_Q4_1 = 3, RV_Q5_0 = 6, RV_Q5_1 = 7, RV_Q8_0 = 8,
    RV_Q2_K = 10, RV_Q3_K = 11, RV_Q4_K = 12, RV_Q5_K = 13, RV_Q6_K = 14, RV_BF16 = 30,
};

// How keys and values are stored: floats, or as store.h says.
enum RvKvType : int32_t { RV_KV_F32 = 0, RV_KV_F16 = 1, RV_KV_BF16 = 2, RV_KV_Q8 = 3, RV_KV_Q4 = 4 };

enum RvActivation : int32_t { RV_SILU = 0, RV_GELU_TANH = 1, RV_GELU = 2 };

// Rows of encoded blocks, one after the other; bias is [rows] or null. mapped: data lies in a read-only mapping of a file,
// whose pages may be let go.
struct RvMatrix {
    const uint8_t* data;
    const float* bias;
    int64_t rows, cols, row_bytes;
    int32_t scheme, mapped;
};

// The order of the matrices is that of RvSite.
enum RvSite : int32_t { RV_Q, RV_K, RV_V, RV_O, RV_GATE, RV_UP, RV_DOWN, RV_SITES };

struct RvLayer {
    const float* attn_norm;
    const float* mlp_norm;
    RvMatrix sites[RV_SITES];
    int64_t window;  // 0: none
};

struct RvModel {
    int32_t vocab, hidden, inner, layers, heads, kv_heads, head_dim, rope_dim;
    int32_t rope_interleaved, activation;
    float eps, scale, attention_softcap, logit_softcap;  // a cap of 0 is none
    int32_t activation_bits;  // 16 or 8: of what quantized weights are multiplied with
    int32_t center_keys;      // quantized keys are stored less their bias as it stands at their position
    RvMatrix embed, head;
    const float* final_norm;
    const RvLayer* layer;
};

struct RvSegment {
    int32_t type, block_size, table_stride, num_blocks;  // type: RvKvType
    const int32_t* table;    // [B, table_stride]
    const int32_t* lengths;  // [B]
    const int32_t* starts;   // [B]
    void* const* keys;       // [layers], each [N, K, S, D], or of quantized types as store.h says
    void* const* values;
    void* const* means;      // of quantized types only
};

// Tokens that are copied in every layer, once new ones are written and before attention reads any; of the segments only
// the storages count. Slots as in RvBatch; to_slots of a quantized target are whole blocks in order.
struct RvMove {
    RvSegment source, target;
    int64_t count;
    const int64_t* from_slots;  // [count]
    const int64_t* to_slots;    // [count], none of them among from_slots
    const int64_t* positions;   // [count]
};

// What one adapter adds at one matrix: scale * b (a x). Rank 0: nothing. a is [rank, in]; for q, k and v, whose input is
// the same, the rows of a stand one after the other, and so they do for gate and up. b is turned to panels of sixteen
// rows, [rows / 16][rank][16], the last filled up with zeros; in memory they follow the rows of a that stand together.
struct RvLowRank {
    const float* a;
    const float* b;
    float scale;
    int32_t rank;
};

// widest: the most rows of a that stand together in the layers; 0: it does nothing there.
struct RvAdapter {
    const RvLowRank* sites;  // [layers][RV_SITES], and then the final site, between the last norm and the output matrix
    int64_t widest;
};

struct RvBatch {
    int64_t tokens_count, sequences, rows_count, segments_count;
    const int64_t* tokens;     // [T]
    const int64_t* positions;  // [T]
    const int32_t* cu_q;       // [B + 1]
    const int64_t* rows;       // [R]
    const int64_t* slots;      // [T], in the last segment
    const float* const* cos;   // [B], each [positions, rope_dim / 2]
    const float* const* sin;
    const RvSegment* segments;
    const RvAdapter* const* adapters;  // null, or [B], each may be null
    const int32_t* boundary;   // null, or [T]: a token reads the last segment from this position on, others before it
    const RvMove* moves;       // in order
    int64_t moves_count;
};

// Of one operation; each uses the fields it needs. Segments given to operations have the pointers of one layer only.
struct RvShape {
    int32_t heads, kv_heads, head_dim, rope_dim, rope_interleaved, unused;
    int64_t window;        // 0: none
    float scale, softcap;  // a cap of 0 is none
};

struct RvDecoder;
struct RvOps;
struct RvWeight;
}
