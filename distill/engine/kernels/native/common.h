// What every part of the library shares: the packed matrix, its layout, and memory that is kept between calls.
//
// One layout carries everything. A matrix [n, k] is packed into panels of 64 outputs; inside a panel the outputs are
// the lanes of a vector and k runs along memory, so that a product is: broadcast two activations, multiply-add into 64
// sums. Nothing is ever summed across lanes, and the k products of one output are added in the same order whatever the
// number of rows, the chunk or the thread: results are bit-identical alone and in a batch. Row-major weights with dot
// products along k were measured and rejected: the sum across lanes and the scale of every 128 columns cost a third.
//
//   FP8   unit of 4 k: 4 vectors of 64 bytes, each 16 outputs × 4 codes, ordered so that looking up the two bytes of
//         their bfloat16 and interleaving them gives the pairs (k, k+1) and (k+2, k+3) of 16 outputs in order
//   BF16  unit of 2 k: 4 vectors of 16 outputs × (k, k+1)
//   F32   unit of 1 k: 4 vectors of 16 outputs
//
// Codes are multiplied exactly: a bfloat16 holds every e4m3 value, and products go into float32 sums that are scaled once
// per 128 k. (Shifting codes into bfloat16 and scaling later is a trap: vdpbf16ps flushes the denormals.) Activations are
// rounded to bfloat16, or split into three of them (`parts` = 3), whose sum is the float32 itself.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

enum Kind { FP8 = 0, BF16 = 1, F32 = 2 };
constexpr int PANEL = 64, LANES = 16, BLOCK = 128, KEYS = 64;
using bf16 = uint16_t;

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int unit_k(int kind) { return kind == FP8 ? 4 : kind == BF16 ? 2 : 1; }
inline int padded_k(int k) { return ceil_div(k, 4) * 4; }
inline int panels_of(int n) { return ceil_div(n, PANEL); }
inline size_t panel_bytes(int kind, int k) { return size_t(ceil_div(k, unit_k(kind))) * 4 * 64; }

// Memory that grows and is kept, 64-byte aligned; contents are undefined.
class Scratch {
  public:
    template <class T> T* take(size_t count) {
        const size_t bytes = (count * sizeof(T) + 127) & ~size_t(63);
        if (bytes > size_) {
            std::free(data_);
            data_ = std::aligned_alloc(64, bytes);
            size_ = bytes;
        }
        return static_cast<T*>(data_);
    }

  private:
    void* data_ = nullptr;
    size_t size_ = 0;
};
Scratch shared_scratch[8];
thread_local Scratch own_scratch[8];

float e4m3_value(int code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    const float magnitude = exponent ? std::ldexp(float(8 + mantissa), exponent - 10) : std::ldexp(float(mantissa), -9);
    return code & 0x80 ? -magnitude : magnitude;
}

// The high and the low byte of each code's bfloat16, without the sign.
struct CodeBytes {
    alignas(64) uint8_t high[128], low[128];
    alignas(64) bf16 whole[256];
    CodeBytes() {
        for (int code = 0; code < 256; code++) {
            const float value = e4m3_value(code);
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            whole[code] = bf16(bits >> 16);
            if (code < 128) high[code] = uint8_t(bits >> 24), low[code] = uint8_t(bits >> 16);
        }
    }
};
const CodeBytes code_bytes;

// The addresses of the cached keys or values of one sequence and key-value head.
struct Rows {
    const uint8_t* base;  // the pool, or the first row
    const int64_t* table; // page numbers; null: rows follow each other
    int64_t page_bytes, head_bytes, row_bytes;
    int page_size;
    const uint8_t* at(int token) const {
        if (!table) return base + token * row_bytes;
        return base + table[token / page_size] * page_bytes + head_bytes + (token % page_size) * row_bytes;
    }
    // The addresses of `count` tokens, from `first` on.
    void find(int first, int count, const uint8_t** rows) const {
        for (int i = 0; i < count;) {
            const uint8_t* row = at(first + i);
            const int end = table ? std::min(count, i + page_size - (first + i) % page_size) : count;
            for (; i < end; i++, row += row_bytes) rows[i] = row;
        }
    }
};

} // namespace
