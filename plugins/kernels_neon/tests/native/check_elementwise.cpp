// Norm, rope and gated activations against double, for sizes that fill registers and sizes that do not.
#include "check.h"

namespace {

void check_norm(const Kernels& table, Random& random, Check& check) {
    for (const int64_t n : {1, 3, 4, 15, 16, 37, 576})
        for (const bool adds : {false, true}) {
            const std::vector<float> before = random.normals(n), add = random.normals(n), weight = random.normals(n);
            std::vector<float> total = before, out((size_t)n);
            table.norm(total.data(), adds ? add.data() : nullptr, weight.data(), n, 1e-5f, out.data());
            double squares = 0;
            for (size_t i = 0; i < (size_t)n; i++) {
                check.that(total[i] == (adds ? before[i] + add[i] : before[i]), "sum before the norm of %d", (int)n);
                squares += (double)total[i] * total[i];
            }
            const double scale = 1 / std::sqrt(squares / (double)n + 1e-5);
            for (size_t i = 0; i < (size_t)n; i++) {
                const double want = total[i] * scale * weight[i];
                check.close(out[i], want, 1e-6 * std::fabs(want) + 1e-12, "norm of %d, value %d", (int)n, (int)i);
            }
        }
}

void check_rope(const Kernels& table, Random& random, Check& check) {
    for (const int32_t dim : {2, 6, 8, 10, 64, 80})
        for (const int32_t turned : {2, 6, 8, 64})
            for (const int32_t interleaved : {0, 1}) {
                if (turned > dim) continue;
                RvModel model{};
                model.head_dim = dim;
                model.rope_dim = turned;
                model.rope_interleaved = interleaved;
                const std::vector<float> x = random.normals(3 * dim);
                std::vector<float> cos((size_t)turned / 2), sin(cos.size()), out = x;
                for (size_t i = 0; i < cos.size(); i++) {
                    const double angle = 6.28 * random.uniform();
                    cos[i] = (float)std::cos(angle), sin[i] = (float)std::sin(angle);
                }
                table.rope(out.data(), 3, model, cos.data(), sin.data());
                std::vector<double> want(x.begin(), x.end());
                for (int h = 0; h < 3; h++)
                    for (int i = 0; i < turned / 2; i++) {
                        const size_t a = (size_t)(h * dim + (interleaved ? 2 * i : i));
                        const size_t b = a + (size_t)(interleaved ? 1 : turned / 2);
                        want[a] = (double)x[a] * cos[(size_t)i] - (double)x[b] * sin[(size_t)i];
                        want[b] = (double)x[b] * cos[(size_t)i] + (double)x[a] * sin[(size_t)i];
                    }
                for (size_t i = 0; i < x.size(); i++)
                    check.close(out[i], want[i], 1e-6, "rope %d of %d, interleaved %d, value %d", turned, dim,
                                interleaved, (int)i);
            }
}

double activated(double x, int32_t activation) {
    if (activation == RV_SILU) return x / (1 + std::exp(-x));
    if (activation == RV_GELU) return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

void check_gated(const Kernels& table, Random& random, Check& check) {
    for (const int32_t activation : {RV_SILU, RV_GELU_TANH, RV_GELU})
        for (const int64_t n : {1, 2, 4, 5, 7, 96, 515}) {
            std::vector<float> gate = random.normals(n), out((size_t)n + 1, 7.0f);
            const std::vector<float> up = random.normals(n);
            const float wide[] = {0.0f, -0.0f, 100.0f, -100.0f, 1e4f, -1e4f, 1e-30f, -87.5f, 88.5f};
            for (size_t i = 0; i < (size_t)n; i++) gate[i] = i % 3 ? 5 * gate[i] : wide[i / 3 % 9];
            table.gated(gate.data(), up.data(), n, activation, out.data());
            for (size_t i = 0; i < (size_t)n; i++) {
                const double want = activated(gate[i], activation) * up[i];
                // Where an activation tends to zero its last digits cancel.
                const double allowed = 1e-6 * std::fabs(want) + 3e-7 * std::fabs((double)gate[i] * up[i]) + 1e-37;
                check.close(out[i], want, allowed, "activation %d of %g", activation, gate[i]);
            }
            check.that(out[(size_t)n] == 7.0f, "activation %d wrote behind its end", activation);
        }
}

}  // namespace

void check_elementwise(const Tables& tables, Check& check) {
    Random random;
    check_norm(*tables.table, random, check);
    check.report(tables.table->name, "norm");
    check_rope(*tables.table, random, check);
    check.report(tables.table->name, "rope");
    check_gated(*tables.table, random, check);
    check.report(tables.table->name, "gated");
}
