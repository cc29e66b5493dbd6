// check_kernels               every kernel of every level that this processor has, against double; lists what it found
// check_kernels force LEVEL   one product with the instructions of a level, had or not
// check_kernels force LEVEL attention   the checks of its attention, likewise
// check_kernels layout        size of RvNeonAttention and where its fields are
// check_kernels attention IN OUT   rvneon_attention of a file: the structure with zeros for pointers, query, key, value
#include <cstddef>
#include <cstdlib>
#include "activations.h"
#include "levels.h"
#include "neon.h"

extern const Kernels kGeneric;

static int check_all() {
    Check check;
    const int32_t best = rvneon_level();
    for (int32_t level = 0; level < kLevels; level++) {
        const Kernels* table = rvneon_kernels(&kGeneric, level);
        check.that((table != nullptr) == (level <= best), "level %d offered on a processor with %d", level, best);
        if (!table) continue;
        const Tables tables{table, &kGeneric, level == kI8mmLevel ? 8 : 4};
        check_quantize(tables, check);
        check.report(table->name, "quantize");
        check_products(tables, check);
        check_attention(tables, check);
        if (level) continue;  // the others share the rest
        check_elementwise(tables, check);
        check_moves(tables, check);
    }
    check.that(rvneon_kernels(&kGeneric, -1) == rvneon_kernels(&kGeneric, best), "the best level is not the default");
    std::printf("detected %s\n", rvneon_kernels(&kGeneric, -1)->name);
    std::printf("%d failures\n", check.failures);
    return check.failures != 0;
}

static int force(int level, bool attention) {
    const Level* levels[] = {&kPlain, &kDotprod, &kI8mm};
    Kernels table = kGeneric;
    if (attention) {
        Check check;
        table.attend = levels[level]->attend;
        check_attention({&table, &kGeneric, 4}, check);
        return check.failures != 0;
    }
    table.tile = kTokens;
    table.quantize = levels[level]->quantize;
    Random random;
    const std::vector<uint8_t> weights(34 * 16, 1);
    std::vector<uint8_t> panels(4096);
    Matrix w{{weights.data(), nullptr, 16, 32, 34, RV_Q8_0, 0}, panels.data(), 576};
    table.pack(w.source, 0, 1, panels.data());
    const Quantized x({&table, &kGeneric, 4}, random.normals(32), 1, 32);
    std::vector<float> scratch((size_t)matmul_scratch(32) / 4);
    float out[16];
    levels[level]->matmul(w, x.view, 0, 16, out, 16, scratch.data());
    std::printf("ran, %g\n", out[0]);
    return 0;
}

static int attention(const char* in, const char* out) {
    RvNeonAttention call{};
    FILE* file = std::fopen(in, "rb");
    if (!file || std::fread(&call, sizeof call, 1, file) != 1) return 2;
    const auto read = [&](int64_t count) {
        std::vector<float> values((size_t)count);
        if (std::fread(values.data(), 4, values.size(), file) != values.size()) std::exit(2);
        return values;
    };
    const auto query = read(call.tokens * call.heads * call.head_dim);
    const auto key = read(call.keys * call.kv_heads * call.head_dim);
    const auto value = read(call.keys * call.kv_heads * call.head_dim);
    std::fclose(file);
    std::vector<float> found(query.size());
    call.query = query.data();
    call.key = key.data();
    call.value = value.data();
    call.out = found.data();
    if (rvneon_attention(&call)) return 1;
    file = std::fopen(out, "wb");
    if (!file || std::fwrite(found.data(), 4, found.size(), file) != found.size()) return 2;
    return std::fclose(file);
}

int main(int count, char** arguments) {
    const std::string command = count > 1 ? arguments[1] : "";
    if (command == "force" && count >= 3) return force(std::atoi(arguments[2]), count == 4);
    if (command == "attention" && count == 4) return attention(arguments[2], arguments[3]);
    if (command == "layout") {
#define FIELD(NAME) std::printf(#NAME " %zu\n", offsetof(RvNeonAttention, NAME))
        FIELD(query), FIELD(key), FIELD(value), FIELD(out), FIELD(tokens), FIELD(keys), FIELD(window), FIELD(heads);
        FIELD(kv_heads), FIELD(head_dim), FIELD(causal), FIELD(scale), FIELD(softcap);
        std::printf("size %zu\n", sizeof(RvNeonAttention));
        return 0;
    }
    return check_all();
}
