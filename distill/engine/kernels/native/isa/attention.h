// Attention over paged caches, and the scores of sparse attention.
//
// Attention is the same product twice. 16 queries are the lanes (the heads that share a key in decoding, consecutive
// tokens in prefill), keys are the rows; softmax is online over blocks of 64 keys at fixed positions. Where few heads
// share a key, most lanes would be empty: then keys are the lanes of the scores and columns those of the output. Both
// forms add in the same order and give the same bits. The second reads values where they are cached.
// Part of isa.h, within the namespace of one instruction set.

constexpr int FEW = 8; // queries, up to which rows are faster than lanes

// At most 16 queries against the keys and values of one head. Query i sees tokens 0 … limit[i]-1 of those that come by.
struct Lanes {
    int d, e;  // width of keys and of values
    bool wide; // float32 keys and values, else bfloat16
    float scale;
    const uint8_t* q; // packed: units of k, one vector of 16 lanes each; or `few` rows
    I limit;
    V top, total;                    // running maximum and sum of the softmax
    float* out;                      // [16, e rounded up to 64], not yet divided by `total`
    int width;                       // of a row of `out`
    const uint8_t* panels = nullptr; // all values in the form of `value_panel`; null: they are rows
    int few = 0;                     // queries that are rows, `q_row` bytes apart; each sees all that comes by
    size_t q_row = 0;
    int used() const { return few ? few : LANES; }
};
// Values of KEYS keys and 64 columns: float32 rows, or rows of the pairs (key 2i, key 2i+1) of bfloat16.
constexpr size_t value_panel_bytes(bool wide) { return size_t(wide ? KEYS : KEYS / 2) * 256; }

// The first `count` ≤ 16 numbers of a row from `column` on, as the low bits of words; zeros behind them.
template <bool WIDE> INLINE U columns(const uint8_t* row, int column, int count) {
    U value{};
    H halves{};
    if (count == 0) return value;
    if (WIDE && count == LANES) std::memcpy(&value, row + size_t(column) * 4, 64);
    else if (WIDE) std::memcpy(&value, row + size_t(column) * 4, size_t(count) * 4);
    else if (count == LANES) std::memcpy(&halves, row + size_t(column) * 2, 32);
    else std::memcpy(&halves, row + size_t(column) * 2, size_t(count) * 2);
    return WIDE ? value : __builtin_convertvector(halves, U);
}

// out = out · kept + p · values of a block. product: of p and a panel of 64 columns, whose rows are keys, or pairs of keys.
template <bool WIDE, class Product>
INLINE void add_values(Lanes& s, const Rows& values, int first, int count, V kept, Product product) {
    alignas(64) float factor[LANES];
    store(factor, kept);
    constexpr size_t SIZE = value_panel_bytes(WIDE);
    const uint8_t* rows[KEYS + 1];
    uint8_t* made = nullptr;
    if (!s.panels) {
        made = own_scratch[0].take<uint8_t>(SIZE);
        values.find(first, count, rows);
        rows[count] = nullptr;
    }
    const int used = WIDE ? count : (count + 1) / 2 * 2;
    for (int column = 0; column < s.e; column += PANEL) {
        const int width = std::min(PANEL, s.e - column);
        const uint8_t* panel = made;
        if (!made) {
            panel = s.panels + size_t(first / KEYS * panels_of(s.e) + column / PANEL) * SIZE;
        } else {
            for (int i = 0; i < used; i += WIDE ? 1 : 2) {
                uint8_t* const to = made + size_t(WIDE ? i : i / 2) * 256;
                for (int v = 0; v < PANEL; v += LANES) {
                    const int own = std::clamp(width - v, 0, LANES); // the rest of the panel is zeros
                    U value = columns<WIDE>(rows[i], column + v, own);
                    if (!WIDE && rows[i + 1]) value |= columns<WIDE>(rows[i + 1], column + v, own) << 16;
                    std::memcpy(to + v * 4, &value, 64);
                }
            }
        }
        alignas(64) float sums[LANES * PANEL];
        product(panel, used, sums);
        for (int lane = 0; lane < s.used(); lane++)
            for (int v = 0; v < PANEL; v += 16) {
                float* to = s.out + size_t(lane) * s.width + column + v;
                store(to, fma(load(to), all(factor[lane]), load(sums + lane * PANEL + v)));
            }
    }
}

