// Products: rows of activations times a packed matrix, a panel of 64 outputs at a time.
// Part of isa.h, within the namespace of one instruction set; variants that multiply otherwise (TILES) take `linears`.

#ifndef TILES
// Where a tile finds its panel: in memory, fetched a block ahead and `after` next; there, and its codes are written to
// `kept` as bfloat16 for the tiles that follow; or in the cache.
enum Where { MEMORY, KEEPING, CACHE };

// Whether sums may change from the unit of one block's scale to that of the next without leaving float32's range.
INLINE bool steady(const float* scale, int blocks) {
    bool within = true;
    for (int b = 0; b < blocks; b++) within &= scale[b] >= 0x1p-30f && scale[b] <= 0x1p30f;
    return within;
}

// `count` bfloat16 (an even number) as float32; STEP: bytes from one pair to the next.
template <int STEP> INLINE void widen_pairs(const uint8_t* from, int count, float* to) {
    int i = 0;
    if constexpr (STEP == 4)
        for (; i + LANES <= count; i += LANES) {
            H halves;
            std::memcpy(&halves, from + 2 * i, 32);
            store(to + i, (V)(__builtin_convertvector(halves, U) << 16));
        }
    for (; i < count; i += 2) {
        bf16 pair[2];
        std::memcpy(pair, from + size_t(i / 2) * STEP, 4);
        to[i] = widen(pair[0]), to[i + 1] = widen(pair[1]);
    }
}

// out [ROWS, NV·16] = rows a · panel, k products in order. At the end of each 128 of them the sums, which are in units of
// the block's scale, are turned into units of the next one's; where scales are too far apart for that (zero, say), they
// are scaled and added up in `out`.
// a[r]: row r's first part; `part` bytes further the next one. Float32 rows have one part. STEP: bytes from one pair of
// bfloat16, or one float32, of a row to the next. after: the panel that will be read after this one. lines: of the memory
// from `next` on, how many to fetch for every unit, so that reading the next panel takes no time of its own.
// Without an instruction for products of bfloat16 a block of a row is widened once: a multiply-add then takes its factor
// from memory, where taking a pair apart for each vector of weights would cost as much as multiplying.
template <int KIND, int ROWS, int NV, int PARTS, int STEP = 4, Where WHERE = MEMORY>
INLINE void tile(const uint8_t* const* a, size_t part, const uint8_t* w, int k, const float* scale, float* out,
                 const uint8_t* after, uint8_t* kept = nullptr, const uint8_t* next = nullptr, int lines = 0) {
    constexpr int UNIT = KIND == FP8 ? 4 : KIND == BF16 ? 2 : 1;
    const bool together = !scale || steady(scale, ceil_div(k, BLOCK));
    const ptrdiff_t step = 64 * lines, second_line = lines > 1 ? 64 : 0;
    constexpr bool WIDEN = KIND != F32 && LEVEL < 3;
    alignas(64) float wide[WIDEN ? ROWS : 1][WIDEN ? PARTS : 1][BLOCK];
    V sum[ROWS][NV] = {};
    for (int begin = 0; begin < k; begin += BLOCK) {
        const int end = std::min(k, begin + BLOCK), block = begin / BLOCK;
        if constexpr (WIDEN)
            for (int r = 0; r < ROWS; r++)
                for (int p = 0; p < PARTS; p++)
                    widen_pairs<STEP>(a[r] + p * part + size_t(begin / 2) * STEP, ceil_div(end - begin, UNIT) * UNIT,
                                      wide[r][p]);
        const int64_t ahead = end < k ? BLOCK / UNIT * NV * 64 : after - w;
        for (int at = begin; at < end; at += UNIT, w += NV * 64) {
            if (WHERE != CACHE && NV > 1) // one vector: queries, which stay in the cache
                for (int v = 0; v < NV; v++) fetch(w + ahead + 64 * v);
            if (NV > 1) { // without a branch: a line that is in the cache costs nothing
                fetch(next);
                fetch(next + second_line);
                next += step;
            }
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                if constexpr (KIND == F32) {
                    const V b = load(reinterpret_cast<const float*>(w) + 16 * v);
#pragma GCC unroll 16
                    for (int r = 0; r < ROWS; r++)
                        sum[r][v] = fma(b, all(*reinterpret_cast<const float*>(a[r] + size_t(at) * STEP)), sum[r][v]);
                } else {
                    I first, second;
                    if constexpr (KIND == FP8) decode_codes(w + 64 * v, first, second);
                    else first = load_pairs(w + 64 * v);
                    if constexpr (WHERE == KEEPING) {
                        std::memcpy(kept + size_t(at / UNIT) * 512 + 64 * v, &first, 64);
                        std::memcpy(kept + size_t(at / UNIT) * 512 + 256 + 64 * v, &second, 64);
                    }
#pragma GCC unroll 16
                    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
                        for (int half = 0; half < UNIT / 2; half++)
#pragma GCC unroll 3
                            for (int p = 0; p < PARTS; p++) {
                                const I pairs = half ? second : first;
                                if constexpr (WIDEN) {
                                    const float* x = wide[r][p] + (at - begin) + 2 * half;
                                    sum[r][v] = fma(first_of(pairs), all(x[0]), sum[r][v]);
                                    sum[r][v] = fma(second_of(pairs), all(x[1]), sum[r][v]);
                                } else {
                                    sum[r][v] = dot2(sum[r][v], pairs,
                                                     pair_at(a[r] + p * part + (size_t(at / 2) + half) * STEP));
                                }
                            }
                }
            }
        }
        if (together && end < k) {
            if (!scale) continue;
            const V next = all(scale[block] / scale[block + 1]);
            for (int r = 0; r < ROWS; r++)
                for (int v = 0; v < NV; v++) sum[r][v] *= next;
            continue;
        }
        const V s = all(scale ? scale[block] : 1.f);
        for (int r = 0; r < ROWS; r++)
            for (int v = 0; v < NV; v++) {
                float* to = out + r * NV * 16 + 16 * v;
                store(to, fma(sum[r][v], s, begin && !together ? load(to) : V{}));
                sum[r][v] = V{};
            }
    }
}

