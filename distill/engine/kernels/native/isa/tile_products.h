// Products on the tiles of AMX: `through_panel` of products.h for FP8 and bfloat16 matrices.
// Part of amx_variant.h, within the namespace of one variant; what is not here is the base's.
//
// The order of sums is the same at every number of rows. k is taken 32 at a time, zeros past its end. A step adds up even
// and odd k apart, from zero, joins them, and adds the result to a float32 sum (see tile_registers.h); with activations
// in three parts, each part is a step. The sums of an FP8 matrix start from zero at every block of 128, and are added,
// times the block's scale, to those of the blocks before; a bfloat16 matrix has one sum over all of k.
//
// A panel of bfloat16 has pairs of k as its rows, 256 bytes apart, and is loaded as tiles from where it is. Codes are
// decoded into that form, a block of all 64 columns at a time, while the tiles multiply the block before: a tile that is
// loaded right after it was written waits for the writes. Rows are split into tiles of equal height, of which the last
// one may repeat some of its neighbour's: no tile is configured twice in a call, and none reads past the last row.
//
// Up to VECTOR_ROWS rows, vectors do the same in the same order: decoding takes all of the time there, and a row needs no
// tile. Measured by a prototype only; the bound is to be set where the instructions are (perf/README.md).

constexpr int STEP_K = 32, STEP_BYTES = STEP_K / 2 * 256; // of a panel that is bfloat16
constexpr int MOST_ROWS = 128;                            // that share a decoded block
constexpr int PLAIN_BLOCK = 512;                          // k between two visits of a bfloat16 matrix's sums
constexpr int VECTOR_ROWS = LEVEL == 3 ? 4 : 0;

// Denormals are zeros for vectors, too, as they are for tiles, while this is in scope.
struct Flushing {
    unsigned before = _mm_getcsr();
    Flushing() {
        _mm_setcsr((before & ~0x6000u) | 0x8040u); // to nearest, denormals zero in results and operands
        asm volatile("" ::: "memory");             // the compiler does not see that sums depend on it
    }
    ~Flushing() {
        asm volatile("" ::: "memory");
        _mm_setcsr(before);
    }
    Flushing(const Flushing&) = delete;
};

// Rows times one panel.
struct PanelJob {
    int kind, k, rows, parts;
    const uint8_t* w;
    const float* scale;  // of the panel's blocks, or null
    const uint8_t* next; // the panel that is read after this one
};

// A block of codes as bfloat16, zeros past k.
void decode_block(const PanelJob& job, int block, uint8_t* to) {
    const int units = ceil_div(job.k, 4), first = block * (BLOCK / 4), end = std::min(units, first + BLOCK / 4);
    const uint8_t* w = job.w + size_t(first) * 256;
    const ptrdiff_t ahead = end < units ? BLOCK / 4 * 256 : job.next - w;
    for (int unit = first; unit < end; unit++, w += 256, to += 512)
        for (int v = 0; v < 4; v++) {
            fetch(w + ahead + 64 * v);
            I pairs[2];
            decode_codes(w + 64 * v, pairs[0], pairs[1]);
            std::memcpy(to + 64 * v, &pairs[0], 64);
            std::memcpy(to + 256 + 64 * v, &pairs[1], 64);
        }
    if (const int past = (end - first) % (STEP_K / 4)) std::memset(to, 0, size_t(STEP_K / 4 - past) * 512);
}

// The last pairs of k of a bfloat16 panel or of rows, as a whole step with zeros behind them.
struct Tails {
    const uint8_t *weights = nullptr, *rows = nullptr; // rows: [parts][tiles][height] of 64 bytes
};

struct TileJob : PanelJob {
    const uint8_t* base; // row 0
    ptrdiff_t stride;    // from a row to the next
    size_t part;
    int height, tiles;
    Tails tail;
    int first_row(int tile) const { return tile + 1 < tiles ? tile * height : rows - height; }
};

// Where a step's rows of a tile begin, and their stride.
INLINE void load_rows_at(const TileJob& job, int tile, int part, int step, const uint8_t*& from, ptrdiff_t& stride) {
    if (step * STEP_K + STEP_K <= padded_k(job.k)) {
        from = job.base + job.first_row(tile) * job.stride + part * job.part + size_t(step) * 64;
        stride = job.stride;
    } else {
        from = job.tail.rows + (size_t(part) * job.tiles + tile) * job.height * 64;
        stride = 64;
    }
}

