// Products of packed weights (packed.h) with tiles of tokens. The including file has defined
//   Dot<BITS> for weights of so many bits: start, add a quad, and flush, at the latest after `run` quads;
//   centred: weights kept as q + 128 are taken as q.
#pragma once
#include "bytes.h"
#include "float.h"
#include "kernels.h"
#include "lanes.h"
#include "low_rank.h"
#include "packed.h"
#include "unpack.h"

namespace {

constexpr int64_t kAhead = 3072;                // bytes of planes

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

// With few tokens memory is slower than the processor, which does not read far enough ahead by itself. The address may
// lie behind the last panel: no fault comes of it.
template <int BYTES> static inline void prefetch(const uint8_t* p) {
#pragma GCC unroll 8
    for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(p + i, 0, 3);
}

// One panel with one tile of NT tokens: out[NT][kPanelRows]. TWO: with the second bytes of the activations.
template <int32_t S, int NT, bool TWO>
static inline void panel_tile(const uint8_t* panel, int64_t cols, const Activations& x, int64_t t, float* out) {
    using P = Packed<S>;
    constexpr int quads = P::group / 4, groups = P::block / P::group;
    constexpr int64_t planes = P::block / 32 * P::planes;  // of a block
    const int64_t blocks = cols / P::block, ahead = least(blocks, (kAhead + planes - 1) / planes);
    const int64_t panel_bytes = P::panel_bytes(cols);
    for (int part = 0; part < kParts; part++) {
        const uint8_t *cell = panel, *scales = panel + P::planes_bytes(cols);
        const int8_t *q = x.q + t * cols, *r = TWO ? x.r + t * cols : nullptr;
        const float *d = x.d + t * (cols / 32), *sums = P::group == 32 ? x.s32 + t * (cols / 32) : x.s16 + t * (cols / 16);
        V total[NT] = {};
        for (int64_t b = 0; b < blocks; b++, scales += P::scales) {
            // What is wanted so many blocks later, of planes and of scales, is of the next panel towards the end of one.
            const bool next = b + ahead >= blocks;
            const int64_t soon = ahead * planes + (next ? panel_bytes - blocks * planes : 0);
            prefetch<P::scales>(scales + ahead * P::scales + (next ? panel_bytes - blocks * P::scales : 0));
#pragma GCC unroll 1
            for (int g = 0; g < groups; g++) {
                const int first = P::group == 32 ? 0 : g % 2 * quads;
                prefetch<P::planes * P::group / 32>(cell + soon + first * 4 * kPanelRows);
                V scale, minimum;
                group_scales<S>(scales, g, part, scale, minimum);
                VI dots[NT] = {};
                dot_quads<S, NT, quads>(cell, first, part, q, dots);
                if constexpr (TWO) {
#pragma GCC unroll 16
                    for (int n = 0; n < NT; n++) dots[n] <<= 8;
                    dot_quads<S, NT, quads>(cell, first, part, r, dots);
                    r += P::group * NT;
                } else {
                    scale *= 256.0f;
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
        else if constexpr (kTile == 12) {
            if (width == 3) run(Tag<3>{}, t);
            else if (width == 6) run(Tag<6>{}, t);
            else run(Tag<8>{}, t);
        }
    }
}

static void quantized_matmul(const Matrix& w, const Activations& x, int64_t begin, int64_t end, float* out,
                             int64_t stride, const Added* added) {
    const int64_t step = most(1, kWeightsNear / w.panel_bytes) * kPanelRows;
    with_scheme(w.source.scheme, [&](auto scheme) {
        for (int64_t from = begin; from < end; from += step)
            each_tile(x.count, [&](auto width, int64_t t) {
                constexpr int NT = decltype(width)::scheme;
                const int64_t count = least(NT, x.count - t);
                for (int64_t r = from; r < least(from + step, end); r += kPanelRows) {
                    alignas(64) float found[NT * kPanelRows];
                    const uint8_t* panel = w.panels + r / kPanelRows * w.panel_bytes;
                    if (added && added->far) ask(*added, t, count, r);
                    if (x.r) panel_tile<decltype(scheme)::scheme, NT, true>(panel, x.cols, x, t, found);
                    else panel_tile<decltype(scheme)::scheme, NT, false>(panel, x.cols, x, t, found);
                    if (added) add_panel(*added, t, count, r, found);
                    put(found, count, least(kPanelRows, w.source.rows - r),
                        w.source.bias ? w.source.bias + r : nullptr, out + t * stride + r, stride);
                }
            });
    });
}

// The largest magnitude of 32 values.
static inline float top_of(const float* x) {
    V top{};
    for (int i = 0; i < 32; i += kLanes) top = vmax(top, vmax(load(x + i), -load(x + i)));
    const float found = largest(top);
    return found > 1e-36f ? found : 0;  // its reciprocal has to be finite
}

// 32 values as q, and as r if it is not null, with the sums of each half in units of top / (127 * 256).
static inline void two_bytes(const float* x, float top, int8_t* q, int8_t* r, int32_t* sums) {
    const float inverse = top > 0 ? 127.0f / top : 0.0f;
    V half[2] = {};  // sums of integers below 2^19, exact
    for (int i = 0; i < 32; i += kLanes)
        half[i / 16] += split_bytes(load(x + i) * inverse, q + i, r ? r + i : nullptr);
    sums[0] = (int32_t)sum(half[0]);
    sums[1] = (int32_t)sum(half[1]);
}

// The tile of tokens that begins with t.
static void quantize(const Activations& to, int64_t t, int64_t width) {
    const int64_t cols = to.cols, cells = cols / 32, count = least(width, to.count - t);
    int8_t *q = to.q + t * cols, *r = to.r ? to.r + t * cols : nullptr;
    float *d = to.d + t * cells, *s32 = to.s32 + t * cells, *s16 = to.s16 + t * 2 * cells;
    if (count < width) {
        memset(q, 0, (size_t)(width * cols));
        if (r) memset(r, 0, (size_t)(width * cols));
        memset(d, 0, (size_t)(width * cells) * 4);
        memset(s32, 0, (size_t)(width * cells) * 4);
        memset(s16, 0, (size_t)(width * 2 * cells) * 4);
    }
    for (int64_t n = 0; n < count; n++)
        for (int64_t c = 0; c < cells; c++) {
            const float* x = to.x + (t + n) * cols + 32 * c;
            const float top = top_of(x), unit = top / (127.0f * 256.0f);
            alignas(64) int8_t high[32], low[32];
            int32_t found[2];
            two_bytes(x, top, high, r ? low : nullptr, found);
            for (int i = 0; i < 8; i++) {
                memcpy(q + 4 * ((c * 8 + i) * width + n), high + 4 * i, 4);
                if (r) memcpy(r + 4 * ((c * 8 + i) * width + n), low + 4 * i, 4);
            }
            d[c * width + n] = unit;
            s16[2 * c * width + n] = unit * (float)found[0];
            s16[(2 * c + 1) * width + n] = unit * (float)found[1];
            s32[c * width + n] = unit * (float)(found[0] + found[1]);
        }
}

}  // namespace
