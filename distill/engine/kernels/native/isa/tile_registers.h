// The tile registers of AMX and the instructions on them, as functions: configure, release, zero, load, store, dot.
// Part of amx_variant.h, within the namespace of one variant. TILES is 2 for the processor's own instructions, and 1 for
// an emulation of their definition, which runs anywhere and gives the same bits.
//
// All eight tiles have 64 bytes a row. Those of activations and sums have as many rows as `tile_configure` is told; the
// two of weights, WEIGHTS and WEIGHTS + 1, have 16 rows, each a pair of k. The compiler's own intrinsics are not used:
// GCC's paste the number of a tile as text, so that it cannot be a template's, and its load does not say that it reads
// memory.

constexpr int WEIGHTS = 6;        // the first tile of weights
thread_local int tile_height = 0; // rows of the other tiles as configured on this thread; 0: not configured

#if TILES == 2

struct alignas(64) TileShapes { // palette 1
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
};
void tile_configure(int height) {
    if (tile_height == height) return;
    TileShapes shapes;
    for (int tile = 0; tile < 8; tile++) shapes.rows[tile] = uint8_t(tile < WEIGHTS ? height : 16);
    asm volatile("ldtilecfg %0" ::"m"(shapes));
    tile_height = height;
}
void tile_release() {
    if (tile_height) asm volatile("tilerelease" ::: "memory");
    tile_height = 0;
}
template <int TILE> INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" ::"i"(TILE)); }
template <int TILE> INLINE void tile_load(const void* from, ptrdiff_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TILE) : "memory");
}
template <int TILE> INLINE void tile_store(void* to, ptrdiff_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(TILE) : "memory");
}
template <int SUMS, int ROWS, int COLUMNS> INLINE void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(ROWS), "i"(COLUMNS));
}

#else

// TDPBF16PS as Intel defines it ("Architectures Software Developer's Manual", volume 2, its entry's description and
// operation): for each row and column the products of even k are added to one float32 sum and those of odd k to another,
// both from zero and in the order of k, by fused multiply-adds; the two are added up, and their sum is added to what the
// tile held. Every step rounds to nearest even, takes denormals as zeros of their sign, and gives such zeros in place of
// results that are denormal. The control register of vectors (MXCSR) has no influence.
thread_local uint32_t emulated[8][16][16];
void tile_configure(int height) { tile_height = height; }
void tile_release() { tile_height = 0; }
INLINE int rows_of(int tile) { // a tile that is not configured is a fault, as it is in a processor
    if (!tile_height) std::abort();
    return tile < WEIGHTS ? tile_height : 16;
}
template <int TILE> void tile_zero() { std::memset(emulated[TILE], 0, size_t(rows_of(TILE)) * 64); }
template <int TILE> void tile_load(const void* from, ptrdiff_t stride) {
    for (int row = 0; row < rows_of(TILE); row++)
        std::memcpy(emulated[TILE][row], static_cast<const uint8_t*>(from) + row * stride, 64);
}
template <int TILE> void tile_store(void* to, ptrdiff_t stride) {
    for (int row = 0; row < rows_of(TILE); row++)
        std::memcpy(static_cast<uint8_t*>(to) + row * stride, emulated[TILE][row], 64);
}

INLINE float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
// What rounds to 2^-126 from below with 24 bits is no denormal; from this bound on it does. The sum in double is exact
// wherever it is near the bound, as a product of two bfloat16 has 16 bits.
INLINE float flushed_fma(float a, float b, float c) {
    const float sum = __builtin_fmaf(a, b, c);
    return std::fabs(double(a) * double(b) + double(c)) < 0x1.ffffffp-127 ? std::copysign(0.f, sum) : sum;
}
INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
void emulated_dot(uint32_t (*sums)[16], const uint32_t (*rows)[16], const uint32_t (*columns)[16], int height) {
    for (int row = 0; row < height; row++) {
        float even[16] = {}, odd[16] = {};
        for (int pair = 0; pair < 16; pair++) {
            const uint32_t x = rows[row][pair];
            const float low = flushed(from_bits(x << 16)), high = flushed(from_bits(x & 0xffff0000u));
            for (int i = 0; i < 16; i++) {
                const uint32_t w = columns[pair][i];
                even[i] = flushed_fma(low, flushed(from_bits(w << 16)), even[i]);
                odd[i] = flushed_fma(high, flushed(from_bits(w & 0xffff0000u)), odd[i]);
            }
        }
        for (int i = 0; i < 16; i++) {
            const float sum = flushed(flushed(from_bits(sums[row][i])) + flushed(even[i] + odd[i]));
            std::memcpy(&sums[row][i], &sum, 4);
        }
    }
}
template <int SUMS, int ROWS, int COLUMNS> void tile_dot() {
    emulated_dot(emulated[SUMS], emulated[ROWS], emulated[COLUMNS], rows_of(SUMS));
}

#endif

// One instruction alone: sums [16, 16] += rows [16, 32] · columns [16 pairs of k, 16].
void tile_probe(float* sums, const bf16* rows, const bf16* columns) {
    tile_configure(16);
    tile_load<0>(sums, 64);
    tile_load<4>(rows, 64);
    tile_load<WEIGHTS>(columns, 64);
    tile_dot<0, 4, WEIGHTS>();
    tile_store<0>(sums, 64);
    tile_release();
}
