// What comes back from quantized storage is within half a step of what was stored, a step following from the largest
// value of a group once the vector is turned, which is done here in double by the matrix itself. Floats come back as
// they were rounded.
#include "stored.h"

namespace {

struct Case {
    int32_t dim, kv_heads, block, rope_dim, interleaved;
    float bias;  // how large; 0: none
};

const Case kCases[] = {
    {64, 2, 32, 64, 0, 0}, {16, 1, 16, 16, 0, 5}, {24, 3, 48, 24, 0, 0},
    {80, 1, 16, 40, 1, 20}, {96, 2, 16, 96, 0, 0}, {128, 2, 64, 128, 0, 60},
};
constexpr int64_t kBlocks = 3, kSpare = 2;

std::vector<double> turned(const std::vector<double>& x) {
    const int64_t dim = (int64_t)x.size(), size = dim & -dim;
    std::vector<double> found(x.size());
    for (int64_t i = 0; i < dim; i++)
        for (int64_t j = 0; j < size; j++) {
            const double sign = __builtin_parityll((uint64_t)(i % size & j)) ? -1 : 1;
            found[(size_t)i] += sign * x[(size_t)(i / size * size + j)] / std::sqrt((double)size);
        }
    return found;
}

// One block of one head, given and found, both turned and without the bias.
void check_block(const std::vector<std::vector<double>>& given, const std::vector<std::vector<double>>& found, bool key,
                 int bits, Check& check) {
    const size_t dim = given[0].size(), group = dim % 64 ? dim : 64;
    std::vector<double> mean(dim);
    double slack = 1e-4;  // what the mean itself is off, and floats
    for (size_t k = 0; k < dim && key; k++) {
        for (const auto& row : given) mean[k] += row[k] / (double)given.size();
        slack = std::max(slack, 1e-4 + std::fabs(mean[k]) / 255);
    }
    for (size_t token = 0; token < given.size(); token++)
        for (size_t from = 0; from < dim; from += group) {
            double top = 0, squares = 0, most = 0;
            for (size_t k = from; k < from + group; k++) {
                top = std::max(top, std::fabs(given[token][k] - mean[k]) + slack);
                const double off = std::fabs(given[token][k] - found[token][k]);
                squares += off * off / (double)group;
                most = std::max(most, off);
            }
            // Of 4 bits the largest values may be cut off for the sake of the others.
            const double step = top / (bits == 8 ? 127.5 : 7.5), off = bits == 8 ? most : std::sqrt(squares);
            check.close(off, 0, 0.501 * step + 1e-4, "%d bits of %d, token %d", bits, (int)dim, (int)token);
        }
}

void check_coded(const Case& c, int32_t type, const Tables& tables, Random& random, Check& check) {
    RvModel model{};
    model.kv_heads = c.kv_heads;
    model.heads = c.kv_heads;
    model.head_dim = c.dim;
    model.rope_dim = c.rope_dim;
    model.rope_interleaved = c.interleaved;
    const int64_t count = kBlocks * c.block, size = c.block;
    const Turns turns(model, count, c.bias, random);
    Stored source(model, RV_KV_F32, c.block + 3, kBlocks), coded(model, type, c.block, kBlocks + kSpare);
    Stored back(model, RV_KV_F32, 5, count);
    std::vector<std::vector<double>> given;  // [2, count, kv_heads], without the bias
    const std::vector<int64_t> from_slots = shuffled(count, random), positions = shuffled(count, random);
    for (const bool key : {true, false})
        for (int64_t i = 0; i < count; i++)
            for (int64_t head = 0; head < c.kv_heads; head++) {
                float* to = (float*)source.at(key, from_slots[(size_t)i], head);
                for (int64_t k = 0; k < c.dim; k++) to[k] = (k % 7 ? 1.0f : 9.0f) * random.normal() + 2.0f;
                const std::vector<double> bias = turns.at(model, head, positions[(size_t)i]);
                for (int64_t k = 0; k < c.dim && key; k++) to[k] += (float)bias[(size_t)k];
                given.emplace_back(to, to + c.dim);
                for (size_t k = 0; k < bias.size() && key; k++) given.back()[k] -= bias[k];
            }
    const std::vector<int64_t> blocks = shuffled(kBlocks + kSpare, random), some = shuffled(count, random);
    std::vector<int64_t> slots, out_of, into, at;
    for (int64_t i = 0; i < count; i++) slots.push_back(blocks[(size_t)(i / size)] * size + i % size);
    for (const int64_t i : some) out_of.push_back(slots[(size_t)i]), at.push_back(positions[(size_t)i]);
    for (int64_t i = 0; i < count; i++) into.push_back(4 * count - 3 * i);
    const Turns* used = c.bias > 0 ? &turns : nullptr;
    move_tokens(*tables.table, source, coded, from_slots, slots, positions, used);
    move_tokens(*tables.table, coded, back, out_of, into, at, used);
    std::vector<int64_t> where((size_t)count);
    for (size_t i = 0; i < some.size(); i++) where[(size_t)some[i]] = into[i];
    for (int side = 0; side < 2; side++)
        for (int64_t head = 0; head < c.kv_heads; head++)
            for (int64_t block = 0; block < kBlocks; block++) {
                std::vector<std::vector<double>> stored, found;
                for (int64_t i = block * size; i < (block + 1) * size; i++) {
                    const float* row = (const float*)back.at(!side, where[(size_t)i], head);
                    std::vector<double> one(row, row + c.dim);
                    const std::vector<double> bias = turns.at(model, head, positions[(size_t)i]);
                    for (size_t k = 0; k < bias.size() && !side; k++) one[k] -= bias[k];
                    found.push_back(turned(one));
                    stored.push_back(turned(given[(size_t)((side * count + i) * c.kv_heads + head)]));
                }
                check_block(stored, found, !side, type == RV_KV_Q8 ? 8 : 4, check);
            }
}

void check_floats(int32_t first, int32_t second, const Tables& tables, Random& random, Check& check) {
    RvModel model{};
    model.kv_heads = model.heads = 2;
    model.head_dim = 12;
    constexpr int64_t count = 40;
    Stored source(model, first, 16, 3), target(model, second, 9, 5);
    const std::vector<int64_t> from = shuffled(count, random), to = shuffled(count, random);
    for (const bool key : {true, false})
        for (int64_t slot = 0; slot < count; slot++)
            for (int64_t head = 0; head < 2; head++)
                tables.base->store_kv(random.normals(12).data(), 12, first, source.at(key, slot, head));
    move_tokens(*tables.table, source, target, from, to, from, nullptr);
    const auto scheme = [](int32_t type) { return type == RV_KV_F32 ? RV_F32 : type == RV_KV_F16 ? RV_F16 : RV_BF16; };
    for (const bool key : {true, false})
        for (size_t i = 0; i < count; i++)
            for (int64_t head = 0; head < 2; head++) {
                float row[12];
                uint8_t want[48];
                tables.base->decode_row({source.at(key, from[i], head), nullptr, 1, 12, 0, scheme(first), 0}, 0, row);
                tables.base->store_kv(row, 12, second, want);
                check.that(!memcmp(want, target.at(key, to[i], head), second == RV_KV_F32 ? 48 : 24),
                           "floats of type %d moved into %d", first, second);
            }
}

}  // namespace

void check_moves(const Tables& tables, Check& check) {
    Random random;
    for (const int32_t first : {RV_KV_F32, RV_KV_F16, RV_KV_BF16})
        for (const int32_t second : {RV_KV_F32, RV_KV_F16, RV_KV_BF16})
            check_floats(first, second, tables, random, check);
    check.report(tables.table->name, "moves");
    for (const int32_t type : {RV_KV_Q8, RV_KV_Q4}) {
        for (const Case& c : kCases) check_coded(c, type, tables, random, check);
        check.report(tables.table->name, type == RV_KV_Q8 ? "moves-q8" : "moves-q4");
    }
}
