// Drawing tokens: thresholds for top k and top p, and the inverse of the cumulative distribution.
// Part of isa.h, within the namespace of one instruction set.

// Maximum and Σ e^(x - maximum) of one row.
struct Row {
    float top;
    double total;
};
// exponentials: null, or where e^(x - maximum) is kept for all whole vectors of x.
Row softmax_of(const float* x, int n, float* exponentials) {
    V best[4] = {all(-INFINITY), all(-INFINITY), all(-INFINITY), all(-INFINITY)}; // a maximum waits for the one before
    int j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES)
        for (int i = 0; i < 4; i++) best[i] = max(best[i], load(x + j + i * LANES));
    for (; j + LANES <= n; j += LANES) best[0] = max(best[0], load(x + j));
    float top = -INFINITY;
    for (int i = 0; i < 4; i++)
        for (int lane = 0; lane < LANES; lane++) top = std::max(top, best[i][lane]);
    for (; j < n; j++) top = std::max(top, x[j]);
    double total = 0;
    V part{};
    for (j = 0; j + LANES <= n; j += LANES) {
        const V value = exp(load(x + j) - top);
        if (exponentials) store(exponentials + j, value);
        part += value;
        if (j % 4096 == 4096 - LANES) {
            for (int lane = 0; lane < LANES; lane++) total += part[lane];
            part = V{};
        }
    }
    for (int lane = 0; lane < LANES; lane++) total += part[lane];
    for (; j < n; j++) total += std::exp(x[j] - top);
    return {top, total};
}

// Where the first number is that equals `top`; n if there is none.
int first_of(const float* x, int n, float top) {
    int j = 0;
    for (; j + LANES <= n; j += LANES) {
        const I same = load(x + j) == all(top);
        int any = 0;
        for (int lane = 0; lane < LANES; lane++) any |= same[lane];
        if (any) break;
    }
    return int(std::find(x + j, x + n, top) - x);
}

// The largest of some probabilities (at most 1): how many, their mass, and the smallest of them.
struct Taken {
    float last;
    size_t count;
    double mass;
};

// Those that come before `most` are taken or their mass reaches `target`. Nothing is sorted but the bucket in which that
// happens, buckets being the upper bits of the numbers: a flat distribution has tens of thousands of candidates.
Taken take(const std::vector<float>& from, size_t most, double target) {
    constexpr int SHIFT = 17, BUCKETS = (0x3F800000 >> SHIFT) + 1;
    static thread_local std::vector<double> mass;
    static thread_local std::vector<size_t> count;
    static thread_local std::vector<float> some;
    const auto bucket = [](float p) {
        uint32_t bits;
        std::memcpy(&bits, &p, 4);
        return std::min(int(bits >> SHIFT), BUCKETS - 1);
    };
    mass.assign(BUCKETS, 0);
    count.assign(BUCKETS, 0);
    for (float p : from) {
        mass[bucket(p)] += p;
        count[bucket(p)]++;
    }
    Taken taken{0, 0, 0};
    int whole = -1; // the last bucket, if all of it was taken
    for (int b = BUCKETS - 1; b >= 0 && (!taken.count || (taken.count < most && taken.mass < target)); b--) {
        if (!count[b]) continue;
        if (taken.count + count[b] < most && taken.mass + mass[b] < target) {
            taken.count += count[b];
            taken.mass += mass[b];
            whole = b;
            continue;
        }
        whole = -1;
        some.clear();
        for (float p : from)
            if (bucket(p) == b) some.push_back(p);
        std::sort(some.begin(), some.end(), std::greater<float>());
        for (float p : some) {
            if (taken.count && (taken.count >= most || !(taken.mass < target))) break;
            taken.count++;
            taken.mass += p;
            taken.last = p;
        }
    }
    if (whole >= 0) {
        taken.last = INFINITY;
        for (float p : from)
            if (bucket(p) == whole) taken.last = std::min(taken.last, p);
    }
    return taken;
}

