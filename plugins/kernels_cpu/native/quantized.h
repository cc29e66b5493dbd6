// Products of packed weights (packed.h) with tiles of tokens. The including file has defined
//   Dot<BITS> for weights of so many bits: start, add a quad, and flush, at the latest after `run` quads;
//   centred: weights kept as q + 128 are taken as q.
#pragma once
#include "kernels.h"
#include "lanes.h"
#include "packed.h"
#include "unpack.h"

namespace {

constexpr int kParts = kPanelRows / kLanes;  // registers that hold a number for each row of a panel

static inline VI integers(const uint8_t* p) { VI v; memcpy(&v, p, sizeof v); return v; }

// Quad i of a cell, for the rows of one part.
template <int32_t S> static inline VI quad(const uint8_t* cell, int i, int part) {
    using P = Packed<S>;
    const uint8_t* p = cell + 4 * kLanes * part;
    if constexpr (P::low == 8) return integers(p + 64 * i);
    VI w;
    if constexpr (P::low == 4) w = (i < 4 ? integers(p + 64 * i) : integers(p + 64 * (i - 4)) >> 4) & 0x0f0f0f0f;
    if constexpr (P::low == 2) w = integers(p + 64 * (i / 4)) >> 2 * (i % 4) & 0x03030303;
    constexpr int low = P::low;
    if constexpr (P::high == 1) {
        const VI h = integers(p + 64 * low);
        w |= (i < low ? h << (low - i) : h >> (i - low)) & (0x01010101 << low);
    }
    if constexpr (P::high == 2) {
        const VI h = integers(p + 64 * (low + i / 4));
        const int at = 2 * (i % 4);
        w |= (at < low ? h << (low - at) : h >> (at - low)) & (0x03030303 << low);
    }
    return w;
}

// Scale and minimum of group g of a block whose scales begin at p.
template <int32_t S> static inline void group_scales(const uint8_t* p, int g, int part, V& scale, V& minimum) {
    using P = Packed<S>;
    const int from = kLanes * part;
    const V d = load_half((const uint16_t*)p + from);
    const uint8_t* bytes = p + P::head + g * P::group_scales + from;
    if constexpr (!P::super) {
        scale = d;
        if constexpr (P::minima) minimum = -load_half((const uint16_t*)(p + 32) + from);
        else minimum = d * (float)(S == RV_Q8_0 && Dot<8>::centred ? 0 : P::offset);
    } else if constexpr (S == RV_Q4_K || S == RV_Q5_K) {
        scale = d * floats(widen(bytes));
        minimum = load_half((const uint16_t*)(p + 32) + from) * floats(widen(bytes + 16));
    } else if constexpr (S == RV_Q2_K) {
        const VI both = widen(bytes);
        scale = d * floats(both & 15);
        minimum = load_half((const uint16_t*)(p + 32) + from) * floats(both >> 4);
    } else {
        scale = d * floats(widen((const int8_t*)bytes));
        minimum = scale * (float)P::offset;
    }
}

static inline int32_t four(const int8_t* p) { int32_t v; memcpy(&v, p, 4); return v; }

// sums[n] += quads [first, first + COUNT) of a cell times bytes of NT tokens, [quads][NT][4].
template <int32_t S, int NT, int COUNT>
static inline void dot_quads(const uint8_t* cell, int first, int part, const int8_t* x, VI* sums) {
    using D = Dot<Packed<S>::low + Packed<S>::high>;
    constexpr int run = D::run < COUNT ? D::run : COUNT;
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i += run) {
        typename D::Sum partial[NT];
#pragma GCC unroll 16
        for (int n = 0; n < NT; n++) partial[n] = D::start(sums[n]);
#pragma GCC unroll 8
        for (int j = i; j < i + run; j++) {
            const VI w = quad<S>(cell, first + j, part);
#pragma GCC unroll 16
            for (int n = 0; n < NT; n++) partial[n] = D::add(partial[n], w, four(x + 4 * (j * NT + n)));
        }
#pragma GCC unroll 16
        for (int n = 0; n < NT; n++) sums[n] = D::flush(sums[n], partial[n]);
    }
}

// One panel with one tile of NT tokens: out[NT][kPanelRows]. FINE: with the second bytes of the activations.
template <int32_t S, int NT, bool FINE>
static inline void panel_tile(const uint8_t* panel, int64_t cols, const Activations& x, int64_t t, float* out) {
    using P = Packed<S>;
    constexpr int quads = P::group / 4, groups = P::block / P::group;
    for (int part = 0; part < kParts; part++) {
        const uint8_t *cell = panel, *scales = panel + P::planes_bytes(cols);
        const int8_t *q = x.q + t * cols, *r = FINE ? x.r + t * cols : nullptr;
        const float *d = x.d + t * (cols / 32), *sums = P::group == 32 ? x.s32 + t * (cols / 32) : x.s16 + t * (cols / 16);
        V total[NT] = {};
        for (int64_t b = 0; b < cols / P::block; b++, scales += P::scales) {
#pragma GCC unroll 1
            for (int g = 0; g < groups; g++) {
                V scale, minimum;
                group_scales<S>(scales, g, part, scale, minimum);
                if (!FINE) scale *= 256.0f;
                const int first = P::group == 32 ? 0 : g % 2 * quads;
                VI dots[NT] = {};
                dot_quads<S, NT, quads>(cell, first, part, q, dots);
                if constexpr (FINE) {
#pragma GCC unroll 16
                    for (int n = 0; n < NT; n++) dots[n] <<= 8;
                    dot_quads<S, NT, quads>(cell, first, part, r, dots);
                    r += P::group * NT;
                }
                q += P::group * NT;
#pragma GCC unroll 16
                for (int n = 0; n < NT; n++) {
                    total[n] += floats(dots[n]) * (scale * d[n]);
                    total[n] -= minimum * sums[n];
                }
                sums += NT;
                if (P::group == 32 || g % 2) cell += P::planes, d += NT;
            }
        }
#pragma GCC unroll 16
        for (int n = 0; n < NT; n++) store(out + n * kPanelRows + part * kLanes, total[n]);
    }
}

