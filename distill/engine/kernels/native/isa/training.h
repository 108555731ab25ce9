// Element-wise ops of a training step, each in one pass forward and one backward, on float32 or bfloat16 rows.
// Part of isa.h, within the namespace of one instruction set.
//
// All arithmetic is in float32; results are rounded once. Sums run in an order that does not depend on the threads.

// The first n numbers of a vector: with masks where the machine has them, as a copy of a few bytes is a call.
template <class T, class X> INLINE void load_first(const T* p, int n, X& v) {
    if (n >= LANES) std::memcpy(&v, p, LANES * sizeof(T));
#if LEVEL >= 2
    else if constexpr (sizeof(T) == 4) v = (X)_mm512_maskz_loadu_epi32(__mmask16((1u << n) - 1), p);
    else v = (X)_mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
#else
    else std::memcpy(&v, p, size_t(n) * sizeof(T));
#endif
}
template <class T, class X> INLINE void store_first(T* p, const X& v, int n) {
    if (n >= LANES) std::memcpy(p, &v, LANES * sizeof(T));
#if LEVEL >= 2
    else if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(p, __mmask16((1u << n) - 1), (__m512i)v);
    else _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), (__m256i)v);
#else
    else std::memcpy(p, &v, size_t(n) * sizeof(T));
