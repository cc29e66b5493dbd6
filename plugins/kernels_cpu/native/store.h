// Quantized keys and values as they lie in memory. What the numbers mean is in ruvllm_core/decode/coded.py.
//
// D = head_dim; G values share a scale (64 of them if 64 divides D, else all); S tokens of a block, a multiple of 16.
// A layer has three arrays: keys and values [kv_heads][blocks][S * (D * bits / 8 + 2 * D / G)] bytes, which begin on
// lines of 64 bytes, and means [kv_heads][blocks][D + 2]. A block of one head is its codes and then its scales; that a
// head's blocks follow each other makes one stream of them where a sequence's blocks do.
//
// A value is scale * (code - middle), the middle 7.5 or 127.5, after the head's vector was turned (hadamard.h).
// Four codes that are multiplied together stand in one word of 32 bits; of 4 bits, a word has two such quads, the first
// in the low halves of its bytes and the second in the high ones.
//   codes of keys: for 16 tokens after the other (a panel) words [D / 4][16 tokens], a quad being four values of a token:
//     8 bits: quad i is values 4i ... 4i + 3; 4 bits: word i has quads 2i and 2i + 1, [D / 8][16 tokens]
//   codes of values: words [S / 4][D], a quad being one value of four tokens:
//     8 bits: quad i is tokens 4i ... 4i + 3; 4 bits: word i has quads 2i and 2i + 1, [S / 8][D]
//   scales of both: f16 [S / 16][D / G][16 tokens]
//   means: of the block's keys after they were turned, D codes of 8 bits and an f16 scale.
// So both kinds of codes take 16 * D * bits / 8 bytes for 16 tokens, and a register is as many lanes of words: of tokens
// for keys, of values for values.
#pragma once
#include <cstdint>
#include "abi.h"

constexpr int64_t kPanelTokens = 16;

inline bool is_coded(int32_t type) { return type == RV_KV_Q8 || type == RV_KV_Q4; }

struct StoreLayout {
    StoreLayout(const RvModel& model, const RvSegment& segment)
        : dim(model.head_dim), group(dim % 64 ? dim : 64), groups(dim / group), size(segment.block_size),
          blocks(segment.num_blocks), row(dim * (segment.type == RV_KV_Q4 ? 4 : 8) / 8),
          block_bytes(size * (row + 2 * groups)) {}

    int64_t dim, group, groups, size, blocks;
    int64_t row;          // bytes of codes for each token
    int64_t block_bytes;  // of one head

    // Bytes before the codes, the scales and the mean of tokens from `offset` on of a block, a multiple of 16.
    int64_t codes(int64_t block, int64_t head, int64_t offset) const {
        return (head * blocks + block) * block_bytes + offset * row;
    }
    int64_t scales(int64_t block, int64_t head, int64_t offset) const {
        return (head * blocks + block) * block_bytes + size * row + offset * 2 * groups;
    }
    int64_t mean(int64_t block, int64_t head) const { return (head * blocks + block) * (dim + 2); }
};
