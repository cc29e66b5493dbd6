// Random data, comparisons, and the count of failures.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>
#include "kernels.h"

struct Check {
    int failures = 0, done = 0;
    double worst = 0;  // of what was allowed, since the last report

    // |got - want| <= allowed
    void close(double got, double want, double allowed, const char* what, ...) __attribute__((format(printf, 5, 6))) {
        done++;
        const double off = std::fabs(got - want);
        if (off > worst * allowed) worst = off / allowed;
        if (off <= allowed) return;
        va_list list;
        va_start(list, what);
        fail(what, list);
        va_end(list);
        if (failures <= 20) std::printf("  got %.9g, want %.9g, allowed %.2g\n", got, want, allowed);
    }
    void that(bool holds, const char* what, ...) __attribute__((format(printf, 3, 4))) {
        done++;
        if (holds) return;
        va_list list;
        va_start(list, what);
        fail(what, list);
        va_end(list);
    }
    void report(const char* table, const char* what) {
        std::printf("%s %s: %d comparisons, worst %.2f of what is allowed\n", table, what, done, worst);
        if (!done) that(false, "%s %s compared nothing", table, what);
        done = 0;
        worst = 0;
    }

  private:
    void fail(const char* what, va_list list) {
        if (++failures > 20) return;
        std::printf("FAILED ");
        std::vprintf(what, list);
        std::printf("\n");
    }
};

// xorshift64*: the same numbers everywhere.
struct Random {
    uint64_t state = 88172645463325252u;

    uint64_t bits() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        return state * 2685821657736338717u;
    }
    double uniform() { return (double)(bits() >> 11) / 9007199254740992.0; }  // [0, 1)
    int64_t below(int64_t n) { return (int64_t)(uniform() * (double)n); }
    float normal() {
        double sum = -6;
        for (int i = 0; i < 12; i++) sum += uniform();
        return (float)sum;
    }
    std::vector<float> normals(int64_t n) {
        std::vector<float> found((size_t)n);
        for (float& x : found) x = normal();
        return found;
    }
};

// A half with a value in [1/8, 2) and any sign.
inline uint16_t half_of_ones(Random& random) {
    return (uint16_t)((random.bits() & 0x83ff) | (uint64_t)(12 + random.below(4)) << 10);
}

// The groups of checks, each for one table whose functions come from `table`, and from `base` where it has none.
struct Tables {
    const Kernels *table, *base;
    int run;  // columns of a token that stand together in the bytes of the activations
};
void check_products(const Tables& tables, Check& check);
void check_quantize(const Tables& tables, Check& check);
void check_elementwise(const Tables& tables, Check& check);
void check_moves(const Tables& tables, Check& check);
void check_attention(const Tables& tables, Check& check);
