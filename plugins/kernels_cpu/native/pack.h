// From rows of blocks to panels (packed.h).
#pragma once
#include "kernels.h"
#include "lanes.h"
#include "packed.h"
#include "unpack.h"

namespace {

// One row's scales of one block, to their places among sixteen.
template <int32_t S> static inline void pack_scales(const uint8_t* block, int64_t row, uint8_t* to) {
    using P = Packed<S>;
    constexpr int at = S == RV_Q2_K ? 80 : S == RV_Q3_K ? 108 : S == RV_Q6_K ? 208 : 0;
    memcpy(to + 2 * row, block + at, 2);
    if (P::minima) memcpy(to + 32 + 2 * row, block + at + 2, 2);
    if constexpr (P::super) {
        uint8_t found[32];  // scales, then minima
        if constexpr (S == RV_Q4_K || S == RV_Q5_K) six_bits(block + 4, found, found + 8);
        if constexpr (S == RV_Q2_K) memcpy(found, block, 16);
        if constexpr (S == RV_Q3_K) six_bits_q3(block + 96, (int8_t*)found);
        if constexpr (S == RV_Q6_K) memcpy(found, block + 192, 16);
        constexpr int groups = P::block / P::group, kinds = P::group_scales / 16;
        for (int g = 0; g < groups; g++)
            for (int kind = 0; kind < kinds; kind++)
                to[P::head + g * P::group_scales + kind * 16 + row] = found[kind * groups + g];
    }
}

// Eight quads of each of sixteen rows as the planes of one cell.
template <int32_t S> static inline void pack_cell(const uint32_t quads[8][16], uint32_t* to) {
    using P = Packed<S>;
    for (int r = 0; r < 16; r++) {
        if constexpr (P::low == 8)
            for (int i = 0; i < 8; i++) to[16 * i + r] = quads[i][r];
        if constexpr (P::low == 4)
            for (int i = 0; i < 4; i++)
                to[16 * i + r] = (quads[i][r] & 0x0f0f0f0f) | (quads[i + 4][r] & 0x0f0f0f0f) << 4;
        if constexpr (P::low == 2)
            for (int i = 0; i < 2; i++) {
                uint32_t all = 0;
                for (int j = 0; j < 4; j++) all |= (quads[4 * i + j][r] & 0x03030303) << 2 * j;
                to[16 * i + r] = all;
            }
        if constexpr (P::high == 1) {
            uint32_t all = 0;
            for (int j = 0; j < 8; j++) all |= (quads[j][r] >> P::low & 0x01010101) << j;
            to[16 * P::low + r] = all;
        }
        if constexpr (P::high == 2)
            for (int i = 0; i < 2; i++) {
                uint32_t all = 0;
                for (int j = 0; j < 4; j++) all |= (quads[4 * i + j][r] >> P::low & 0x03030303) << 2 * j;
                to[16 * (P::low + i) + r] = all;
            }
    }
}

// Rows behind the last are zero in every panel: scales of zero make them nothing.
static void pack(const RvMatrix& w, int64_t begin, int64_t end, uint8_t* panels) {
    with_scheme(w.scheme, [&](auto scheme) {
        constexpr int32_t S = decltype(scheme)::scheme;
        using F = Format<S>;
        using P = Packed<S>;
        const int64_t size = P::panel_bytes(w.cols);
        for (int64_t panel = begin; panel < end; panel++) {
            uint8_t* planes = panels + panel * size;
            uint8_t* scales = planes + P::planes_bytes(w.cols);
            const int64_t first = panel * kPanelRows, rows = least(kPanelRows, w.rows - first);
            if (rows < kPanelRows) memset(planes, 0, (size_t)size);
            alignas(64) uint32_t quads[F::block / 32][8][16] = {};
            for (int64_t b = 0; b < w.cols / F::block; b++, scales += P::scales) {
                for (int64_t r = 0; r < rows; r++) {
                    const uint8_t* block = w.data + (first + r) * w.row_bytes + b * F::bytes;
                    alignas(64) uint8_t bytes[F::block];
                    F::values(block, bytes);
                    for (int i = 0; i < F::block / 4; i++) memcpy(&quads[i / 8][i % 8][r], bytes + 4 * i, 4);
                    pack_scales<S>(block, r, scales);
                }
                for (int cell = 0; cell < F::block / 32; cell++, planes += P::planes)
                    pack_cell<S>(quads[cell], (uint32_t*)planes);
            }
        }
    });
}

}  // namespace