template <bool WIDE> INLINE void attend_block(Lanes& s, const Rows& keys, const Rows& values, int first, int count) {
    constexpr int ROWS = LEVEL >= 2 ? 8 : 4, KIND = WIDE ? F32 : BF16;
    alignas(64) float score[KEYS * LANES];
    const uint8_t* a[KEYS];
    keys.find(first, count, a);
    for (int i = count; i < KEYS; i++) a[i] = a[count - 1];
    for (int i = 0; i < count; i += ROWS) tile<KIND, ROWS, 1, 1>(a + i, 0, s.q, s.d, nullptr, score + i * LANES, s.q);

    V top = s.top;
    for (int i = 0; i < count; i++) {
        V x = load(score + i * LANES) * s.scale;
        x = (I{} + (first + i)) < s.limit ? x : all(-INFINITY);
        store(score + i * LANES, x);
        top = max(top, x);
    }
    const V kept = exp(s.top - top); // first block: top was -inf, and e^-inf is as good as 0 for an empty sum
    V total = s.total * kept;
    // The probabilities replace the scores: as float32, or as pairs of bfloat16 of keys 2i and 2i+1 in row i.
    for (int i = 0; i < count; i += 2) {
        V p[2] = {};
        for (int j = 0; j < 2 && i + j < count; j++) {
            const V x = load(score + (i + j) * LANES);
            p[j] = x == all(-INFINITY) ? V{} : exp(x - top); // a NaN stays one
            total += p[j];
        }
        if (WIDE) {
            store(score + i * LANES, p[0]);
            store(score + (i + 1) * LANES, p[1]);
        } else {
            store(score + i / 2 * LANES, (V)(rounded(p[0]) >> 16 | rounded(p[1])));
        }
    }
    s.top = top;
    s.total = total;

    // out = out · kept + p · values.
    const uint8_t* p_row[LANES];
    for (int lane = 0; lane < LANES; lane++) p_row[lane] = reinterpret_cast<const uint8_t*>(score + lane);
    add_values<WIDE>(s, values, first, count, kept, [&](const uint8_t* panel, int used, float* sums) {
        for (int lane = 0; lane < LANES; lane += 4)
            tile<KIND, 4, 4, 1, 64>(p_row + lane, 0, panel, used, nullptr, sums + lane * PANEL, panel);
    });
}

// Cached rows that are read soon, fetched a few lines at a time between other work: hundreds of requests at once wait for
// the few buffers for misses, and all that follows waits with them. Between two pages no hardware sees what comes next.
class Coming {
  public:
    void add(const Rows& rows, int first, int count) {
        for (int i = 0; i < count;) {
            const int end = rows.table ? std::min(count, i + rows.page_size - (first + i) % rows.page_size) : count;
            const uint8_t* const row = rows.at(first + i);
            const int lines = ceil_div(int((end - i) * rows.row_bytes), 64);
            run_[runs_++] = {row, lines};
            left_ += lines;
            i = end;
        }
    }
    int left() const { return left_; }
    INLINE void fetch_lines(int count) {
        for (left_ -= std::min(count, left_); count && at_ < runs_;) {
            Run& run = run_[at_];
            const int now = std::min(count, run.lines);
            for (int i = 0; i < now; i++) fetch(run.from + size_t(i) * 64);
            run.from += size_t(now) * 64;
            run.lines -= now;
            count -= now;
            at_ += !run.lines;
        }
    }

  private:
    struct Run {
        const uint8_t* from;
        int lines;
    };
    Run run_[2 * KEYS]; // of the keys and the values of a block, if each is in a page of its own
    int runs_ = 0, at_ = 0, left_ = 0;
};