// Some steps of two tiles of rows (TWO) by two of columns, or of one by four. w: of the first step; the sums are in
// tiles 0 to 3.
template <bool TWO> INLINE void multiply(const TileJob& job, int tile, int column, int first, int end,
                                         const uint8_t* w) {
    for (int step = first; step < end; step++, w += STEP_BYTES) {
        const bool past = job.tail.weights && step * STEP_K + STEP_K > job.k;
        const uint8_t* from = (past ? job.tail.weights : w) + column * 64;
        for (int part = 0; part < job.parts; part++) {
            const uint8_t* rows;
            ptrdiff_t stride;
            load_rows_at(job, tile, part, step, rows, stride);
            tile_load<4>(rows, stride);
            tile_load<6>(from, 256);
            tile_load<7>(from + 64, 256);
            tile_dot<0, 4, 6>();
            tile_dot<1, 4, 7>();
            if constexpr (TWO) {
                load_rows_at(job, tile + 1, part, step, rows, stride);
                tile_load<5>(rows, stride);
                tile_dot<2, 5, 6>();
                tile_dot<3, 5, 7>();
            } else {
                tile_load<6>(from + 128, 256);
                tile_load<7>(from + 192, 256);
                tile_dot<2, 4, 6>();
                tile_dot<3, 4, 7>();
            }
        }
    }
}

// A block of the sums [tiles][16][64] of one or two tiles of rows.
template <bool TWO>
INLINE void add_block(const TileJob& job, int tile, int column, int first, int end, const uint8_t* w, float* sums) {
    float* at[4];
    for (int i = 0; i < 4; i++)
        at[i] = TWO ? sums + (tile + i / 2) * (16 * PANEL) + (column + i % 2) * LANES
                    : sums + tile * (16 * PANEL) + i * LANES;
    if (job.scale || first == 0) {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    } else {
        tile_load<0>(at[0], PANEL * 4), tile_load<1>(at[1], PANEL * 4);
        tile_load<2>(at[2], PANEL * 4), tile_load<3>(at[3], PANEL * 4);
    }
    multiply<TWO>(job, tile, column, first, end, w);
    if (!job.scale) {
        tile_store<0>(at[0], PANEL * 4), tile_store<1>(at[1], PANEL * 4);
        tile_store<2>(at[2], PANEL * 4), tile_store<3>(at[3], PANEL * 4);
        return;
    }
    alignas(64) float block[4][16 * LANES];
    tile_store<0>(block[0], 64), tile_store<1>(block[1], 64);
    tile_store<2>(block[2], 64), tile_store<3>(block[3], 64);
    const V scale = all(job.scale[first * STEP_K / BLOCK]);
    for (int row = 0; row < job.height; row++)
        for (int i = 0; i < 4; i++) {
            float* to = at[i] + row * PANEL;
            store(to, load(to) + load(block[i] + row * LANES) * scale);
        }
}

// The last step's rows and weights, where k is no multiple of 32.
Tails tails_of(const TileJob& job) {
    Tails tail;
    const int whole = job.k / STEP_K * STEP_K, padded = padded_k(job.k) / STEP_K * STEP_K;
    const size_t size = size_t(job.parts) * job.tiles * job.height * 64;
    if (whole == job.k) return tail;
    uint8_t* memory = own_scratch[6].take<uint8_t>(size + STEP_BYTES);
    std::memset(memory, 0, size + STEP_BYTES);
    if (job.kind == BF16) {
        std::memcpy(memory + size, job.w + size_t(whole) * 128, size_t(ceil_div(job.k - whole, 2)) * 256);
        tail.weights = memory + size;
    }
    tail.rows = memory;
    if (padded > whole) return tail; // rows are padded to a whole step as they are
    for (int part = 0; part < job.parts; part++)
        for (int tile = 0; tile < job.tiles; tile++)
            for (int row = 0; row < job.height; row++, memory += 64)
                std::memcpy(memory, job.base + (job.first_row(tile) + row) * job.stride + part * job.part + whole * 2,
                            size_t(padded_k(job.k) - whole) * 2);
    return tail;
}