constexpr int MAX_ROWS = LEVEL >= 2 ? 6 : 2; // sums of a tile: 24 of AVX512's 32 registers
using Tile = void (*)(const uint8_t* const*, size_t, const uint8_t*, int, const float*, float*, const uint8_t*,
                      uint8_t*, const uint8_t*, int);
template <int KIND, int ROWS, int PARTS, Where WHERE>
void tile_call(const uint8_t* const* a, size_t part, const uint8_t* w, int k, const float* scale, float* out,
               const uint8_t* after, uint8_t* kept, const uint8_t* next, int lines) {
    tile<KIND, ROWS, 4, PARTS, 4, WHERE>(a, part, w, k, scale, out, after, kept, next, lines);
}
template <int KIND, int PARTS, Where WHERE> Tile tile_for(int rows) {
#if LEVEL >= 2
    constexpr Tile by_rows[] = {tile_call<KIND, 1, PARTS, WHERE>, tile_call<KIND, 2, PARTS, WHERE>,
                                tile_call<KIND, 3, PARTS, WHERE>, tile_call<KIND, 4, PARTS, WHERE>,
                                tile_call<KIND, 5, PARTS, WHERE>, tile_call<KIND, 6, PARTS, WHERE>};
#else
    constexpr Tile by_rows[] = {tile_call<KIND, 1, PARTS, WHERE>, tile_call<KIND, 2, PARTS, WHERE>};
#endif
    return by_rows[rows - 1];
}
Tile tile_for(int kind, int parts, int rows, Where where) {
    if (kind == F32) return where == CACHE ? tile_for<F32, 1, CACHE>(rows) : tile_for<F32, 1, MEMORY>(rows);
    if (kind == BF16 && where == CACHE)
        return parts == 1 ? tile_for<BF16, 1, CACHE>(rows) : tile_for<BF16, 3, CACHE>(rows);
    if (kind == BF16) return parts == 1 ? tile_for<BF16, 1, MEMORY>(rows) : tile_for<BF16, 3, MEMORY>(rows);
    if (where == KEEPING) return parts == 1 ? tile_for<FP8, 1, KEEPING>(rows) : tile_for<FP8, 3, KEEPING>(rows);
    return parts == 1 ? tile_for<FP8, 1, MEMORY>(rows) : tile_for<FP8, 3, MEMORY>(rows);
}