// NV · 16 columns of a key's values, of which `width` exist, or of two keys as pairs; zeros behind them.
template <bool WIDE, int NV>
INLINE void value_columns(const uint8_t* row, const uint8_t* other, int column, int width, U* out) {
#if LEVEL >= 2
    if (!WIDE && other && width == NV * LANES) {
        typedef int16_t S __attribute__((vector_size(64)));
        S low, high;
        for (int i = 0; i < 32; i++) low[i] = int16_t(i / 2 + i % 2 * 32), high[i] = int16_t(low[i] + 16);
#pragma GCC unroll 2
        for (int v = 0; v < NV; v += 2) {
            const S first = (S)load_pairs(row + size_t(column) * 2 + v * 32),
                    second = (S)load_pairs(other + size_t(column) * 2 + v * 32);
            out[v] = (U)shuffled(first, second, low);
            out[v + 1] = (U)shuffled(first, second, high);
        }
        return;
    }
#endif
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
        const int own = std::clamp(width - v * LANES, 0, LANES);
        out[v] = columns<WIDE>(row, column + v * LANES, own);
        if (!WIDE && other) out[v] |= columns<WIDE>(other, column + v * LANES, own) << 16;
    }
}

// `add_values` for ROWS queries and NV · 16 columns: the same sums, of values as they are cached. p: probabilities by
// key, KEYS floats or bfloat16 in the place of as many floats a query. factor: by query. coming: fetched by the way.
template <bool WIDE, int ROWS, int NV>
void add_columns(const uint8_t* const* rows, int count, int column, int width, const float* p, const float* factor,
                 float* out, int out_width, Coming& coming) {
    V sum[ROWS][NV] = {};
    const int lines = ceil_div(coming.left(), ceil_div(count, WIDE ? 1 : 2));
    for (int i = 0; i < count; i += WIDE ? 1 : 2) {
        U value[NV];
        coming.fetch_lines(lines);
        value_columns<WIDE, NV>(rows[i], WIDE ? nullptr : rows[i + 1], column, width, value);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) {
                if (WIDE) sum[r][v] = fma((V)value[v], all(p[r * KEYS + i]), sum[r][v]);
                else sum[r][v] = dot2(sum[r][v], (I)value[v], pair_at(reinterpret_cast<const bf16*>(p + r * KEYS) + i));
            }
    }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < NV; v++) {
            float* to = out + size_t(r) * out_width + v * LANES;
            store(to, fma(load(to), all(factor[r]), sum[r][v] + V{}));
        }
}
constexpr int FEW_ROWS = LEVEL >= 2 ? 4 : 2; // of a call of `add_columns`
template <bool WIDE, int NV> auto columns_for(int rows) {
    constexpr decltype(&add_columns<WIDE, 1, NV>) by_rows[] = {
        add_columns<WIDE, 1, NV>,
        add_columns<WIDE, 2, NV>,
#if LEVEL >= 2
        add_columns<WIDE, 3, NV>,
        add_columns<WIDE, 4, NV>,
#endif
    };
    return by_rows[rows - 1];
}

