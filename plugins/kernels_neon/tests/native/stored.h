// Storage of keys and values of any type, one layer of it, and moves from one to another.
#pragma once
#include <algorithm>
#include "check.h"

struct alignas(64) Line {
    uint8_t bytes[64];
};

// The numbers below n in any order.
inline std::vector<int64_t> shuffled(int64_t n, Random& random) {
    std::vector<int64_t> found((size_t)n);
    for (int64_t i = 0; i < n; i++) found[(size_t)i] = i;
    for (int64_t i = n - 1; i > 0; i--) std::swap(found[(size_t)i], found[(size_t)random.below(i + 1)]);
    return found;
}

// Every byte is 0xff until something is written: as floats, not a number.
struct Stored {
    const RvModel& model;
    RvSegment segment{};
    std::vector<Line> sides[3];  // keys, values, means
    void* pointers[3];

    Stored(const RvModel& of, int32_t type, int32_t block_size, int64_t blocks) : model(of) {
        segment.type = type;
        segment.block_size = block_size;
        segment.num_blocks = (int32_t)blocks;
        const StoreLayout layout(model, segment);
        const int64_t one = is_coded(type) ? layout.block_bytes : block_size * layout.dim * (type == RV_KV_F32 ? 4 : 2);
        for (int side = 0; side < 3; side++) {
            const int64_t bytes = blocks * model.kv_heads * (side < 2 ? one : layout.dim + 2);
            sides[side].resize((size_t)(bytes / 64 + 1));
            memset((void*)sides[side].data(), 0xff, sides[side].size() * 64);
            pointers[side] = sides[side].data();
        }
        segment.keys = &pointers[0];
        segment.values = &pointers[1];
        segment.means = is_coded(type) ? &pointers[2] : nullptr;
    }
    Stored(const Stored&) = delete;

    // The key or value of one head in storage of floats.
    uint8_t* at(bool key, int64_t slot, int64_t head) {
        const int64_t size = segment.block_size, width = segment.type == RV_KV_F32 ? 4 : 2;
        const int64_t row = (slot / size * model.kv_heads + head) * size + slot % size;
        return (uint8_t*)pointers[key ? 0 : 1] + row * model.head_dim * width;
    }
};

// Cosines and sines of any angles, and a key bias; [positions, rope_dim / 2] and [kv_heads, head_dim].
struct Turns {
    std::vector<float> cos, sin, bias;

    Turns(const RvModel& model, int64_t positions, float size, Random& random)
        : bias(random.normals(model.kv_heads * model.head_dim)) {
        for (float& one : bias) one *= size;
        for (int64_t i = 0; i < positions * (model.rope_dim / 2); i++) {
            const double angle = 6.28 * random.uniform();
            cos.push_back((float)std::cos(angle)), sin.push_back((float)std::sin(angle));
        }
    }
    // The bias of a head as it stands at a position.
    std::vector<double> at(const RvModel& model, int64_t head, int64_t position) const {
        const int64_t half = model.rope_dim / 2, dim = model.head_dim;
        std::vector<double> found(bias.begin() + head * dim, bias.begin() + (head + 1) * dim);
        for (int64_t i = 0; i < half; i++) {
            double& first = found[(size_t)(model.rope_interleaved ? 2 * i : i)];
            double& second = found[(size_t)(model.rope_interleaved ? 2 * i + 1 : i + half)];
            const double a = first, b = second, c = cos[(size_t)(position * half + i)];
            const double s = sin[(size_t)(position * half + i)];
            first = a * c - b * s;
            second = b * c + a * s;
        }
        return found;
    }
};

// As the decoder does it: every head, a block of a quantized target or a few tokens at a time.
inline void move_tokens(const Kernels& table, const Stored& from, const Stored& to,
                        const std::vector<int64_t>& from_slots, const std::vector<int64_t>& to_slots,
                        const std::vector<int64_t>& positions, const Turns* turns) {
    const RvModel& model = from.model;
    const int64_t count = (int64_t)from_slots.size(), step = is_coded(to.segment.type) ? to.segment.block_size : 7;
    const RvMove move{from.segment, to.segment, count, from_slots.data(), to_slots.data(), positions.data()};
    std::vector<float> scratch((size_t)attention_scratch(model), NAN);
    const float *cos = turns ? turns->cos.data() : nullptr, *sin = turns ? turns->sin.data() : nullptr;
    for (int32_t head = 0; head < model.kv_heads; head++)
        for (int64_t begin = 0; begin < count; begin += step)
            table.move({&model, &move, 0, head, begin, std::min(begin + step, count),
                        turns ? turns->bias.data() + head * model.head_dim : nullptr, cos, sin, scratch.data()});
}