constexpr int KEEP_ROWS = 2 * MAX_ROWS + 1; // from here on it pays to turn a panel's codes into bfloat16 once
constexpr size_t NEAR_BYTES = 384 << 10;    // of a panel that the second level of the cache holds beside the next one

// All rows through one panel, in tiles of at most MAX_ROWS. row(i): pointer; done(i, sums[64]): takes the result; after:
// the panel that comes next (null: the next one of the matrix). Several tiles fetch it together: a panel that only the
// last one fetched would not arrive in time, and the time of reading would add to that of multiplying.
template <class Row, class Done>
INLINE void through_panel(const Packed& w, int group, int panel, int rows, int parts, size_t part, Row row, Done done,
                          const uint8_t* after = nullptr) {
    const int all_panels = panels_of(w.n), index = group * all_panels + panel;
    const size_t bytes = panel_bytes(w.kind, w.k);
    const uint8_t* data = w.data + index * bytes;
    if (!after) after = data + bytes;
    const float* scale = w.scale ? w.scale + size_t(index) * ceil_div(w.k, BLOCK) : nullptr;
    alignas(64) float sums[MAX_ROWS * PANEL];
    const uint8_t* a[MAX_ROWS];
    uint8_t* const kept =
        w.kind == FP8 && rows >= KEEP_ROWS ? own_scratch[5].take<uint8_t>(size_t(padded_k(w.k)) * 128) : nullptr;
    const int tiles = ceil_div(rows, MAX_ROWS);
    int lines = kept ? 1 : tiles > 1 && bytes <= NEAR_BYTES ? std::max(1, ceil_div(4, tiles)) : 0;
    const uint8_t *next = after, *const end = after + bytes;
    for (int begin = 0, left = tiles; left; left--) {
        const int count = ceil_div(rows - begin, left);
        for (int r = 0; r < count; r++) a[r] = row(begin + r);
        if (next >= end) lines = 0;
        if (kept && begin == 0) {
            tile_for(FP8, parts, count, KEEPING)(a, part, data, w.k, scale, sums, after, kept, next, 0);
        } else if (kept) {
            tile_for(BF16, parts, count, CACHE)(a, part, kept, padded_k(w.k), scale, sums, after, nullptr, next, lines);
            next += size_t(padded_k(w.k)) * 32 * lines;
        } else {
            const Where where = begin && bytes <= NEAR_BYTES ? CACHE : MEMORY;
            tile_for(w.kind, parts, count, where)(a, part, data, w.k, scale, sums, left > 1 ? data : after, nullptr,
                                                  next, lines);
            next += bytes / 4 * lines;
        }
        for (int r = 0; r < count; r++) done(begin + r, sums + r * PANEL);
        begin += count;
    }
}