// The same for few queries.
template <bool WIDE>
INLINE void attend_block_few(Lanes& s, const Rows& keys, const Rows& values, int first, int count, Coming coming) {
    constexpr int KIND = WIDE ? F32 : BF16, SIZE = WIDE ? 4 : 2;
    alignas(64) float score[FEW * KEYS];
    const uint8_t *rows[KEYS], *value_rows[KEYS + 1];
    keys.find(first, count, rows);
    values.find(first, count, value_rows);
    value_rows[count] = nullptr;
    const int sets = ceil_div(count, LANES);
    for (int i = count; i < sets * LANES; i++) rows[i] = rows[count - 1];
    uint8_t* panel = own_scratch[0].take<uint8_t>(panel_bytes(KIND, s.d));
    const int lines = ceil_div(coming.left(), 2 * sets * ceil_div(s.d * SIZE, 64)); // half of them, the rest below
    turn_rows(rows, sets, s.d * SIZE, panel, [&] { coming.fetch_lines(lines); });
    const uint8_t* a[MAX_ROWS];
    for (int begin = 0; begin < s.few; begin += MAX_ROWS) {
        const int own = std::min(MAX_ROWS, s.few - begin);
        for (int i = 0; i < own; i++) a[i] = s.q + size_t(begin + i) * s.q_row;
        tile_for(KIND, 1, own, CACHE)(a, 0, panel, s.d, nullptr, score + begin * KEYS, panel, nullptr, panel, 0);
    }

    I lane_number;
    for (int lane = 0; lane < LANES; lane++) lane_number[lane] = lane;
    alignas(64) float tops[LANES] = {};
    for (int row = 0; row < s.few; row++) {
        V top = all(-INFINITY);
        for (int i = 0; i < sets * LANES; i += LANES) {
            float* at = score + row * KEYS + i;
            V x = load(at) * s.scale;
            x = lane_number + i < I{} + count ? x : all(-INFINITY);
            store(at, x);
            top = max(top, x);
        }
#pragma GCC unroll 4
        for (int by = LANES / 2; by; by /= 2) {
            I other;
            for (int lane = 0; lane < LANES; lane++) other[lane] = (lane + by) % LANES;
            top = max(top, shuffled(top, top, other));
        }
        tops[row] = top[0];
    }
    const V top = max(s.top, load(tops)), kept = exp(s.top - top);
    alignas(64) float totals[LANES], row_top[LANES], factor[LANES];
    store(totals, s.total * kept);
    store(row_top, top);
    store(factor, kept);
    for (int row = 0; row < s.few; row++)
        for (int i = 0; i < sets * LANES; i += LANES) {
            const V x = load(score + row * KEYS + i);
            store(score + row * KEYS + i, x == all(-INFINITY) ? V{} : exp(x - all(row_top[row])));
        }
    // Each query's sum is over the keys in order; four at a time, because one addition waits for the one before.
    for (int row = 0; row < s.few; row += 4) {
        const float* const p = score + row * KEYS;
        float total[4] = {totals[row], totals[row + 1], totals[row + 2], totals[row + 3]};
        for (int i = 0; i < count; i++)
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++) total[r] += p[r * KEYS + i];
        for (int r = 0; r < std::min(4, s.few - row); r++) totals[row + r] = total[r];
    }
    if (!WIDE)
        for (int row = 0; row < s.few; row++)
            for (int i = 0; i < sets * LANES; i += LANES) {
                float* const p = score + row * KEYS;
                store_upper(reinterpret_cast<bf16*>(p) + i, rounded(load(p + i)));
            }
    s.top = top;
    s.total = load(totals);
    for (int column = 0; column < s.e; column += PANEL)
        for (int row = 0; row < s.few; row += FEW_ROWS) {
            const int own = std::min(FEW_ROWS, s.few - row), width = std::min(PANEL, s.e - column);
            (width > 2 * LANES ? columns_for<WIDE, 4>(own) : columns_for<WIDE, 2>(own))(
                value_rows, count, column, width, score + row * KEYS, factor + row,
                s.out + size_t(row) * s.width + column, s.width, coming);
        }
}

// Tokens begin … end-1. after: of few queries, what is read after them.
void attend(Lanes& s, const Rows& keys, const Rows& values, int begin, int end, const Coming& after = {}) {
    for (int first = begin; first < end; first += KEYS) {
        const int count = std::min(KEYS, end - first), left = std::min(KEYS, end - first - count);
        Coming coming;
        if (s.few && left) coming.add(keys, first + count, left), coming.add(values, first + count, left);
        if (s.few && s.wide) attend_block_few<true>(s, keys, values, first, count, left ? coming : after);
        else if (s.few) attend_block_few<false>(s, keys, values, first, count, left ? coming : after);
        else if (s.wide) attend_block<true>(s, keys, values, first, count);
        else attend_block<false>(s, keys, values, first, count);
    }
}