// The smallest of the probabilities p (unnormalised, the largest is 1) that top k, then top p let through.
float threshold(const float* p, int n, double total, int64_t top_k, double top_p, std::vector<float>& best) {
    const size_t k = top_k > 0 ? size_t(std::min<int64_t>(top_k, n)) : size_t(n);
    for (float floor = 1.f / 256;; floor = floor > 1e-30f ? floor / 4096 : -1.f) {
        best.clear();
        for (int j = 0; j < n; j += LANES) { // padded with zeros
            const I some = load(p + j) >= floor;
            int any = 0;
            for (int lane = 0; lane < LANES; lane++) any |= some[lane];
            if (any)
                for (int lane = 0; lane < std::min(LANES, n - j); lane++)
                    if (p[j + lane] >= floor) best.push_back(p[j + lane]);
        }
        const bool everything = best.size() == size_t(n);
        if (best.size() < k && k < size_t(n) && !everything) continue;
        const size_t among = std::min(k, best.size());
        if (best.size() > 1024) {
            const double of_k = k < size_t(n) ? take(best, among, INFINITY).mass : total;
            const Taken taken = take(best, among, top_p < 1 ? top_p * of_k : INFINITY);
            if (taken.count < best.size() || among == k || everything) return taken.last;
            continue;
        }
        std::sort(best.begin(), best.end(), std::greater<float>());
        double mass = total;
        if (k < size_t(n)) {
            mass = 0;
            for (size_t i = 0; i < among; i++) mass += best[i];
        }
        double before = 0;
        size_t kept = 0;
        do before += best[kept++];
        while (kept < among && (top_p >= 1 || before < top_p * mass));
        if (kept < best.size() || among == k || everything) return best[kept - 1]; // else more may be let through
    }
}

// Tokens in blocks of this many, whose probabilities are summed to find the block of a draw.
constexpr int DRAW_BLOCK = 256;

// The probabilities of a row, p = e^((x - top) / temperature), zeros behind the last. known: p holds e^(x - top) for
// whole vectors.
void probabilities(const float* x, int n, float top, float temperature, bool known, float* p) {
    for (int j = 0; j < n; j += LANES) {
        V logit = all(-INFINITY);
        if (j + LANES <= n) logit = load(x + j);
        else std::memcpy(&logit, x + j, size_t(n - j) * 4);
        const V value = known && j + LANES <= n ? load(p + j) : exp((logit - top) / temperature);
        store(p + j, logit > all(-INFINITY) ? value : V{});
    }
}

// Set probabilities below `least` to zero; the sum of each block, and their sum.
double block_sums(float* p, int n, float least, double* sums) {
    typedef float F __attribute__((vector_size(32)));
    typedef double D __attribute__((vector_size(64)));
    double kept = 0;
    for (int begin = 0; begin < n; begin += DRAW_BLOCK) {
        D sum[2] = {};
        for (int j = begin; j < std::min(n, begin + DRAW_BLOCK); j += LANES) {
            const V value = load(p + j), some = value >= all(least) ? value : V{};
            store(p + j, some);
            F half[2];
            std::memcpy(half, &some, 64);
            for (int i = 0; i < 2; i++) sum[i] += __builtin_convertvector(half[i], D);
        }
        double total = 0;
        for (int lane = 0; lane < 8; lane++) total += sum[0][lane] + sum[1][lane];
        sums[begin / DRAW_BLOCK] = total;
        kept += total;
    }
    return kept;
}

void draw(const DrawArgs& args) {
    const int n = args.vocabulary, padded = ceil_div(n, LANES) * LANES;
    pool().run(args.threads, args.draws, [&](int index) {
        const float* x = args.logits + size_t(args.row[index]) * n;
        const float temperature = args.temperature[index];
        float* p = own_scratch[0].take<float>(size_t(padded));
        const Row raw = softmax_of(x, n, temperature == 1 ? p : nullptr);
        if (!std::isfinite(raw.total)) { // a NaN, an infinity, or nothing but -inf: no distribution
            args.token[index] = 0;
            args.logprob[index] = NAN;
            return;
        }
        int token = -1;
        if (temperature > 0) {
            probabilities(x, n, raw.top, temperature, temperature == 1, p);
            float least = 0;
            if (args.top_k[index] > 0 || args.top_p[index] < 1) {
                static thread_local std::vector<float> best;
                double total = 0;
                for (int j = 0; j < n; j += LANES) {
                    float sum = 0;
                    for (int lane = 0; lane < LANES; lane++) sum += p[j + lane];
                    total += sum;
                }
                least = threshold(p, n, total, args.top_k[index], args.top_p[index], best);
            }
            // The cumulative distribution in vocabulary order, by blocks.
            double* sums = own_scratch[1].take<double>(size_t(ceil_div(n, DRAW_BLOCK)));
            const double aim = args.uniform[index] * block_sums(p, n, least, sums);
            double before = 0;
            int block = 0;
            while ((block + 1) * DRAW_BLOCK < n && before + sums[block] <= aim) before += sums[block++];
            for (int j = block * DRAW_BLOCK; j < n; j++) {
                if (p[j] > 0) token = j; // if rounding leaves nothing past the aim, the last one that is possible
                before += p[j];
                if (before > aim && p[j] > 0) break;
            }
            for (int j = block * DRAW_BLOCK; token < 0; j--)
                if (p[j] > 0) token = j;
        } else {
            token = first_of(x, n, raw.top);
        }
        args.token[index] = token;
        args.logprob[index] = float(double(x[token]) - raw.top - std::log(raw.total));
    });
}