// Sums [tiles][16][64] of at most MOST_ROWS rows.
__attribute__((noinline)) void tile_sums(const TileJob& job, float* sums) {
    const Flushing flushing;
    tile_configure(job.height);
    const int steps = ceil_div(job.k, STEP_K), per_block = (job.kind == FP8 ? BLOCK : PLAIN_BLOCK) / STEP_K;
    uint8_t* decoded[2];
    decoded[0] = job.kind == FP8 ? own_scratch[5].take<uint8_t>(2 * BLOCK * 128) : nullptr;
    decoded[1] = decoded[0] + BLOCK * 128;
    if (job.kind == FP8) {
        std::memset(sums, 0, size_t(job.tiles) * 16 * PANEL * 4);
        decode_block(job, 0, decoded[0]);
    }
    for (int first = 0, block = 0; first < steps; first += per_block, block++) {
        const int end = std::min(steps, first + per_block);
        const uint8_t* w = job.kind == FP8 ? decoded[block % 2] : job.w + size_t(first) * STEP_BYTES;
        if (job.kind == FP8 && end < steps) decode_block(job, block + 1, decoded[1 - block % 2]);
        for (int tile = 0; tile < job.tiles; tile += 2)
            if (tile + 1 < job.tiles) {
                add_block<true>(job, tile, 0, first, end, w, sums);
                add_block<true>(job, tile, 2, first, end, w, sums);
            } else {
                add_block<false>(job, tile, 0, first, end, w, sums);
            }
    }
}

#if LEVEL == 3
// What tiles compute, for few rows, in vectors: NV of a panel's four vectors at a time, so that sums stay in registers.
// sums: [ROWS][64].
template <int KIND, int ROWS> void vector_sums(const PanelJob& job, const uint8_t* const* a, size_t part, float* sums) {
    constexpr int NV = ROWS < 3 ? 4 : 2, PAIRS = KIND == FP8 ? 2 : 1; // pairs of k in a unit
    const Flushing flushing;
    const I high = I{} + int32_t(0xffff0000u);
    const int units = ceil_div(job.k, 2 * PAIRS), per_step = 16 / PAIRS;
    alignas(64) float block[ROWS * PANEL];
    float* const to = job.scale ? block : sums;
    std::memset(sums, 0, sizeof block);
    for (int first = 0; first < units; first += per_step) {
        const int end = std::min(units, first + per_step), k = first * 2 * PAIRS;
        const uint8_t* w = job.w + size_t(first) * 256;
        if (job.scale && k % BLOCK == 0) std::memset(block, 0, sizeof block);
        const int past = first + 2 * per_step - ceil_div(units, per_step) * per_step; // units into the next panel
        const ptrdiff_t ahead = past < 0 ? 2 * per_step * 256 : job.next + past * 256 - w;
        for (int unit = 0; unit < end - first; unit++)
            for (int v = 0; v < 4; v++) fetch(w + ahead + unit * 256 + v * 64);
        for (int p = 0; p < job.parts; p++)
            for (int v0 = 0; v0 < 4; v0 += NV) {
                V even[ROWS][NV] = {}, odd[ROWS][NV] = {};
                for (int unit = first; unit < end; unit++) {
                    const uint8_t* from = w + size_t(unit - first) * 256 + v0 * 64;
                    I pairs[NV][2];
#pragma GCC unroll 4
                    for (int v = 0; v < NV; v++)
                        if constexpr (KIND == FP8) decode_codes(from + 64 * v, pairs[v][0], pairs[v][1]);
                        else pairs[v][0] = load_pairs(from + 64 * v);
#pragma GCC unroll 2
                    for (int half = 0; half < PAIRS; half++)
#pragma GCC unroll 4
                        for (int r = 0; r < ROWS; r++) {
                            const I x = pair_at(a[r] + p * part + (size_t(unit) * PAIRS + half) * 4);
                            const V low = (V)(x << 16), upper = (V)(x & high);
#pragma GCC unroll 4
                            for (int v = 0; v < NV; v++) {
                                even[r][v] = fma(low, (V)(pairs[v][half] << 16), even[r][v]);
                                odd[r][v] = fma(upper, (V)(pairs[v][half] & high), odd[r][v]);
                            }
                        }
                }
                for (int r = 0; r < ROWS; r++)
                    for (int v = 0; v < NV; v++) {
                        if (end - first < per_step) even[r][v] += V{}, odd[r][v] += V{}; // the zeros past k
                        float* at = to + r * PANEL + (v0 + v) * LANES;
                        store(at, load(at) + (even[r][v] + odd[r][v]));
                    }
            }
        if (job.scale && (end == units || (k + STEP_K) % BLOCK == 0)) {
            const V scale = all(job.scale[k / BLOCK]);
            for (int i = 0; i < ROWS * PANEL; i += LANES) store(sums + i, load(sums + i) + load(block + i) * scale);
        }
    }
}
template <int KIND> auto vector_sums_for(int rows) {
    constexpr decltype(&vector_sums<KIND, 1>) by_rows[] = {vector_sums<KIND, 1>, vector_sums<KIND, 2>,
                                                           vector_sums<KIND, 3>, vector_sums<KIND, 4>};
    static_assert(sizeof by_rows / sizeof by_rows[0] == VECTOR_ROWS);
    return by_rows[rows - 1];
}
#endif