// The queries q(lane) (null: an empty lane) packed for `tile`, in own_scratch 1; to be followed by `restart`.
template <class Q> Lanes lanes_for(int d, int e, bool wide, float scale, I limit, Q q) {
    const int unit = wide ? 1 : 2, units = ceil_div(d, unit), width = ceil_div(e, PANEL) * PANEL;
    uint8_t* packed = own_scratch[1].take<uint8_t>(size_t(units) * 64);
    for (int lane = 0; lane < LANES; lane++) {
        uint32_t* to = reinterpret_cast<uint32_t*>(packed) + lane;
        const float* from = q(lane);
        if (!from) {
            for (int i = 0; i < units; i++) to[i * LANES] = 0;
        } else if (wide) {
            for (int j = 0; j < d; j++) std::memcpy(to + j * LANES, from + j, 4);
        } else {
            alignas(64) bf16 part[LANES + 1];
            for (int j = 0; j < d; j += LANES) {
                const int count = std::min(LANES, d - j);
                if (count == LANES) store_upper(part, rounded(load(from + j)));
                else
                    for (int i = 0; i < count; i++) part[i] = round_bf16(from[j + i]);
                part[count] = 0;
                for (int i = 0; i < count; i += 2) std::memcpy(to + (j + i) / 2 * LANES, part + i, 4);
            }
        }
    }
    return {d, e, wide, scale, packed, limit, V{}, V{}, nullptr, width};
}

// The same for `count` ≤ FEW queries that follow each other.
Lanes few_for(int d, int e, bool wide, float scale, int count, const float* q) {
    const size_t row = wide ? size_t(d) : size_t(padded_k(d));
    const int width = ceil_div(e, PANEL) * PANEL;
    Lanes s{d, e, wide, scale, reinterpret_cast<const uint8_t*>(q), I{}, V{}, V{}, nullptr, width};
    if (!wide) {
        bf16* halves = own_scratch[1].take<bf16>(row * count);
        for (int i = 0; i < count; i++) split(q + size_t(i) * d, d, 1, 0, halves + i * row);
        s.q = reinterpret_cast<const uint8_t*>(halves);
    }
    s.few = count;
    s.q_row = row * (wide ? 4 : 2);
    return s;
}

// Begin with nothing seen, and sum into `out` [16, width].
void restart(Lanes& s, float* out) {
    s.top = all(-1e30f);
    s.total = V{};
    s.out = out;
    std::fill(out, out + s.used() * s.width, 0.f);
}

// A context is attended to in parts of this many tokens, which are then joined in order, on whatever thread each ran.
constexpr int PART = 2 * KEYS;

// The softmax over some tokens of at most 16 queries: maximum, sum, and the values weighed, not yet divided by the sum.
struct Part {
    float* data; // [2][16], then [16][width]
    int lanes;   // that are in use
    static size_t size(int width) { return size_t(LANES) * (2 + width); }
    float* values() const { return data + 2 * LANES; }
    void put(const Lanes& s) {
        store(data, s.top);
        store(data + LANES, s.total);
    }
    void join(const Part& next, int width) {
        const V top = max(load(data), load(next.data));
        alignas(64) float own[LANES], other[LANES];
        store(own, exp(load(data) - top));
        store(other, exp(load(next.data) - top));
        store(data, top);
        store(data + LANES, fma(load(data + LANES), load(own), load(next.data + LANES) * load(other)));
        for (int lane = 0; lane < lanes; lane++) {
            float* to = values() + size_t(lane) * width;
            const float* from = next.values() + size_t(lane) * width;
            for (int j = 0; j < width; j += LANES)
                store(to + j, fma(load(to + j), all(own[lane]), load(from + j) * other[lane]));
        }
    }
    void finish(int e, int width, float* out) const {
        for (int lane = 0; lane < lanes; lane++) {
            const float* from = values() + size_t(lane) * width;
            for (int j = 0; j < e; j++) out[size_t(lane) * e + j] = from[j] / data[LANES + lane];
        }
    }
};

