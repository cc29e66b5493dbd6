// run_model IMAGE LEVEL THREADS LOGITS [TYPE]: a whole model, greedily, with the kernels of a level (-1: the best; -2:
// the portable table). Prints the table's name and the tokens, and writes the logits of every step. With TYPE, one of
// RvKvType, older keys and values are read from quantized storage, see Older.
//
// The image is memory: pointers are offsets into it, 0 is null. It begins with a Header.
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <vector>
#include "neon.h"
#include "stored.h"

extern "C" {
int32_t rv_open(const RvModel* model, const Kernels* kernels, int32_t threads, RvDecoder** out);
int32_t rv_forward(RvDecoder* decoder, const RvBatch* batch, float* hidden);
int32_t rv_logits(RvDecoder* decoder, const float* hidden, int64_t count, const RvAdapter* const* adapters, float* out);
void rv_close(RvDecoder* decoder);
const Kernels* rv_kernels(const char* wanted);
}

namespace {

struct Header {
    int64_t prompt_count, steps, context;
    const RvModel* model;
    const int64_t* prompt;
    const float *cos, *sin;  // [context, rope_dim / 2]
};

std::vector<char> image;

template <class T> void place(const T*& pointer) {
    if (pointer) pointer = reinterpret_cast<const T*>(image.data() + reinterpret_cast<uintptr_t>(pointer));
}

void place(RvMatrix& matrix) {
    place(matrix.data);
    place(matrix.bias);
}

Header load(const char* path) {
    FILE* file = std::fopen(path, "rb");
    if (!file || std::fseek(file, 0, SEEK_END)) std::exit(2);
    image.resize((size_t)std::ftell(file));
    std::rewind(file);
    if (std::fread(image.data(), 1, image.size(), file) != image.size()) std::exit(2);
    std::fclose(file);
    Header header = *reinterpret_cast<Header*>(image.data());
    place(header.model), place(header.prompt), place(header.cos), place(header.sin);
    RvModel& model = const_cast<RvModel&>(*header.model);
    place(model.embed), place(model.head), place(model.final_norm), place(model.layer);
    for (int32_t n = 0; n < model.layers; n++) {
        RvLayer& layer = const_cast<RvLayer&>(model.layer[n]);
        place(layer.attn_norm), place(layer.mlp_norm);
        for (RvMatrix& matrix : layer.sites) place(matrix);
    }
    return header;
}

// Keys and values in blocks whose order is turned round.
struct Cache {
    static constexpr int32_t kBlock = 8;
    std::vector<int32_t> table;
    std::vector<std::vector<float>> memory;
    std::vector<void*> keys, values;

    Cache(const RvModel& model, int64_t context) {
        const int64_t blocks = context / kBlock + 1;
        for (int64_t i = blocks; i-- > 0;) table.push_back((int32_t)i);
        memory.resize((size_t)(2 * model.layers));
        for (size_t i = 0; i < memory.size(); i++) {
            memory[i].resize((size_t)(blocks * model.kv_heads * kBlock * model.head_dim));
            (i % 2 ? values : keys).push_back(memory[i].data());
        }
    }
    RvSegment segment(const int32_t* length, const int32_t* start) const {
        return {RV_KV_F32, kBlock, (int32_t)table.size(), 0, table.data(), length, start, keys.data(), values.data(),
                nullptr};
    }
    int64_t slot(int64_t position) const { return table[(size_t)(position / kBlock)] * kBlock + position % kBlock; }
};

// Whole blocks of the tokens that are older than the latest kTail of every token, moved where none has been before. The
// memory of every layer is that of one storage.
struct Older {
    static constexpr int32_t kBlock = 16, kTail = 8;
    std::vector<int32_t> table;
    std::deque<Stored> layers;
    std::vector<void*> keys, values, means;
    std::vector<int32_t> boundary;
    std::vector<int64_t> from, to, positions;
    int32_t stored = 0;