bool use_vectors = true; // for few rows; tests compare both ways

// As the base's, in the order of sums of tiles but for float32 matrices, which tiles do not multiply.
template <class Row, class Done>
INLINE void through_panel(const Packed& w, int group, int panel, int rows, int parts, size_t part, Row row, Done done,
                          const uint8_t* after = nullptr) {
    if (w.kind == F32) return BASE::through_panel(w, group, panel, rows, parts, part, row, done, after);
    const int index = group * panels_of(w.n) + panel;
    const size_t bytes = panel_bytes(w.kind, w.k);
    const uint8_t* data = w.data + index * bytes;
    const PanelJob job{.kind = w.kind,
                       .k = w.k,
                       .rows = rows,
                       .parts = parts,
                       .w = data,
                       .scale = w.scale ? w.scale + size_t(index) * ceil_div(w.k, BLOCK) : nullptr,
                       .next = after ? after : data + bytes};
    alignas(64) float sums[MOST_ROWS * PANEL];
#if LEVEL == 3
    if (rows <= VECTOR_ROWS && use_vectors) {
        const uint8_t* a[VECTOR_ROWS];
        for (int i = 0; i < rows; i++) a[i] = row(i);
        (w.kind == FP8 ? vector_sums_for<FP8>(rows) : vector_sums_for<BF16>(rows))(job, a, part, sums);
        for (int i = 0; i < rows; i++) done(i, sums + i * PANEL);
        return;
    }
#endif
    for (int first = 0; first < rows; first += MOST_ROWS) {
        TileJob own{job, row(first), 0, part, 0, 0, {}};
        own.rows = std::min(MOST_ROWS, rows - first);
        own.tiles = ceil_div(own.rows, 16);
        own.height = ceil_div(own.rows, own.tiles);
        own.stride = own.rows > 1 ? row(first + 1) - own.base : 64;
        bool even = true;
        for (int i = 0; i < own.rows; i++) even &= row(first + i) == own.base + i * own.stride;
        if (!even) { // rows of other places side by side
            const size_t width = size_t(padded_k(w.k)) * 2;
            uint8_t* gathered = own_scratch[7].take<uint8_t>(width * own.rows * parts);
            for (int p = 0; p < parts; p++)
                for (int i = 0; i < own.rows; i++)
                    std::memcpy(gathered + (size_t(p) * own.rows + i) * width, row(first + i) + p * part, width);
            own.base = gathered, own.stride = ptrdiff_t(width), own.part = width * own.rows;
        }
        own.tail = tails_of(own);
        tile_sums(own, sums);
        for (int i = 0; i < own.rows; i++) {
            const int tile = std::min(i / own.height, own.tiles - 1);
            done(first + i, sums + (tile * 16 + i - own.first_row(tile)) * PANEL);
        }
    }
}

// Rows of activations in another order, side by side as tiles read them. token_of(row): where a row comes from.
template <class TokenOf>
Activations in_order(const Activations& x, int kind, int k, int parts, int rows, int threads, TokenOf token_of) {
    const size_t width = kind == F32 ? size_t(k) * 4 : size_t(padded_k(k)) * 2, part = width * rows;
    if (kind == F32) parts = 1;
    uint8_t* to = shared_scratch[5].take<uint8_t>(part * parts);
    const int chunk = std::max(1, int((1 << 16) / width));
    pool().run(threads, ceil_div(rows, chunk), [&](int task) {
        for (int row = task * chunk; row < std::min(rows, (task + 1) * chunk); row++)
            for (int p = 0; p < parts; p++)
                std::memcpy(to + p * part + row * width, x.at(token_of(row), 0) + p * x.part_bytes, width);
    });
    return {to, width, 0, part};
}
