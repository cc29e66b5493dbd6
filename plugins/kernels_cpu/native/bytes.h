// Bytes that are multiplied with each other: how they are read, and how floats become two of them.
#pragma once
#include "kernels.h"
#include "lanes.h"

namespace {

constexpr int kParts = kPanelRows / kLanes;  // registers that hold a number for each row of a panel

static inline VI integers(const uint8_t* p) { VI v; memcpy(&v, p, sizeof v); return v; }
static inline int32_t four(const int8_t* p) { int32_t v; memcpy(&v, p, 4); return v; }

// Values within 127 as q, and as r if it is not null; returns them in units of 1/256.
static inline V split_bytes(V scaled, int8_t* q, int8_t* r) {
    constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer and leaves it in the low bits
    const V shifted = scaled + magic, whole = shifted - magic;
    V rest{};
    if (r) {
        rest = vmin(vmax((scaled - whole) * 256.0f, splat(-127.0f)), splat(127.0f)) + magic;
        store_bytes(r, (VI)rest - 0x4b400000);
        rest = rest - magic;
    }
    store_bytes(q, (VI)shifted - 0x4b400000);
    return whole * 256.0f + rest;
}

}  // namespace