constexpr int64_t kWeightsNear = 256 << 10;  // bytes of weights that stay in a near cache while all tokens pass

// run(tag of the width, t) for every tile.
template <class F> static inline void each_tile(int64_t count, F&& run) {
    for (int64_t t = 0; t < count; t += kTile) {
        const int64_t width = tile_width(count, t, kTile);
        if (width == kTile) run(Tag<kTile>{}, t);
        else if (width == 1) run(Tag<1>{}, t);
        else if (width == 2) run(Tag<2>{}, t);
        else if (width == 4) run(Tag<4>{}, t);
        else if constexpr (kTile > 8) run(Tag<8>{}, t);
    }
}

static void quantized_matmul(const Matrix& w, const Activations& x, int64_t begin, int64_t end, float* out,
                             int64_t stride) {
    const int64_t step = most(1, kWeightsNear / w.panel_bytes) * kPanelRows;
    with_scheme(w.source.scheme, [&](auto scheme) {
        for (int64_t from = begin; from < end; from += step)
            each_tile(x.count, [&](auto width, int64_t t) {
                constexpr int NT = decltype(width)::scheme;
                for (int64_t r = from; r < least(from + step, end); r += kPanelRows) {
                    alignas(64) float found[NT * kPanelRows];
                    const uint8_t* panel = w.panels + r / kPanelRows * w.panel_bytes;
                    if (x.r) panel_tile<decltype(scheme)::scheme, NT, true>(panel, x.cols, x, t, found);
                    else panel_tile<decltype(scheme)::scheme, NT, false>(panel, x.cols, x, t, found);
                    put(found, least(NT, x.count - t), least(kPanelRows, w.source.rows - r),
                        w.source.bias ? w.source.bias + r : nullptr, out + t * stride + r, stride);
                }
            });
    });
}

// Values as 256 * q + r in units of d, for the tile of tokens that begins with t.
static void quantize(const Activations& to, int64_t t, int64_t width) {
    const int64_t cols = to.cols, cells = cols / 32;
    int8_t *q = to.q + t * cols, *r = to.r ? to.r + t * cols : nullptr;
    float *d = to.d + t * cells, *s32 = to.s32 + t * cells, *s16 = to.s16 + t * 2 * cells;
    for (int64_t n = 0; n < width; n++) {
        if (t + n >= to.count) {
            for (int64_t i = 0; i < cols / 4; i++) {
                memset(q + 4 * (i * width + n), 0, 4);
                if (r) memset(r + 4 * (i * width + n), 0, 4);
            }
            for (int64_t c = 0; c < cells; c++)
                d[c * width + n] = s32[c * width + n] = s16[2 * c * width + n] = s16[(2 * c + 1) * width + n] = 0;
            continue;
        }
        const float* x = to.x + (t + n) * cols;
        for (int64_t c = 0; c < cells; c++, x += 32) {
            V top{};
            for (int i = 0; i < 32; i += kLanes) top = vmax(top, vmax(load(x + i), -load(x + i)));
            const float largest_of = largest(top), unit = largest_of / 127.0f;
            const float inverse = largest_of > 0 ? 127.0f / largest_of : 0.0f;
            alignas(64) int8_t coarse[32], rest[32];
            int32_t sums[2] = {};
            for (int i = 0; i < 32; i += kLanes) {
                // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
                const V scaled = load(x + i) * inverse, shifted = scaled + 12582912.0f;
                const VI whole = (VI)shifted - 0x4b400000;
                VI part{};
                if (r) {
                    V left = (scaled - (shifted - 12582912.0f)) * 256.0f;
                    left = vmin(vmax(left, splat(-127.0f)), splat(127.0f));
                    part = (VI)(left + 12582912.0f) - 0x4b400000;
                    store_bytes(rest + i, part);
                }
                store_bytes(coarse + i, whole);
                sums[i / 16] += sum((whole << 8) + part);
            }
            for (int i = 0; i < 8; i++) {
                memcpy(q + 4 * ((c * 8 + i) * width + n), coarse + 4 * i, 4);
                if (r) memcpy(r + 4 * ((c * 8 + i) * width + n), rest + 4 * i, 4);
            }
            const float step = unit / 256.0f;
            d[c * width + n] = step;
            s16[2 * c * width + n] = step * (float)sums[0];
            s16[(2 * c + 1) * width + n] = step * (float)sums[1];
            s32[c * width + n] = step * (float)(sums[0] + sums[1]);
        }
    }
}

}  // namespace