void decode(const DecodeArgs& args) {
    const int size = args.wide ? 4 : 2, shared_by = args.heads / args.kv_heads, sets = ceil_div(shared_by, LANES);
    const int units = args.rows * args.kv_heads * sets, width = ceil_div(args.e, PANEL) * PANEL;
    const auto lanes_of = [&](int unit) { return std::min(LANES, shared_by - unit % sets * LANES); };
    const auto queries_of = [&](int unit) {
        const int row = unit / (args.kv_heads * sets), head = unit / sets % args.kv_heads, set = unit % sets;
        const int lanes = lanes_of(unit), first = head * shared_by + set * LANES;
        if (lanes <= FEW)
            return few_for(args.d, args.e, args.wide, args.scale, lanes,
                           args.q + (size_t(row) * args.heads + first) * args.d);
        return lanes_for(args.d, args.e, args.wide, args.scale, I{} + int(args.length[row]), [&](int lane) {
            return lane < lanes ? args.q + (size_t(row) * args.heads + first + lane) * args.d : nullptr;
        });
    };
    const auto rows_of = [&](int unit, const void* pool_, int width_) {
        const int row = unit / (args.kv_heads * sets), head = unit / sets % args.kv_heads;
        const int64_t row_bytes = int64_t(width_) * size, head_bytes = row_bytes * args.page_size;
        return Rows{static_cast<const uint8_t*>(pool_),
                    args.table + row * args.table_stride,
                    head_bytes * args.kv_heads,
                    head_bytes * head,
                    row_bytes,
                    args.page_size};
    };
    const auto length_of = [&](int unit) { return int(args.length[unit / (args.kv_heads * sets)]); };
    const auto first_block = [&](int unit, int part) { // of a part; nothing past the last unit
        Coming coming;
        if (unit >= units) return coming;
        const int begin = part * PART, count = std::min(KEYS, length_of(unit) - begin);
        coming.add(rows_of(unit, args.k, args.k_width), begin, count);
        coming.add(rows_of(unit, args.v, args.v_width), begin, count);
        return coming;
    };
    const auto part_of = [&](int unit, int part, Lanes& s, Part result, const Coming& after = {}) {
        const int begin = part * PART, end = std::min(length_of(unit), begin + PART);
        restart(s, result.values());
        attend(s, rows_of(unit, args.k, args.k_width), rows_of(unit, args.v, args.v_width), begin, end, after);
        result.put(s);
    };
    const auto finish = [&](int unit, Part result) {
        const int row = unit / (args.kv_heads * sets), head = unit / sets % args.kv_heads, set = unit % sets;
        const int first = head * shared_by + set * LANES;
        result.finish(args.e, width, args.out + (size_t(row) * args.heads + first) * args.e);
    };
    const auto parts_of = [&](int unit) { return ceil_div(length_of(unit), PART); };

    if (units >= 2 * args.threads) {
        pool().run(args.threads, units, [&](int unit) {
            float* memory = own_scratch[3].take<float>(2 * Part::size(width));
            Part whole{memory, lanes_of(unit)}, next{memory + Part::size(width), lanes_of(unit)};
            Lanes s = queries_of(unit);
            const int parts = parts_of(unit);
            for (int part = 0; part < parts; part++) {
                const bool last = part + 1 == parts;
                const int coming = last ? unit + args.threads : unit; // threads take units in turn
                part_of(unit, part, s, part ? next : whole,
                        s.few ? first_block(coming, last ? 0 : part + 1) : Coming());
                if (part) whole.join(next, width);
            }
            finish(unit, whole);
        });
        return;
    }
    std::vector<int> first(size_t(units) + 1, 0);
    for (int unit = 0; unit < units; unit++) first[unit + 1] = first[unit] + parts_of(unit);
    float* memory = shared_scratch[4].take<float>(Part::size(width) * first[units]);
    const auto at = [&](int unit, int index) { return Part{memory + Part::size(width) * index, lanes_of(unit)}; };
    pool().run(args.threads, first[units], [&](int index) {
        const int unit = int(std::upper_bound(first.begin(), first.end(), index) - first.begin()) - 1;
        Lanes s = queries_of(unit);
        part_of(unit, index - first[unit], s, at(unit, index));
    });
    for (int unit = 0; unit < units; unit++) {
        Part whole = at(unit, first[unit]);
        for (int index = first[unit] + 1; index < first[unit + 1]; index++) whole.join(at(unit, index), width);
        finish(unit, whole);
    }
}