#endif
}
// n numbers; the lanes after them are zero.
INLINE V load_some(const float* p, int n) {
    V v{};
    load_first(p, n, v);
    return v;
}
INLINE V load_some(const bf16* p, int n) {
    H bits{};
    load_first(p, n, bits);
    return (V)(__builtin_convertvector(bits, U) << 16);
}
INLINE void store_some(float* p, V v, int n) { store_first(p, v, n); }
INLINE void store_some(bf16* p, V v, int n) {
    const U bits = (U)v;
    const U rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const H out = __builtin_convertvector(v == v ? rounded : U{} + 0x7fc0, H);
    store_first(p, out, n);
}
// Of the lanes: halves onto each other, the same order on every machine.
INLINE float sum_of(V v) {
    float lane[LANES];
    store(lane, v);
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}
INLINE float largest_of(V v) {
    float lane[LANES];
    store(lane, v);
    for (int half = LANES / 2; half; half /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
    return lane[0];
}
// v, and `other` from lane n on.
INLINE V with_rest(V v, int n, float other) {
    I lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    return lane < I{} + n ? v : all(other);
}
INLINE V sigmoid(V x) { return all(1.f) / (all(1.f) + exp(-x)); }

template <class X, class Y> void norm_row(const TrainNormArgs& args, int row) {
    const X* x = static_cast<const X*>(args.x) + int64_t(row) * args.c;
    Y* out = static_cast<Y*>(args.out) + int64_t(row) * args.c;
    V squares{};
    for (int j = 0; j < args.c; j += LANES) {
        const V v = load_some(x + j, args.c - j);
        squares = fma(v, v, squares);
    }
    const float factor = 1 / std::sqrt(sum_of(squares) / float(args.c) + args.eps);
    args.factor[row] = factor;
    for (int j = 0; j < args.c; j += LANES) {
        const V v = load_some(x + j, args.c - j) * all(factor);
        store_some(out + j, v * load_some(args.weight + j, args.c - j), args.c - j);
    }
}
// dx = factor (w dy − x factor² Σ(w dy x) / c), plus `residual`; the row adds dy x factor to its slice of the weight's
// gradient.
template <class X, class Y> void norm_row_backward(const TrainNormArgs& args, int row, float* weight_gradient) {
    const int64_t at = int64_t(row) * args.c;
    const X *x = static_cast<const X*>(args.x) + at, *residual = static_cast<const X*>(args.residual);
    const Y* gradient = static_cast<const Y*>(args.out) + at;
    X* x_gradient = static_cast<X*>(args.x_gradient) + at;
    const float factor = args.factor[row];
    V dots{};
    for (int j = 0; j < args.c; j += LANES) {
        const int n = args.c - j;
        const V dy = load_some(gradient + j, n), v = load_some(x + j, n);
        dots = fma(dy * load_some(args.weight + j, n), v, dots);
        store_some(weight_gradient + j, fma(dy, v * all(factor), load_some(weight_gradient + j, n)), n);
    }
    const V pull = all(-factor * factor * sum_of(dots) / float(args.c));
    for (int j = 0; j < args.c; j += LANES) {
        const int n = args.c - j;
        const V dy = load_some(gradient + j, n) * load_some(args.weight + j, n);
        V dx = all(factor) * fma(load_some(x + j, n), pull, dy);
        if (residual) dx = dx + load_some(residual + at + j, n);
        store_some(x_gradient + j, dx, n);
    }
}
template <class X, class Y> void norm_rows(const TrainNormArgs& args) {
    team().run(args.threads, ceil_div(args.rows, TRAIN_CHUNK), [&](int task) {
        float* slice = args.weight_gradient + int64_t(task) * args.c;
        if (args.backward) std::fill(slice, slice + args.c, 0.f);
        for (int row = task * TRAIN_CHUNK; row < std::min(args.rows, (task + 1) * TRAIN_CHUNK); row++)
            args.backward ? norm_row_backward<X, Y>(args, row, slice) : norm_row<X, Y>(args, row);
    });
}
void train_norm(const TrainNormArgs& args) {
    if (args.x_half) norm_rows<bf16, bf16>(args);
    else if (args.out_half) norm_rows<float, bf16>(args);
    else norm_rows<float, float>(args);
}

// silu(gate) · up; backward: `out` holds the gradient and is replaced by the product, the gradients of gate and up
// go to `gradient`.
template <class T> void gate_rows(const TrainGateArgs& args) {
    team().run(args.threads, ceil_div(args.rows, TRAIN_CHUNK), [&](int task) {
        for (int row = task * TRAIN_CHUNK; row < std::min(args.rows, (task + 1) * TRAIN_CHUNK); row++) {
            const T* gate = static_cast<const T*>(args.both) + int64_t(row) * 2 * args.n;
            T* out = static_cast<T*>(args.out) + int64_t(row) * args.n;
            T* gradient = static_cast<T*>(args.gradient) + int64_t(row) * 2 * args.n;
            for (int j = 0; j < args.n; j += LANES) {
                const int n = args.n - j;
                const V g = load_some(gate + j, n), u = load_some(gate + args.n + j, n), s = sigmoid(g), act = g * s;
                if (args.backward) {
                    const V d = load_some(out + j, n);
                    store_some(gradient + j, d * u * s * (all(1.f) + g - act), n);
                    store_some(gradient + args.n + j, d * act, n);
                }
                store_some(out + j, act * u, n);
            }
        }
    });
}
void train_gate(const TrainGateArgs& args) { args.half ? gate_rows<bf16>(args) : gate_rows<float>(args); }

// Rotate heads of x into out: pair i is (x[i], x[i + r]); backward turns the other way.
template <class T> void turn_rows(const TrainRopeArgs& args) {
    team().run(args.threads, ceil_div(args.rows, TRAIN_CHUNK), [&](int task) {
        for (int row = task * TRAIN_CHUNK; row < std::min(args.rows, (task + 1) * TRAIN_CHUNK); row++)
            for (int head = 0; head < args.heads; head++) {
                const T* x = static_cast<const T*>(args.x) + row * args.x_row + head * args.x_head;
                T* out = static_cast<T*>(args.out) + row * args.out_row + head * args.out_head;
                for (int j = 0; j < args.r; j += LANES) {
                    const int n = args.r - j;
                    const V cos = load_some(args.cos + int64_t(row) * args.r + j, n);
                    const V turn = load_some(args.sin + int64_t(row) * args.r + j, n);
                    const V sin = args.backward ? -turn : turn;
                    const V a = load_some(x + j, n), b = load_some(x + args.r + j, n);
                    store_some(out + j, a * cos - b * sin, n);
                    store_some(out + args.r + j, b * cos + a * sin, n);
                }
            }
    });
}
void train_rope(const TrainRopeArgs& args) { args.half ? turn_rows<bf16>(args) : turn_rows<float>(args); }

// Causal softmax of scale · scores in place: query i of a row sees keys 0 … i of `width`, the others become 0. A matrix
// [queries · heads, width] has the heads of a query below each other, and begins with query `first`.
// backward: `gradient` of the probabilities becomes that of the scores.
template <class T> void softmax_rows(const TrainSoftmaxArgs& args) {
    team().run(args.threads, ceil_div(args.rows, TRAIN_CHUNK), [&](int task) {
        for (int row = task * TRAIN_CHUNK; row < std::min(args.rows, (task + 1) * TRAIN_CHUNK); row++) {
            T* p = static_cast<T*>(args.scores) + int64_t(row) * args.width;
            const int keys = args.first + row / args.heads % args.queries + 1;
            if (args.backward) {
                T* d = static_cast<T*>(args.gradient) + int64_t(row) * args.width;
                V dots{};
                for (int j = 0; j < keys; j += LANES)
                    dots = fma(load_some(p + j, keys - j), load_some(d + j, keys - j), dots);
                const V mean = all(sum_of(dots));
                for (int j = 0; j < keys; j += LANES) {
                    const int n = keys - j;
                    store_some(d + j, all(args.scale) * load_some(p + j, n) * (load_some(d + j, n) - mean), n);
                }
                std::fill(d + keys, d + args.width, T(0));
                continue;
            }
            V most = all(-INFINITY);
            for (int j = 0; j < keys; j += LANES)
                most = max(with_rest(load_some(p + j, keys - j), keys - j, -INFINITY), most);
            const V shift = all(largest_of(most) * args.scale);
            V sums{};
            for (int j = 0; j < keys; j += LANES) {
                const V e = exp(fma(load_some(p + j, keys - j), all(args.scale), -shift));
                store_some(p + j, e, keys - j);
                sums = sums + with_rest(e, keys - j, 0);
            }
            const V share = all(1 / sum_of(sums));
            for (int j = 0; j < keys; j += LANES) store_some(p + j, load_some(p + j, keys - j) * share, keys - j);
            std::fill(p + keys, p + args.width, T(0));
        }
    });
}
void train_softmax(const TrainSoftmaxArgs& args) { args.half ? softmax_rows<bf16>(args) : softmax_rows<float>(args); }
