// Packing: a row-major matrix into panels, and the look at its numbers that goes with it.
//
// Part of library.cpp: it packs whole panels of codes with the instruction set in use.
#pragma once

#include "common.h"

namespace {

// At most 64 rows of a row-major matrix (codes, bfloat16 or float32) as a panel. What is past them and past k is zero.
void pack_panel(int kind, int rows, int k, const void* source, int64_t row_stride, uint8_t* to) {
    if (rows < PANEL || k % unit_k(kind)) std::memset(to, 0, panel_bytes(kind, k));
    const int per_word = unit_k(kind), bytes = 4 / per_word; // of one number
    int k0 = 0;
    if (rows == PANEL) {
        chosen->pack_words(kind == FP8, static_cast<const uint8_t*>(source), row_stride * bytes, k / per_word, to);
        k0 = k / per_word / 16 * 16 * per_word;
    }
    if (kind == FP8) {
        const uint8_t* from = static_cast<const uint8_t*>(source);
        for (; k0 < k; k0 += 64)
            for (int i = 0; i < rows; i++) {
                const uint8_t* row = from + i * row_stride;
                uint8_t* lane = to + i / 16 * 64 + i % 16 / 4 * 16 + i % 4 * 2;
                const int end = std::min(k, k0 + 64);
                int j = k0;
                for (; j + 4 <= end; j += 4) {
                    std::memcpy(lane + j * 64, row + j, 2);
                    std::memcpy(lane + j * 64 + 8, row + j + 2, 2);
                }
                for (; j < end; j++) lane[j / 4 * 256 + (j % 4) / 2 * 8 + j % 2] = row[j];
            }
    } else if (kind == BF16) {
        const bf16* from = static_cast<const bf16*>(source);
        bf16* lanes = reinterpret_cast<bf16*>(to);
        for (; k0 < k; k0 += 32)
            for (int i = 0; i < rows; i++)
                for (int j = k0; j < std::min(k, k0 + 32); j++)
                    lanes[j / 2 * 128 + i * 2 + j % 2] = from[i * row_stride + j];
    } else {
        const float* from = static_cast<const float*>(source);
        float* lanes = reinterpret_cast<float*>(to);
        for (; k0 < k; k0 += 16)
            for (int i = 0; i < rows; i++)
                for (int j = k0; j < std::min(k, k0 + 16); j++) lanes[j * 64 + i] = from[i * row_stride + j];
    }
}

// Finite float32 numbers as bfloat16, to nearest, ties to even.
void round_row(const float* from, int64_t count, bf16* to) {
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        std::memcpy(&bits, from + i, 4);
        to[i] = bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

// Whether any of some e4m3 codes is a NaN: 0x7f is the one magnitude that carries into the sign's place.
bool has_nan(const uint8_t* codes, int64_t count) {
    constexpr uint64_t ALL = 0x0101010101010101u;
    uint64_t any = 0;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        uint64_t word;
        std::memcpy(&word, codes + i, 8);
        any |= (word & 0x7f * ALL) + ALL;
    }
    for (; i < count; i++) any |= uint64_t(codes[i] & 0x7f) + 1;
    return any & 0x80 * ALL;
}

// Whether any of some numbers is infinite or NaN: all bits of the exponent are set.
template <class T> bool has_nonfinite(const void* numbers, int64_t count, T exponent) {
    const T* values = static_cast<const T*>(numbers);
    T any = 0;
    for (int64_t i = 0; i < count; i++) any |= T((values[i] & exponent) == exponent);
    return any;
}
bool has_damage(int kind, const uint8_t* row, int64_t count) {
    if (kind == FP8) return has_nan(row, count);
    return kind == BF16 ? has_nonfinite<uint16_t>(row, count, 0x7f80) : has_nonfinite<uint32_t>(row, count, 0x7f800000);
}

} // namespace
