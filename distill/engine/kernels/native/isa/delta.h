// Layers with a gated delta rule (`delta_rule` in reference_delta.py), and the gate of gated attention.
// Part of isa.h, within the namespace of one instruction set.
//
// A token at a time: sums run over keys in order, with values along the lanes, so that a result depends neither on the
// chunk nor on the batch. Tasks are heads of sequences. A head's matrix is read twice for each token, 64 values at a time,
// of which the second time comes from the cache.

// The tokens of a sequence through the convolution and its activation, for some channels, and the inputs that it keeps.
INLINE void delta_convolve(const DeltaArgs& args, int sequence, int begin, int end, float* mixed) {
    const int64_t first = args.first[sequence], count = args.first[sequence + 1] - first;
    const int kept = args.taps - 1, n = args.channels;
    float* state = args.conv_state + args.slot[sequence] * kept * n;
    if (args.fresh[sequence])
        for (int i = 0; i < kept; i++) std::memset(state + size_t(i) * n + begin, 0, size_t(end - begin) * 4);
    const auto input = [&](int64_t token) { // before the first one: what the sequence left
        return token < 0 ? state + (kept + token) * n : args.qkv + args.row[first + token] * n;
    };
    for (int64_t token = 0; token < count; token++) {
        float* out = mixed + args.row[first + token] * n;
        for (int j = begin; j < end; j += LANES) {
            const int some = std::min(LANES, end - j);
            V sum{};
            for (int tap = 0; tap <= kept; tap++)
                sum = fma(load_some(args.conv + size_t(tap) * n + j, some),
                          load_some(input(token - kept + tap) + j, some), sum);
            store_some(out + j, sum * sigmoid(sum), some);
        }
    }
    for (int i = 0; i < kept; i++) // ascending: what is read is never older than what is written
        if (const float* from = input(count - kept + i); from != state + size_t(i) * n)
            std::memcpy(state + size_t(i) * n + begin, from + begin, size_t(end - begin) * 4);
}

// One token for COUNT vectors of values, the last with `some` of them: decay, correct, read.
template <int COUNT>
INLINE void delta_values(float* state, int d, int e, int some, const float* k, const float* q, const float* v,
                         float decay, float strength, float* out) {
    const auto lanes = [&](int c) { return c + 1 < COUNT ? LANES : some; };
    V known[COUNT]{}, read[COUNT]{}, step[COUNT];
    for (int i = 0; i < d; i++)
        for (int c = 0; c < COUNT; c++) {
            float* at = state + size_t(i) * e + c * LANES;
            const V s = load_some(at, lanes(c)) * all(decay);
            store_some(at, s, lanes(c));
            known[c] = fma(s, all(k[i]), known[c]);
        }
    for (int c = 0; c < COUNT; c++) step[c] = (load_some(v + c * LANES, lanes(c)) - known[c]) * all(strength);
    for (int i = 0; i < d; i++)
        for (int c = 0; c < COUNT; c++) {
            float* at = state + size_t(i) * e + c * LANES;
            const V s = fma(all(k[i]), step[c], load_some(at, lanes(c)));
            store_some(at, s, lanes(c));
            read[c] = fma(s, all(q[i]), read[c]);
        }
    for (int c = 0; c < COUNT; c++) store_some(out + c * LANES, read[c], lanes(c));
}

// x · factor / |x|, as long as the root of its squares and `eps`.
INLINE void delta_unit(const float* x, int n, float factor, float* out) {
    V squares{};
    for (int j = 0; j < n; j += LANES) {
        const V some = load_some(x + j, std::min(LANES, n - j));
        squares = fma(some, some, squares);
    }
    factor /= std::sqrt(sum_of(squares) + 1e-6f);
    for (int j = 0; j < n; j++) out[j] = x[j] * factor;
}

INLINE void delta_head(const DeltaArgs& args, int sequence, int head, const float* mixed) {
    const int d = args.key_dim, e = args.value_dim, keys = args.key_heads * d, h = args.value_heads;
    const int group = head / (h / args.key_heads);
    float* state = args.state + (args.slot[sequence] * h + head) * d * e;
    if (args.fresh[sequence]) std::memset(state, 0, size_t(d) * e * 4);
    float* q = own_scratch[0].take<float>(size_t(2) * d);
    float* k = q + d;
    for (int64_t i = args.first[sequence]; i < args.first[sequence + 1]; i++) {
        const int64_t row = args.row[i];
        const float *x = mixed + row * args.channels, *v = x + 2 * keys + head * e;
        delta_unit(x + group * d, d, 1 / std::sqrt(float(d)), q);
        delta_unit(x + keys + group * d, d, 1, k);
        const float at = args.decay[row * h + head] + args.rate_bias[head];
        const float soft = at > 20 ? at : std::log1p(std::exp(at));
        const float decay = exp(all(args.rate[head] * soft))[0], strength = sigmoid(all(args.write[row * h + head]))[0];
        float* out = args.out + (row * h + head) * e;
        int j = 0;
        for (; j + 4 * LANES <= e; j += 4 * LANES)
            delta_values<4>(state + j, d, e, LANES, k, q, v + j, decay, strength, out + j);
        for (; j < e; j += LANES)
            delta_values<1>(state + j, d, e, std::min(LANES, e - j), k, q, v + j, decay, strength, out + j);
        V squares{};
        for (j = 0; j < e; j += LANES) {
            const V o = load_some(out + j, std::min(LANES, e - j));
            squares = fma(o, o, squares);
        }
        const V factor = all(1 / std::sqrt(sum_of(squares) / float(e) + args.eps));
        const float* gate = args.gate + (row * h + head) * e;
        for (j = 0; j < e; j += LANES) {
            const int some = std::min(LANES, e - j);
            const V z = load_some(gate + j, some);
            store_some(out + j, load_some(out + j, some) * factor * load_some(args.norm + j, some) * (z * sigmoid(z)),
                       some);
        }
    }
}

void delta_rule(const DeltaArgs& args) {
    constexpr int CHANNELS = 512;
    float* mixed = shared_scratch[0].take<float>(size_t(args.rows) * args.channels);
    const int parts = ceil_div(args.channels, CHANNELS);
    pool().run(args.threads, args.sequences * parts, [&](int task) {
        const int begin = task % parts * CHANNELS;
        delta_convolve(args, task / parts, begin, std::min(args.channels, begin + CHANNELS), mixed);
    });
    pool().run(args.threads, args.sequences * args.value_heads,
               [&](int task) { delta_head(args, task / args.value_heads, task % args.value_heads, mixed); });
}

void sigmoid_gate(const SigmoidGateArgs& args) {
    constexpr int64_t CHUNK = 8192;
    pool().run(args.threads, int((args.count + CHUNK - 1) / CHUNK), [&](int task) {
        const int64_t end = std::min(args.count, (task + 1) * CHUNK);
        for (int64_t j = task * CHUNK; j < end; j += LANES) {
            const int some = int(std::min<int64_t>(LANES, end - j));
            store_some(args.out + j, load_some(args.x + j, some) * sigmoid(load_some(args.gate + j, some)), some);
        }
    });
}