// Causal attention of a chunk. For MLA each head's keys and values are first written out from the latents.
void prefill(const PrefillArgs& args) {
    const int size = args.wide ? 4 : 2, shared_by = args.heads / args.kv_heads, start = args.length - args.rows;
    const bool latent = args.uk != nullptr;
    const int nope = latent ? args.uk->n : 0, rank = latent ? args.uk->k : 0, rope = args.d - nope;
    pool().run(args.threads, args.heads, [&](int head) {
        const auto pooled = [&](const void* pool_, int width_) {
            const int64_t row_bytes = int64_t(width_) * size, head_bytes = row_bytes * args.page_size;
            return Rows{static_cast<const uint8_t*>(pool_), args.table, head_bytes * args.kv_heads,
                        head_bytes * (head / shared_by),    row_bytes,  args.page_size};
        };
        Rows keys = pooled(args.k, args.k_width), values = latent ? keys : pooled(args.v, args.v_width);
        uint8_t* v = nullptr;
        if (latent) {
            uint8_t* const k = own_scratch[3].take<uint8_t>(size_t(args.length) * args.d * size);
            const size_t block = value_panel_bytes(args.wide) * panels_of(args.e);
            v = own_scratch[4].take<uint8_t>(ceil_div(args.length, KEYS) * block);
            const auto expand = [&](const Packed& w, auto put) {
                for (int panel = 0; panel < panels_of(w.n); panel++)
                    through_panel(
                        w, head, panel, args.length, 1, 0, [&](int i) { return keys.at(i); },
                        [&](int i, const float* sums) { put(i, panel, sums, std::min(PANEL, w.n - panel * PANEL)); });
            };
            expand(*args.uk, [&](int i, int panel, const float* sums, int columns) {
                const size_t at = size_t(i) * args.d + panel * PANEL;
                if (args.wide) std::memcpy(reinterpret_cast<float*>(k) + at, sums, size_t(columns) * 4);
                else split(sums, columns, 1, 0, reinterpret_cast<bf16*>(k) + at);
            });
            expand(*args.uv, [&](int i, int panel, const float* sums, int) {
                uint8_t* to =
                    v + i / KEYS * block + panel * value_panel_bytes(args.wide) + i % KEYS / (args.wide ? 1 : 2) * 256;
                if (args.wide) std::memcpy(to, sums, 256);
                else
                    for (int j = 0; j < PANEL; j += LANES, to += 64) {
                        const U value = rounded(load(sums + j));
                        store(reinterpret_cast<float*>(to),
                              (V)(i % 2 ? value | (U)load(reinterpret_cast<float*>(to)) : value >> 16));
                    }
            });
            for (int i = 0; i < args.length; i++)
                std::memcpy(k + (size_t(i) * args.d + nope) * size, keys.at(i) + size_t(rank) * size,
                            size_t(rope) * size);
            keys = {k, nullptr, 0, 0, int64_t(args.d) * size, 1};
        }
        for (int first = 0; first < args.rows; first += LANES) {
            const int lanes = std::min(LANES, args.rows - first);
            I limit{};
            for (int lane = 0; lane < LANES; lane++) limit[lane] = start + first + std::min(lane, lanes - 1) + 1;
            Lanes s = lanes_for(args.d, args.e, args.wide, args.scale, limit, [&](int lane) {
                return lane < lanes ? args.q + (size_t(first + lane) * args.heads + head) * args.d : nullptr;
            });
            s.panels = v;
            restart(s, own_scratch[2].take<float>(size_t(LANES) * s.width));
            attend(s, keys, values, 0, start + first + lanes);
            for (int lane = 0; lane < lanes; lane++)
                for (int j = 0; j < args.e; j++)
                    args.out[(size_t(first + lane) * args.heads + head) * args.e + j] =
                        s.out[size_t(lane) * s.width + j] / s.total[lane];
        }
    });
}