// A token and its logit, or its log-probability. The likelier one comes first, of equals the one of the lower id.
struct Candidate {
    float value;
    int32_t id;
    bool operator<(const Candidate& other) const { return value != other.value ? value > other.value : id < other.id; }
};

// Bits of the lanes whose numbers are at least some other.
INLINE uint32_t at_least(V v, V least) {
#if LEVEL >= 2
    return _mm512_cmp_ps_mask((__m512)v, (__m512)least, _CMP_GE_OQ);
#else
    const I passes = v >= least;
    uint32_t bits = 0;
    for (int lane = 0; lane < LANES; lane++) bits |= uint32_t(passes[lane] & 1) << lane;
    return bits;
#endif
}

// The k largest numbers of a row, in order. The row is dealt out to some 2k groups: the k-th largest of their maxima is
// at most the k-th largest number, and few others reach it.
void largest(const float* x, int n, int k, std::vector<Candidate>& kept) {
    static thread_local std::vector<float> maxima;
    kept.clear();
    if (!k) return;
    const int sets = ceil_div(2 * k, LANES), whole = n / LANES * LANES;
    float least = -INFINITY;
    if (whole >= 2 * sets * LANES) {
        maxima.assign(size_t(sets) * LANES, -INFINITY);
        for (int j = 0, set = 0; j < whole; j += LANES, set = set + 1 < sets ? set + 1 : 0) {
            float* own = maxima.data() + set * LANES;
            store(own, max(load(x + j), load(own)));
        }
        std::nth_element(maxima.begin(), maxima.begin() + (k - 1), maxima.end(), std::greater<float>());
        least = maxima[size_t(k - 1)];
    }
    for (int j = 0; j < whole; j += LANES)
        for (uint32_t bits = at_least(load(x + j), all(least)); bits; bits &= bits - 1) {
            const int id = j + __builtin_ctz(bits);
            kept.push_back({x[id], id});
        }
    for (int id = whole; id < n; id++)
        if (x[id] >= least) kept.push_back({x[id], id});
    const size_t count = std::min(size_t(k), kept.size()); // fewer only where some are no numbers
    std::nth_element(kept.begin(), kept.begin() + int64_t(count), kept.end());
    kept.resize(count);
    std::sort(kept.begin(), kept.end());
    kept.resize(size_t(k), {-INFINITY, 0});
}

void likeliest(const LikeliestArgs& args) {
    constexpr int CHUNK = 4;
    pool().run(args.threads, ceil_div(args.rows, CHUNK), [&](int task) {
        static thread_local std::vector<Candidate> best, further;
        const int n = args.vocabulary, width = args.k + args.given_count;
        for (int row = task * CHUNK; row < std::min(args.rows, (task + 1) * CHUNK); row++) {
            const float *x = args.logits + size_t(row) * n, normaliser = args.normaliser[row];
            largest(x, n, args.k, best);
            further.clear();
            for (int i = 0; i < args.given_count; i++) {
                const int32_t id = int32_t(args.given[size_t(row) * args.given_count + i]);
                if (id < 0) continue;
                const auto same = [&](const Candidate& other) { return other.id == id; };
                // All that come before the last of the likeliest are among these.
                const bool listed = !best.empty() && !(best.back() < Candidate{x[id], id});
                if (!listed && std::none_of(further.begin(), further.end(), same)) further.push_back({x[id], id});
            }
            for (Candidate& each : further) each.value -= normaliser;
            std::stable_sort(further.begin(), further.end(), [](auto& a, auto& b) { return a.value > b.value; });
            int32_t* id = args.id + size_t(row) * width;
            float* logprob = args.logprob + size_t(row) * width;
            const auto put = [&](int32_t token, float value) {
                *logprob++ = value;
                *id++ = value > -INFINITY ? token : 0;
            };
            for (const Candidate& each : best) put(each.id, each.value - normaliser);
            for (const Candidate& each : further) put(each.id, each.value);
            for (int i = args.k + int(further.size()); i < width; i++) put(0, -INFINITY);
        }
    });
}