// Rounded to bfloat16, in the upper half of each 32 bits: as a float32 it is the rounded value.
INLINE U rounded(V x) {
    const U bits = (U)x;
    return (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
}
INLINE void store_upper(bf16* p, U bits) {
    const H halves = __builtin_convertvector(bits >> 16, H);
    std::memcpy(p, &halves, 32);
}

// Float32 rows as `parts` bfloat16 rows of padded_k(k), zero past k.
void split(const float* x, int k, int parts, size_t part, bf16* out) {
    int j = 0;
    for (; j + LANES <= k; j += LANES) {
        const V value = load(x + j);
        const U high = rounded(value);
        store_upper(out + j, high);
        if (parts == 3) {
            const V rest = value - (V)high;
            const U middle = rounded(rest);
            store_upper(out + part + j, middle);
            store_upper(out + 2 * part + j, rounded(rest - (V)middle));
        }
    }
    for (; j < k; j++) {
        const bf16 high = round_bf16(x[j]);
        out[j] = high;
        if (parts == 3) {
            const float rest = x[j] - widen(high);
            const bf16 middle = round_bf16(rest);
            out[part + j] = middle;
            out[2 * part + j] = round_bf16(rest - widen(middle));
        }
    }
    for (int p = 0; p < parts; p++)
        for (int j = k; j < padded_k(k); j++) out[p * part + j] = 0;
}

constexpr int ROW_CHUNK = 96; // rows a task takes through a panel

// What the products read: float32 rows as they are, or their bfloat16 parts in scratch, [parts][rows][groups · padded k].
struct Activations {
    const uint8_t* base;
    size_t row_bytes, group_bytes, part_bytes;
    const uint8_t* at(int row, int group) const { return base + row * row_bytes + group * group_bytes; }
};
Activations prepare(const float* x, int64_t stride, int64_t group, int rows, int k, int groups, int kind, int parts,
                    int threads, Scratch& scratch) {
    if (kind == F32) return {reinterpret_cast<const uint8_t*>(x), size_t(stride) * 4, size_t(group) * 4, 0};
    const size_t width = size_t(padded_k(k)) * groups, part = width * rows;
    bf16* out = scratch.take<bf16>(part * parts);
    const int chunk = std::max(1, int(16384 / width));
    pool().run(threads, ceil_div(rows, chunk), [&](int task) {
        for (int row = task * chunk; row < std::min(rows, (task + 1) * chunk); row++)
            for (int g = 0; g < groups; g++)
                split(x + row * stride + g * group, k, parts, part, out + row * width + size_t(g) * padded_k(k));
    });
    return {reinterpret_cast<const uint8_t*>(out), width * 2, size_t(padded_k(k)) * 2, part * 2};
}

// The rows that products read, as they are and, if a matrix that is not float32 reads them, in parts.
struct BothForms {
    Activations wide, parted;
    BothForms(const LinearArgs& a, bool parts) {
        const auto form = [&](int kind) {
            return prepare(a.x, a.x_stride, a.x_group, a.rows, a.w->k, a.w->groups, kind, a.parts, a.threads,
                           shared_scratch[0]);
        };
        wide = form(F32);
        parted = parts ? form(BF16) : wide;
    }
    const Activations& of(const Packed& w) const { return w.kind == F32 ? wide : parted; }
};

#endif // TILES

// Products with several matrices that read the same rows, as one job.
void linears(const LinearArgs* args, int count) {
    const LinearArgs& first_of = args[0];
    const int chunks = ceil_div(first_of.rows, ROW_CHUNK);
    const BothForms both(first_of, std::any_of(args, args + count, [](auto& a) { return a.w->kind != F32; }));
    int tasks = 0;
    for (int i = 0; i < count; i++) tasks += args[i].w->groups * panels_of(args[i].w->n) * chunks;
    pool().run(first_of.threads, tasks, [&](int task) {
        const LinearArgs* of = args;
        for (int own; task >= (own = of->w->groups * panels_of(of->w->n) * chunks); of++) task -= own;
        const Packed& w = *of->w;
        const Activations& x = both.of(w);
        const int panels = panels_of(w.n), chunk = task % chunks, panel = task / chunks % panels,
                  group = task / chunks / panels;
        const int first = chunk * ROW_CHUNK, rows = std::min(ROW_CHUNK, of->rows - first);
        const int column = panel * PANEL, width = std::min(PANEL, w.n - column);
        const float* bias = of->bias ? of->bias + size_t(group) * w.n + column : nullptr;
        const size_t step = chunks > 1 ? 1 : size_t(of->threads); // threads take panels in turn
        const uint8_t* after = w.data + (size_t(group) * panels + panel + step) * panel_bytes(w.kind, w.k);
        through_panel(
            w, group, panel, rows, of->parts, x.part_bytes, [&](int i) { return x.at(first + i, group); },
            [&](int i, const float* sums) {
                float* to = of->out + (first + i) * of->out_stride + group * of->out_group + column;
                if (width == PANEL) {
                    for (int j = 0; j < PANEL; j += LANES) {
                        const V sum = bias ? load(sums + j) + load(bias + j) : load(sums + j);
                        store(to + j, of->add ? load(to + j) + sum : sum);
                    }
                } else if (of->add)
                    for (int j = 0; j < width; j++) to[j] += bias ? sums[j] + bias[j] : sums[j];
                else
                    for (int j = 0; j < width; j++) to[j] = bias ? sums[j] + bias[j] : sums[j];
            },
            after);
    });
}
void linear(const LinearArgs& args) { linears(&args, 1); }

#ifndef TILES
// Elements of a and b by number: those of b come after a's.
template <class T, class N> INLINE T shuffled(T a, T b, N number) {
#if defined(__clang__)
    constexpr int COUNT = sizeof(N) / sizeof(number[0]);
    T out;
    for (int i = 0; i < COUNT; i++) out[i] = number[i] < COUNT ? a[number[i]] : b[number[i] - COUNT];
    return out;
#else
    return __builtin_shuffle(a, b, number);
#endif
}

// 16 vectors of 16 words, turned: word j of vector i becomes word i of vector j.
INLINE void turn(I* word) {
    I lane;
    for (int i = 0; i < 16; i++) lane[i] = i;
#pragma GCC unroll 4
    for (int s = 8; s; s /= 2) {
        const I low = (lane & s) != 0 ? lane - s + 16 : lane, high = (lane & s) != 0 ? lane + 16 : lane + s;
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            if (!(r & s)) {
                const I a = word[r], b = word[r + s];
                word[r] = shuffled(a, b, low);
                word[r + s] = shuffled(a, b, high);
            }
    }
}

// 64 rows into a panel, as words of 4 codes, 2 bfloat16 or one float32: blocks of 16 rows × 16 words are turned, and the
// halves of words of codes then part. Words up to the last multiple of 16; the caller does the rest.
void pack_words(bool codes, const uint8_t* rows, int64_t row_bytes, int words, uint8_t* panel) {
    typedef int16_t S __attribute__((vector_size(64)));
    S halves;
    for (int i = 0; i < 32; i++) halves[i] = int16_t(i / 8 * 8 + i % 4 * 2 + i % 8 / 4);
    for (int word0 = 0; word0 + 16 <= words; word0 += 16)
        for (int set = 0; set < 4; set++) {
            I word[16];
            for (int r = 0; r < 16; r++) word[r] = load_pairs(rows + (set * 16 + r) * row_bytes + word0 * 4);
            turn(word);
            for (int unit = 0; unit < 16; unit++) {
                const S made = codes ? shuffled((S)word[unit], (S)word[unit], halves) : (S)word[unit];
                std::memcpy(panel + size_t(word0 + unit) * 256 + set * 64, &made, 64);
            }
        }
}

// `sets` times 16 rows of bfloat16 or float32, `bytes` each, into the first lanes of a panel; zeros behind the rows.
// between(): called once a block of 16 rows × 64 bytes.
template <class Between>
INLINE void turn_rows(const uint8_t* const* rows, int sets, int bytes, uint8_t* panel, Between between) {
    for (int at = 0; at < bytes; at += 64)
        for (int set = 0; set < sets; set++) {
            uint8_t* const to = panel + size_t(at / 4) * 256 + set * 64;
            I word[16];
            between();
            if (at + 64 <= bytes) { // all numbers known, so that the words stay in registers
#pragma GCC unroll 16
                for (int r = 0; r < 16; r++) word[r] = load_pairs(rows[set * 16 + r] + at);
                turn(word);
#pragma GCC unroll 16
                for (int unit = 0; unit < 16; unit++) std::memcpy(to + unit * 256, &word[unit], 64);
                continue;
            }
            for (int r = 0; r < 16; r++) {
                word[r] = I{};
                std::memcpy(&word[r], rows[set * 16 + r] + at, size_t(bytes - at));
            }
            turn(word);
            for (int unit = 0; unit < ceil_div(bytes - at, 4); unit++) std::memcpy(to + unit * 256, &word[unit], 64);
        }
}
#endif // TILES
