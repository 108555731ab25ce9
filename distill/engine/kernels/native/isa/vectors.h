// Vectors of 16 floats, and the operations on them that the instruction sets have.
// Part of isa.h, within the namespace of one instruction set.

typedef float V __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint8_t B __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));
#define INLINE inline __attribute__((always_inline))

// Into the second level of the cache: from there the hardware brings it nearer, and the few buffers for misses of the
// first level stay free (a tenth faster than asking for the first).
INLINE void fetch(const uint8_t* p) {
#if defined(__x86_64__)
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1);
#else
    __builtin_prefetch(p, 0, 2);
#endif
}
INLINE V load(const float* p) {
    V v;
    std::memcpy(&v, p, 64);
    return v;
}
INLINE void store(float* p, V v) { std::memcpy(p, &v, 64); }
INLINE V all(float x) { return x - V{}; } // adding to zero would lose the sign of a zero, and thus be done
INLINE V fma(V a, V b, V c) {
#if LEVEL >= 2
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LEVEL == 1
    __m256 x[2], y[2], z[2];
    std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
    for (int half = 0; half < 2; half++) z[half] = _mm256_fmadd_ps(x[half], y[half], z[half]);
    std::memcpy(&c, z, 64);
    return c;
#else
    return a * b + c;
#endif
}
INLINE V max(V a, V b) { return a > b ? a : b; } // b where either is NaN

INLINE bf16 round_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bf16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
INLINE float widen(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// e^x in float32, 1 unit in the last place or so (Cody and Waite's reduction, Taylor to degree 7); 0 below e^-87.
INLINE V exp(V x) {
    const V shift = all(12582912.f);
    x = x < all(-87.f) ? all(-87.f) : x;
    x = x > all(88.f) ? all(88.f) : x;
    const V n = fma(x, all(1.44269504f), shift) - shift;
    V r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    V p = all(1.f / 5040);
    p = fma(p, r, all(1.f / 720));
    p = fma(p, r, all(1.f / 120));
    p = fma(p, r, all(1.f / 24));
    p = fma(p, r, all(1.f / 6));
    p = fma(p, r, all(.5f));
    p = fma(p, r, all(1.f));
    p = fma(p, r, all(1.f));
    const I power = (__builtin_convertvector(n, I) + 127) << 23;
    return p * (V)power;
}

// One unit of a panel as `unit_k / 2` vectors of pairs (k, k+1) for 16 outputs. Pairs are kept as 32-bit integers.
INLINE I load_pairs(const void* p) {
    I v;
    std::memcpy(&v, p, 64);
    return v;
}
INLINE void decode_codes(const uint8_t* p, I& first, I& second) {
#if LEVEL == 3
    const __m512i code = _mm512_loadu_si512(p);
    const __m512i low =
        _mm512_permutex2var_epi8(_mm512_load_si512(code_bytes.low), code, _mm512_load_si512(code_bytes.low + 64));
    __m512i high =
        _mm512_permutex2var_epi8(_mm512_load_si512(code_bytes.high), code, _mm512_load_si512(code_bytes.high + 64));
    high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(char(0x80)), 0xF8); // high | (code & sign)
    first = (I)_mm512_unpacklo_epi8(low, high);
    second = (I)_mm512_unpackhi_epi8(low, high);
#else
    alignas(64) bf16 pairs[64];
    for (int lane = 0; lane < 4; lane++)
        for (int i = 0; i < 8; i++) {
            pairs[lane * 8 + i] = code_bytes.whole[p[lane * 16 + i]];
            pairs[32 + lane * 8 + i] = code_bytes.whole[p[lane * 16 + 8 + i]];
        }
    std::memcpy(&first, pairs, 64);
    std::memcpy(&second, pairs + 32, 64);
#endif
}

// Two bfloat16 in each 32 bits, as float32.
INLINE V first_of(I pairs) { return (V)(pairs << 16); }
INLINE V second_of(I pairs) { return (V)(pairs & (I{} + int32_t(0xffff0000u))); }

// sum + w.first · x.first + w.second · x.second, for two bfloat16 in each 32 bits.
INLINE V dot2(V sum, I w, I x) {
#if LEVEL == 3
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#else
    return fma(second_of(w), second_of(x), fma(first_of(w), first_of(x), sum));
#endif
}
INLINE I pair_at(const void* p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return I{} + pair;
}