// Scores of sparse attention: the heads of a query are the lanes, keys are the rows. -inf for keys yet to come.
template <bool WIDE> void index_scores(const IndexArgs& args) {
    constexpr int KIND = WIDE ? F32 : BF16, UNIT = WIDE ? 1 : 2, SLICE = 512;
    const int panels = ceil_div(args.heads, PANEL), slices = ceil_div(args.length, SLICE);
    const size_t panel = panel_bytes(KIND, args.d), row_bytes = size_t(args.d) * (WIDE ? 4 : 2);
    const Rows keys{static_cast<const uint8_t*>(args.keys),
                    args.table,
                    int64_t(row_bytes) * args.page_size,
                    0,
                    int64_t(row_bytes),
                    args.page_size};
    pool().run(args.threads, args.rows * slices, [&](int task) {
        const int row = task / slices, begin = task % slices * SLICE, end = std::min(args.length, begin + SLICE);
        const int seen = std::max(begin, std::min(end, args.length - args.rows + row + 1));
        float* out = args.out + size_t(row) * args.length;
        std::fill(out + seen, out + end, -INFINITY);
        if (seen == begin) return;
        uint8_t* packed = own_scratch[0].take<uint8_t>(panel * panels);
        std::memset(packed, 0, panel * panels);
        float* weight = own_scratch[1].take<float>(size_t(panels) * PANEL);
        std::fill(weight, weight + panels * PANEL, 0.f);
        for (int head = 0; head < args.heads; head++) {
            const float* q = args.q + (size_t(row) * args.heads + head) * args.d;
            uint8_t* to = packed + head / PANEL * panel;
            const int lane = head % PANEL;
            for (int j = 0; j < args.d; j++) {
                if (WIDE) reinterpret_cast<float*>(to)[j * PANEL + lane] = q[j];
                else reinterpret_cast<bf16*>(to)[j / UNIT * 2 * PANEL + lane * 2 + j % UNIT] = round_bf16(q[j]);
            }
            weight[head] = args.weight[size_t(row) * args.heads + head];
        }
        for (int first = begin; first < seen; first += MAX_ROWS) {
            const int count = std::min(MAX_ROWS, seen - first);
            const uint8_t* a[MAX_ROWS];
            for (int i = 0; i < MAX_ROWS; i++) a[i] = keys.at(first + std::min(i, count - 1));
            V total[MAX_ROWS] = {};
            for (int p = 0; p < panels; p++) {
                alignas(64) float sums[MAX_ROWS * PANEL];
                tile<KIND, MAX_ROWS, 4, 1>(a, 0, packed + p * panel, args.d, nullptr, sums, packed);
                for (int i = 0; i < count; i++)
                    for (int v = 0; v < PANEL; v += LANES)
                        total[i] = fma(max(V{}, load(sums + i * PANEL + v)), load(weight + p * PANEL + v), total[i]);
            }
            for (int i = 0; i < count; i++) {
                float sum = 0;
                for (int lane = 0; lane < LANES; lane++) sum += total[i][lane];
                out[first + i] = sum;
            }
        }
    });
}
void index_scores(const IndexArgs& args) { args.wide ? index_scores<true>(args) : index_scores<false>(args); }
