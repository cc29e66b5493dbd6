// Matrix products of every scheme with the very activations that the kernels see, against double.
#include "activations.h"
#include "packed.h"

namespace {

struct Scheme {
    int32_t scheme;
    int block, bytes;
    std::vector<int> halves;  // where a block has its 16-bit scales
    const char* name;
};

const std::vector<Scheme> kSchemes = {
    {RV_F32, 1, 4, {}, "f32"},           {RV_F16, 1, 2, {}, "f16"},       {RV_BF16, 1, 2, {}, "bf16"},
    {RV_Q4_0, 32, 18, {0}, "q4_0"},      {RV_Q4_1, 32, 20, {0, 2}, "q4_1"}, {RV_Q5_0, 32, 22, {0}, "q5_0"},
    {RV_Q5_1, 32, 24, {0, 2}, "q5_1"},   {RV_Q8_0, 32, 34, {0}, "q8_0"},  {RV_Q2_K, 256, 84, {80, 82}, "q2_k"},
    {RV_Q3_K, 256, 110, {108}, "q3_k"},  {RV_Q4_K, 256, 144, {0, 2}, "q4_k"}, {RV_Q5_K, 256, 176, {0, 2}, "q5_k"},
    {RV_Q6_K, 256, 210, {208}, "q6_k"},
};

// Any bits in a block's values, ordinary numbers in its scales.
std::vector<uint8_t> random_rows(const Scheme& s, int64_t rows, int64_t cols, Random& random) {
    const int64_t blocks = rows * cols / s.block;
    std::vector<uint8_t> data((size_t)(blocks * s.bytes));
    for (int64_t b = 0; b < blocks; b++) {
        uint8_t* block = data.data() + b * s.bytes;
        for (int i = 0; i < s.bytes; i++) block[i] = (uint8_t)random.bits();
        for (const int at : s.halves) {
            const uint16_t half = half_of_ones(random);
            memcpy(block + at, &half, 2);
        }
        if (!is_float(s.scheme)) continue;
        const float value = random.normal();
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (s.scheme == RV_F32) memcpy(block, &value, 4);
        // Every tenth half is subnormal.
        const uint16_t half = random.below(10) ? half_of_ones(random) : (uint16_t)(random.bits() & 0x83ff);
        const uint16_t brain = (uint16_t)(bits >> 16);
        if (s.scheme == RV_F16) memcpy(block, &half, 2);
        if (s.scheme == RV_BF16) memcpy(block, &brain, 2);
    }
    return data;
}

struct Weights {
    std::vector<uint8_t> data, panels;
    std::vector<float> bias, plain;
    Matrix matrix{};

    Weights(const Tables& tables, const Scheme& s, int64_t rows, int64_t cols, bool biased, Random& random)
        : data(random_rows(s, rows, cols, random)), bias(random.normals(rows)), plain((size_t)(rows * cols)) {
        const int64_t row_bytes = cols / s.block * s.bytes;
        matrix.source = {data.data(), biased ? bias.data() : nullptr, rows, cols, row_bytes, s.scheme, 0};
        for (int64_t r = 0; r < rows; r++) tables.base->decode_row(matrix.source, r, plain.data() + r * cols);
        with_scheme(s.scheme, [&](auto tag) {
            matrix.panel_bytes = Packed<decltype(tag)::scheme>::panel_bytes(cols);
        });
        if (is_float(s.scheme)) return;
        const int64_t count = (rows + kPanelRows - 1) / kPanelRows;
        panels.assign((size_t)(count * matrix.panel_bytes), 0x55);
        tables.table->pack(matrix.source, 0, count, panels.data());
        matrix.panels = panels.data();
    }
};

void check_shape(const Tables& tables, const Scheme& s, int64_t rows, int64_t cols, int64_t count, int bits,
                 Random& random, Check& check) {
    const Weights w(tables, s, rows, cols, count % 2, random);
    const Quantized x(tables, bits == 32 ? random.normals(count * cols) : activations(random, count, cols), count, cols,
                      bits);
    const int64_t stride = rows + 3;
    constexpr float kUntouched = 12345;
    std::vector<float> out((size_t)(count * stride), kUntouched);
    std::vector<float> scratch((size_t)matmul_scratch(cols) / 4);
    // A product with a minimum is the difference of two, whose terms may cancel.
    const double share = s.halves.size() == 2 ? 8e-6 : 1e-6;
    const int64_t middle = rows > kPanelRows ? kPanelRows : rows;
    tables.table->matmul(w.matrix, x.view, 0, middle, out.data(), stride, nullptr, scratch.data());
    if (middle < rows) tables.table->matmul(w.matrix, x.view, middle, rows, out.data(), stride, nullptr, scratch.data());
    for (int64_t t = 0; t < count; t++) {
        for (int64_t r = 0; r < rows; r++) {
            double want = w.matrix.source.bias ? w.bias[(size_t)r] : 0.0, size = std::fabs(want);
            for (int64_t k = 0; k < cols; k++) {
                const double term = (double)w.plain[(size_t)(r * cols + k)] * x.value(t, k);
                want += term;
                size += std::fabs(term);
            }
            check.close(out[(size_t)(t * stride + r)], want, share * size + 1e-37,
                        "%s [%d, %d], token %d of %d, row %d", s.name, (int)rows, (int)cols, (int)t, (int)count,
                        (int)r);
        }
        for (int64_t r = rows; r < stride; r++)
            check.that(out[(size_t)(t * stride + r)] == kUntouched, "%s wrote behind its rows", s.name);
    }
}

}  // namespace

void check_products(const Tables& tables, Check& check) {
    for (const Scheme& s : kSchemes) {
        Random random;
        const std::vector<int64_t> widths = s.block == 1    ? std::vector<int64_t>{1, 2, 7, 67, 128}
                                            : s.block == 32 ? std::vector<int64_t>{32, 96, 320}
                                                            : std::vector<int64_t>{256, 768};
        for (const int64_t cols : widths)
            for (const int64_t rows : {1, 16, 37})
                for (int64_t count = 1; count <= 2 * tables.table->tile + 1; count++) {
                    const int bits = s.block == 1 ? 32 : count == 2 || count == 5 ? 8 : 16;
                    check_shape(tables, s, rows, cols, count, bits, random, check);
                }
        check.report(tables.table->name, s.name);
    }
}