    Older(const RvModel& model, int32_t type, int64_t context) {
        const int64_t blocks = context / kBlock + 1;
        for (int64_t i = blocks; i-- > 0;) table.push_back((int32_t)i);
        for (int32_t n = 0; n < model.layers; n++) {
            const Stored& one = layers.emplace_back(model, type, kBlock, blocks);
            keys.push_back(one.pointers[0]), values.push_back(one.pointers[1]), means.push_back(one.pointers[2]);
        }
    }
    RvSegment segment(const int32_t* start) const {
        const int32_t blocks = (int32_t)table.size();
        return {layers[0].segment.type, kBlock, blocks, blocks, table.data(), &stored, start, keys.data(), values.data(),
                means.data()};
    }
    // For a step of the tokens at these positions.
    void plan(const Cache& cache, const std::vector<int64_t>& own) {
        boundary.clear(), from.clear(), to.clear(), positions.clear();
        for (const int64_t at : own) boundary.push_back((int32_t)(std::max((int64_t)0, at - kTail) / kBlock * kBlock));
        for (; stored < boundary.back(); stored++) {
            positions.push_back(stored);
            from.push_back(cache.slot(stored));
            to.push_back(table[(size_t)(stored / kBlock)] * kBlock + stored % kBlock);
        }
    }
};

}  // namespace

int main(int count, char** arguments) {
    if (count != 5 && count != 6) return 2;
    const Header header = load(arguments[1]);
    const RvModel& model = *header.model;
    const int level = std::atoi(arguments[2]);
    const Kernels* portable = rv_kernels("generic");
    const Kernels* kernels = level == -2 ? portable : rvneon_kernels(portable, level);
    if (!kernels) return 3;
    RvDecoder* decoder = nullptr;
    if (rv_open(&model, kernels, std::atoi(arguments[3]), &decoder)) return 4;
    FILE* file = std::fopen(arguments[4], "wb");
    if (!file) return 2;

    Cache cache(model, header.context);
    std::unique_ptr<Older> older;
    if (count == 6) older = std::make_unique<Older>(model, std::atoi(arguments[5]), header.context);
    std::vector<int64_t> tokens(header.prompt, header.prompt + header.prompt_count);
    std::vector<float> hidden((size_t)model.hidden), logits((size_t)model.vocab);
    std::printf("%s", kernels->name);
    for (int64_t done = 0, step = 0; step < header.steps; step++) {
        const int64_t fed = (int64_t)tokens.size() - done, row = fed - 1;
        std::vector<int64_t> positions, slots;
        for (int64_t i = done; i < done + fed; i++) positions.push_back(i), slots.push_back(cache.slot(i));
        const int32_t cu_q[2] = {0, (int32_t)fed}, length = (int32_t)tokens.size(), start = 0;
        std::vector<RvSegment> segments = {cache.segment(&length, &start)};
        RvMove move{};
        if (older) {
            older->plan(cache, positions);
            segments.insert(segments.begin(), older->segment(&start));
            move = {segments[1], segments[0], (int64_t)older->from.size(), older->from.data(), older->to.data(),
                    older->positions.data()};
        }
        const RvBatch batch{fed, 1, 1, (int64_t)segments.size(), tokens.data() + done, positions.data(), cu_q, &row,
                            slots.data(), &header.cos, &header.sin, segments.data(), nullptr,
                            older ? older->boundary.data() : nullptr, &move, move.count ? 1 : 0};
        if (rv_forward(decoder, &batch, hidden.data()) || rv_logits(decoder, hidden.data(), 1, nullptr, logits.data())) return 4;
        if (std::fwrite(logits.data(), 4, logits.size(), file) != logits.size()) return 2;
        done += fed;
        int64_t best = 0;
        for (int64_t i = 0; i < model.vocab; i++)
            if (logits[(size_t)i] > logits[(size_t)best]) best = i;
        tokens.push_back(best);
        std::printf(" %d", (int)best);
    }
    std::printf("\n");
    rv_close(decoder);
    return std::fclose(file);
}
