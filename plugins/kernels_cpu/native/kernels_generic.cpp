// Portable C++: any processor, and what the others are compared with.
#include "kernels.h"
#include "lanes.h"

namespace {

constexpr int64_t kTile = 4;

template <int BITS> struct Dot {
    using Sum = VI;
    static constexpr int run = 8;
    static constexpr bool centred = false;
    static inline VI start(VI sum) { return sum; }
    static inline VI add(VI sum, VI w, int32_t x) {
        for (int i = 0; i < 4; i++) sum += (w >> 8 * i & 255) * (int32_t)(int8_t)(x >> 8 * i);
        return sum;
    }
    static inline VI flush(VI, VI sum) { return sum; }
};

}  // namespace

#include "table.h"

extern const Kernels kGeneric = RV_TABLE("generic");
