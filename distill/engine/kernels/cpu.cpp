// Kernels for CPUs, behind a plain C interface: no torch header, so that one build serves every torch.
//
// One layout carries everything. A matrix [n, k] is packed into panels of 64 outputs; inside a panel the outputs lie in
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
//
// Attention is the same product twice. 16 queries lie in the lanes (the heads that share a key in decoding, consecutive
// tokens in prefill), keys are the rows; softmax is online over blocks of 64 keys at fixed positions.
//
// The file includes itself once for each instruction set; `kernels()` picks one at run time.
#ifndef ISA

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <mutex>
#include <pthread.h>
#include <sstream>
#include <string>
#include <thread>
#include <type_traits>
#include <unistd.h>
#include <vector>
// Instruction sets past the portable one are chosen function by function, which is written differently for other compilers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define X86_LEVELS
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

enum Kind { FP8 = 0, BF16 = 1, F32 = 2 };
constexpr int PANEL = 64, LANES = 16, BLOCK = 128, KEYS = 64;
using bf16 = uint16_t;

// A packed matrix, or `groups` of equal ones, one after the other. scale: [groups][panels][⌈k/128⌉], FP8 only.
struct Packed {
    int32_t kind, n, k, groups;
    const uint8_t* data;
    const float* scale;
};

inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int unit_k(int kind) { return kind == FP8 ? 4 : kind == BF16 ? 2 : 1; }
inline int padded_k(int k) { return ceil_div(k, 4) * 4; }
inline int panels_of(int n) { return ceil_div(n, PANEL); }
inline size_t panel_bytes(int kind, int k) { return size_t(ceil_div(k, unit_k(kind))) * 4 * 64; }

// ---------------------------------------------------------------- threads

// Workers spin for a moment after each job, because the next one usually comes within microseconds, then sleep. The
// caller works too and waits only for workers that have begun: one that the system keeps off its core stalls nobody.
class Pool {
  public:
    template <class F> void run(int threads, int tasks, F&& body) {
        threads = std::min(threads, tasks);
        if (threads <= 1) {
            for (int task = 0; task < tasks; task++) body(task);
            return;
        }
        while (int(workers_.size()) < threads - 1) {
            const int index = int(workers_.size());
            workers_.emplace_back([this, index] { work(index); });
            workers_.back().detach();
        }
        body_ = [](void* f, int task) { (*static_cast<std::remove_reference_t<F>*>(f))(task); };
        context_ = &body;
        tasks_ = tasks;
        next_.store(0);
        helpers_.store(threads - 1);  // opens the job
        jobs_.fetch_add(1);
        if (sleeping_.load()) jobs_.notify_all();
        take();
        helpers_.store(0);
        while (inside_.load()) pause();
    }

    // A forked child has none of its parent's threads.
    void forget() {
        new (&workers_) std::vector<std::thread>();
        sleeping_.store(0);
        inside_.store(0);
    }

  private:
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    void take() {
        for (int task; (task = next_.fetch_add(1)) < tasks_;) body_(context_, task);
    }
    void work(int index) {
        unsigned seen = 0;
        for (;;) {
            unsigned now;
            for (int spin = 0; (now = jobs_.load()) == seen && spin < 20000; spin++) pause();
            if (now == seen) {
                sleeping_.fetch_add(1);
                jobs_.wait(seen);
                sleeping_.fetch_sub(1);
                continue;
            }
            seen = now;
            inside_.fetch_add(1);  // from here on the caller waits, if the job is still open
            if (index < helpers_.load()) take();
            inside_.fetch_sub(1);
        }
    }

    std::vector<std::thread> workers_;
    std::atomic<unsigned> jobs_{0};
    std::atomic<int> next_{0}, helpers_{0}, inside_{0}, sleeping_{0};
    int tasks_ = 0;
    void (*body_)(void*, int) = nullptr;
    void* context_ = nullptr;
};

Pool& pool() {
    static Pool* one = [] {
        static Pool* made = new Pool;  // never destroyed: its workers outlive main's statics
        pthread_atfork(nullptr, nullptr, [] { made->forget(); });
        return made;
    }();
    return *one;
}
std::mutex one_caller;  // the pool and the scratch below serve one call at a time

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
thread_local Scratch own_scratch[6];

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

// Where the cached keys or values of one sequence and key-value head lie.
struct Rows {
    const uint8_t* base;      // the pool, or the first row
    const int64_t* table;     // page numbers; null: rows follow each other
    int64_t page_bytes, head_bytes, row_bytes;
    int page_size;
    const uint8_t* at(int token) const {
        if (!table) return base + token * row_bytes;
        return base + table[token / page_size] * page_bytes + head_bytes + (token % page_size) * row_bytes;
    }
    // Where `count` tokens lie, from `first` on.
    void find(int first, int count, const uint8_t** rows) const {
        for (int i = 0; i < count;) {
            const uint8_t* row = at(first + i);
            const int end = table ? std::min(count, i + page_size - (first + i) % page_size) : count;
            for (; i < end; i++, row += row_bytes) rows[i] = row;
        }
    }
};

}  // namespace

// Arguments of the ops, laid out alike in cpu_structs.py.
// A row-major matrix to pack: in memory, or (fd ≥ 0) at a file's offset, rows without gaps. out: null to look at it only.
struct PackJob {
    const uint8_t* source;
    int64_t row_stride, offset;
    uint8_t* out;
    int32_t fd, kind, n, k;
};

struct LinearArgs {
    const float* x;
    int64_t x_stride, x_group;      // between rows, and between the groups of a row
    const Packed* w;
    const float* bias;              // [groups · n] or null
    float* out;
    int64_t out_stride, out_group;
    int32_t rows, parts, add, threads;  // add: to what `out` holds
};

struct ExpertsArgs {
    const float* x;          // [tokens, c]
    const int64_t* expert;   // [tokens, per_token]
    const float* weight;     // likewise
    const Packed* gate;      // one per expert
    const Packed* up;
    const Packed* down;
    const Packed* shared_gate;  // null: no shared expert
    const Packed* shared_up;
    const Packed* shared_down;
    float* out;              // [tokens, c]
    int32_t tokens, per_token, experts, parts, add, threads;
};

struct DecodeArgs {
    const float* q;          // [rows, heads, d]
    const void* k;           // pools [pages, kv_heads, page_size, width]
    const void* v;
    const int64_t* table;    // [rows, table_stride]
    const int64_t* length;   // [rows]
    float* out;              // [rows, heads, e]
    int64_t table_stride;
    int32_t table_width, pages, rows, heads, kv_heads, d, e, k_width, v_width, page_size, wide, threads;  // wide: pools are float32
    float scale;
};

struct PrefillArgs {
    const float* q;          // [rows, heads, d]: the last `rows` of `length` positions
    const void* k;
    const void* v;           // GQA: pools as above. MLA: v is null, k the pool of latents
    const int64_t* table;    // [pages]
    const Packed* uk;        // MLA: groups = heads, [nope, latent] and [e, latent]
    const Packed* uv;
    float* out;              // [rows, heads, e]
    int32_t table_width, pages, rows, length, heads, kv_heads, d, e, k_width, v_width, page_size, wide, threads;
    float scale;
};

struct IndexArgs {
    const float* q;          // [rows, heads, d]: the last `rows` of `length` positions
    const float* weight;     // [rows, heads]
    const void* keys;        // pool [pages, 1, page_size, d]
    const int64_t* table;    // [pages]
    float* out;              // [rows, length]
    int32_t table_width, pages, rows, length, heads, d, page_size, wide, threads, unused;
};

struct RouteArgs {
    const float* logits;     // [tokens, experts]
    const float* bias;       // [experts] or null; moves the choice, never the weight
    int64_t* expert;         // [tokens, per_token], best first
    float* weight;
    int32_t tokens, experts, groups, groups_kept, per_token, softmax, group_by_best, normalise;
    float factor;
    int32_t threads;
};

struct RopeArgs {
    const float* x;          // [rows, heads, 2r]
    int64_t x_row, x_head;   // strides
    const float* cos;        // [rows, r]
    const float* sin;
    float* out;
    int64_t out_row, out_head;
    int32_t rows, heads, r, interleaved, threads, unused;
};

struct WriteArgs {
    uint8_t* pool;           // [pages, heads, page_size, width]
    const int64_t* page;     // [rows]
    const int64_t* offset;
    const float* x;          // [rows, heads, width]
    int64_t x_row, x_head;
    int32_t pages, rows, heads, width, page_size, wide;
};

struct NormArgs {
    const float* x;
    int64_t x_stride;
    const float* weight;
    float* out;
    int64_t out_stride;
    int32_t rows, c;
    float eps;
    int32_t threads;
};

// A layer with latent attention, and where its intermediate results are computed for rows that decode.
struct LayerArgs {
    const float *attention_norm, *q_norm, *kv_norm, *mlp_norm, *correction;
    const Packed *q_a, *q, *kv_a, *absorb, *expand_v, *o;  // q_a null: q takes the hidden state
    const float *q_a_bias, *kv_a_bias, *o_bias;            // or null
    const Packed* router;                                  // null: gate, up and down are a plain MLP
    const Packed *gate, *up, *down, *shared_gate, *shared_up, *shared_down;
    int32_t c, heads, nope, rope, interleaved, experts, groups, groups_kept, per_token, softmax, group_by_best, normalise, parts;
    float eps, latent_eps, scale, factor;
    int32_t unused;
};

struct StepArgs {
    float* x;                // [rows, c], in and out
    const float* cos;        // [rows, rope/2]
    const float* sin;
    const int64_t *page, *offset, *table, *length;
    int64_t table_stride;
    int32_t table_width, pages, rows, page_size, wide, threads;
};

// Drawing tokens: see `draw` in reference.py. Threads take rows.
struct DrawArgs {
    const float* logits;     // [rows, vocabulary]
    const int64_t* row;      // [draws]
    const double* uniform;
    const float* temperature;
    const int64_t* top_k;    // 0: off
    const double* top_p;
    int64_t* token;
    float* logprob;
    int32_t rows, draws, vocabulary, threads;
};

// ---------------------------------------------------------------- layouts

namespace {
struct Field {
    const char* name;
    char code;  // p: pointer, f: floating point, i: integer
    size_t size, offset;
};
template <class T> constexpr char code_of() { return std::is_pointer_v<T> ? 'p' : std::is_floating_point_v<T> ? 'f' : 'i'; }

std::string describe(const char* name, size_t size, std::initializer_list<Field> fields) {
    std::ostringstream text;
    text << name << ' ' << size;
    for (const Field& f : fields) text << ' ' << f.name << ':' << f.code << f.size << '@' << f.offset;
    return text.str();
}

// FIELDS(S, a, b, …): a Field for each of the named members of S.
#define PARENS ()
#define EXPAND(...) EXPAND_3(EXPAND_3(EXPAND_3(EXPAND_3(__VA_ARGS__))))
#define EXPAND_3(...) EXPAND_2(EXPAND_2(EXPAND_2(EXPAND_2(__VA_ARGS__))))
#define EXPAND_2(...) EXPAND_1(EXPAND_1(EXPAND_1(EXPAND_1(__VA_ARGS__))))
#define EXPAND_1(...) __VA_ARGS__
#define FIELD_OF(S, member, ...) {#member, code_of<decltype(S::member)>(), sizeof(S::member), offsetof(S, member)}, __VA_OPT__(FIELD_AGAIN PARENS(S, __VA_ARGS__))
#define FIELD_AGAIN() FIELD_OF
#define LAYOUT(name, S, ...) describe(name, sizeof(S), {EXPAND(FIELD_OF(S, __VA_ARGS__))})

// Every struct that crosses the C interface, one a line. A member that is missing here is missed by the comparison in
// cpu_library.py, which then refuses the library.
std::string all_layouts() {
    const std::string lines[] = {
        LAYOUT("PackedMatrix", Packed, kind, n, k, groups, data, scale),
        LAYOUT("PackJob", PackJob, source, row_stride, offset, out, fd, kind, n, k),
        LAYOUT("LinearArgs", LinearArgs, x, x_stride, x_group, w, bias, out, out_stride, out_group, rows, parts, add, threads),
        LAYOUT("ExpertsArgs", ExpertsArgs, x, expert, weight, gate, up, down, shared_gate, shared_up, shared_down, out, tokens, per_token, experts, parts, add, threads),
        LAYOUT("DecodeArgs", DecodeArgs, q, k, v, table, length, out, table_stride, table_width, pages, rows, heads, kv_heads, d, e, k_width, v_width, page_size, wide, threads, scale),
        LAYOUT("PrefillArgs", PrefillArgs, q, k, v, table, uk, uv, out, table_width, pages, rows, length, heads, kv_heads, d, e, k_width, v_width, page_size, wide, threads, scale),
        LAYOUT("IndexArgs", IndexArgs, q, weight, keys, table, out, table_width, pages, rows, length, heads, d, page_size, wide, threads, unused),
        LAYOUT("RouteArgs", RouteArgs, logits, bias, expert, weight, tokens, experts, groups, groups_kept, per_token, softmax, group_by_best, normalise, factor, threads),
        LAYOUT("RopeArgs", RopeArgs, x, x_row, x_head, cos, sin, out, out_row, out_head, rows, heads, r, interleaved, threads, unused),
        LAYOUT("WriteArgs", WriteArgs, pool, page, offset, x, x_row, x_head, pages, rows, heads, width, page_size, wide),
        LAYOUT("NormArgs", NormArgs, x, x_stride, weight, out, out_stride, rows, c, eps, threads),
        LAYOUT("DrawArgs", DrawArgs, logits, row, uniform, temperature, top_k, top_p, token, logprob, rows, draws, vocabulary, threads),
        LAYOUT("LayerArgs", LayerArgs, attention_norm, q_norm, kv_norm, mlp_norm, correction, q_a, q, kv_a, absorb, expand_v, o, q_a_bias, kv_a_bias, o_bias, router, gate, up, down, shared_gate, shared_up, shared_down, c, heads, nope, rope, interleaved, experts, groups, groups_kept, per_token, softmax, group_by_best, normalise, parts, eps, latent_eps, scale, factor, unused),
        LAYOUT("StepArgs", StepArgs, x, cos, sin, page, offset, table, length, table_stride, table_width, pages, rows, page_size, wide, threads),
    };
    std::string text;
    for (const std::string& line : lines) {
        if (!text.empty()) text += '\n';
        text += line;
    }
    return text;
}
#undef PARENS
#undef EXPAND
#undef EXPAND_1
#undef EXPAND_2
#undef EXPAND_3
#undef FIELD_OF
#undef FIELD_AGAIN
#undef LAYOUT
}  // namespace

// ---------------------------------------------------------------- numbers that are used as places

namespace {
// What is wrong with the numbers that an op takes as places in memory, or null. Every op looks before it begins: a wrong
// number is an error of the caller's, and must not become a read or write outside the tensors.
const char* check_pages(const int64_t* table, int64_t width, int64_t length, int page_size, int pages) {
    if (length < 1 || length > width * page_size) return "a length is not covered by the page table";
    const int64_t used = (length + page_size - 1) / page_size;
    for (int64_t i = 0; i < used; i++)
        if (table[i] < 0 || table[i] >= pages) return "a page number is outside the pool";
    return nullptr;
}
const char* check_table(const int64_t* table, int64_t stride, int64_t width, const int64_t* length, int rows, int page_size, int pages) {
    for (int row = 0; row < rows; row++)
        if (const char* wrong = check_pages(table + row * stride, width, length[row], page_size, pages)) return wrong;
    return nullptr;
}
const char* check_places(const int64_t* page, const int64_t* offset, int rows, int page_size, int pages) {
    for (int row = 0; row < rows; row++) {
        if (page[row] < 0 || page[row] >= pages) return "a page number is outside the pool";
        if (offset[row] < 0 || offset[row] >= page_size) return "an offset is outside the page";
    }
    return nullptr;
}
const char* check(const DecodeArgs& a) {
    return check_table(a.table, a.table_stride, a.table_width, a.length, a.rows, a.page_size, a.pages);
}
const char* check(const PrefillArgs& a) {
    if (a.rows > a.length) return "there are more queries than tokens in the context";
    return check_pages(a.table, a.table_width, a.length, a.page_size, a.pages);
}
const char* check(const IndexArgs& a) {
    if (a.rows > a.length) return "there are more queries than tokens in the context";
    return check_pages(a.table, a.table_width, a.length, a.page_size, a.pages);
}
const char* check(const WriteArgs& a) { return check_places(a.page, a.offset, a.rows, a.page_size, a.pages); }
const char* check(const StepArgs& a) {
    if (const char* wrong = check_places(a.page, a.offset, a.rows, a.page_size, a.pages)) return wrong;
    return check_table(a.table, a.table_stride, a.table_width, a.length, a.rows, a.page_size, a.pages);
}
const char* check(const ExpertsArgs& a) {
    for (int64_t i = 0, pairs = int64_t(a.tokens) * a.per_token; i < pairs; i++)
        if (a.expert[i] < 0 || a.expert[i] >= a.experts) return "the number of an expert is outside the bank";
    return nullptr;
}
const char* check(const DrawArgs& a) {
    for (int i = 0; i < a.draws; i++)
        if (a.row[i] < 0 || a.row[i] >= a.rows) return "the number of a row is outside the logits";
    return nullptr;
}
const char* check(const RouteArgs& a) {
    return a.per_token < 1 || a.per_token > a.experts || a.groups < 1 || a.groups_kept < 1 || a.groups_kept > a.groups || a.experts % a.groups
               ? "experts cannot be grouped or chosen in these numbers"
               : nullptr;
}
template <class Args> const char* check(const Args&) { return nullptr; }  // numbers that are no places

struct Kernels {
    const char* name;
    void (*pack_codes)(const uint8_t* rows, int64_t row_stride, int k, uint8_t* panel);
    void (*linear)(const LinearArgs&);
    void (*swiglu_linear)(const LinearArgs&, const Packed& up);
    void (*experts)(const ExpertsArgs&);
    void (*decode)(const DecodeArgs&);
    void (*prefill)(const PrefillArgs&);
    void (*index_scores)(const IndexArgs&);
    void (*route)(const RouteArgs&);
    void (*rope)(const RopeArgs&);
    void (*paged_write)(const WriteArgs&);
    void (*rms_norm)(const NormArgs&);
    void (*draw)(const DrawArgs&);
    void (*decode_layer)(const LayerArgs&, const StepArgs&, uint8_t* pool);
};
}  // namespace

#define ISA portable
#define LEVEL 0
#include "cpu.cpp"
#undef ISA
#undef LEVEL

#ifdef X86_LEVELS
#define ISA avx2
#define LEVEL 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#include "cpu.cpp"
#pragma GCC pop_options
#undef ISA
#undef LEVEL
#define ISA avx512
#define LEVEL 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq")
#include "cpu.cpp"
#pragma GCC pop_options
#undef ISA
#undef LEVEL
#define ISA avx512_bf16
#define LEVEL 3
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")
#include "cpu.cpp"
#pragma GCC pop_options
#undef ISA
#undef LEVEL
#endif

namespace {
std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> list;
#ifdef X86_LEVELS
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (wide && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16"))
        list.push_back(&avx512_bf16::table);
    if (wide) list.push_back(&avx512::table);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(&avx2::table);
#endif
    list.push_back(&portable::table);
    return list;
}
const Kernels* chosen = supported().front();
}  // namespace

extern "C" {

// The instruction set in use; with a name, switches to it first. Null if this machine does not have it.
const char* distill_isa(const char* name) {
    if (name) {
        const auto list = supported();
        const auto found = std::find_if(list.begin(), list.end(), [&](auto* k) { return !std::strcmp(k->name, name); });
        if (found == list.end()) return nullptr;
        chosen = *found;
    }
    return chosen->name;
}

// The layout of every struct of the interface (see `all_layouts`).
const char* distill_layouts() {
    static const std::string text = all_layouts();
    return text.c_str();
}

int64_t distill_packed_bytes(int kind, int n, int k) { return int64_t(panels_of(n)) * int64_t(panel_bytes(kind, k)); }

}  // extern "C"

namespace {
// At most 64 rows of a row-major matrix (codes, bfloat16 or float32) as a panel. What is past them and past k is zero.
void pack_panel(int kind, int rows, int k, const void* source, int64_t row_stride, uint8_t* to) {
    if (rows < PANEL || k % unit_k(kind)) std::memset(to, 0, panel_bytes(kind, k));
    if (kind == FP8) {
        const uint8_t* from = static_cast<const uint8_t*>(source);
        int k0 = 0;
        if (rows == PANEL) {
            chosen->pack_codes(from, row_stride, k, to);
            k0 = k / 64 * 64;
        }
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
        for (int k0 = 0; k0 < k; k0 += 32)
            for (int i = 0; i < rows; i++)
                for (int j = k0; j < std::min(k, k0 + 32); j++) lanes[j / 2 * 128 + i * 2 + j % 2] = from[i * row_stride + j];
    } else {
        const float* from = static_cast<const float*>(source);
        float* lanes = reinterpret_cast<float*>(to);
        for (int k0 = 0; k0 < k; k0 += 16)
            for (int i = 0; i < rows; i++)
                for (int j = k0; j < std::min(k, k0 + 16); j++) lanes[j * 64 + i] = from[i * row_stride + j];
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
}  // namespace

extern "C" {

// Pack matrices, and look for NaN codes and numbers that are not finite. A file is read a panel at a time, so that what is read is in the cache when it is
// packed and takes no memory. Returns the number of a matrix that has some, -1 for none, -2 if a file could not be read. On
// one thread it may run beside the other ops.
int distill_pack(const PackJob* jobs, int count, int threads) {
    std::unique_lock<std::mutex> lock(one_caller, std::defer_lock);
    if (threads > 1) lock.lock();
    std::vector<int> first(size_t(count) + 1, 0);
    for (int i = 0; i < count; i++) first[i + 1] = first[i] + panels_of(jobs[i].n);
    std::atomic<int> bad{-1};
    pool().run(threads, first[count], [&](int task) {
        const int index = int(std::upper_bound(first.begin(), first.end(), task) - first.begin()) - 1;
        const PackJob& job = jobs[index];
        const int panel = task - first[index], rows = std::min(PANEL, job.n - panel * PANEL);
        const int64_t size = job.kind == FP8 ? 1 : job.kind == BF16 ? 2 : 4, stride = job.row_stride * size;
        const uint8_t* from = job.source + panel * PANEL * stride;
        if (job.fd >= 0) {
            uint8_t* buffer = own_scratch[0].take<uint8_t>(size_t(rows * stride));
            for (int64_t done = 0, all = rows * stride; done < all;) {
                const int64_t got = pread(job.fd, buffer + done, size_t(all - done), job.offset + panel * PANEL * stride + done);
                if (got <= 0) {
                    if (got < 0 && errno == EINTR) continue;
                    bad = -2;
                    return;
                }
                done += got;
            }
            from = buffer;
        }
        for (int row = 0; row < rows; row++)
            if (has_damage(job.kind, from + row * stride, job.k) && bad == -1) bad = index;
        if (job.out) pack_panel(job.kind, rows, job.k, from, job.row_stride, job.out + panel * panel_bytes(job.kind, job.k));
    });
    return bad;
}

// Whether any e4m3 code is a NaN.
int distill_has_nan(const uint8_t* codes, int64_t count, int threads) {
    std::lock_guard<std::mutex> lock(one_caller);
    constexpr int64_t SLICE = 1 << 18;
    std::atomic<int> found{0};
    pool().run(threads, int((count + SLICE - 1) / SLICE), [&](int task) {
        if (has_nan(codes + task * SLICE, std::min(SLICE, count - task * SLICE))) found = 1;
    });
    return found;
}

// Each op returns null, or what is wrong with its arguments, in which case it has done nothing.
#define OP(name, Args)                                     \
    const char* distill_##name(const Args* args) {         \
        if (const char* wrong = check(*args)) return wrong; \
        std::lock_guard<std::mutex> lock(one_caller);      \
        chosen->name(*args);                               \
        return nullptr;                                    \
    }
OP(linear, LinearArgs)
OP(experts, ExpertsArgs)
OP(decode, DecodeArgs)
OP(prefill, PrefillArgs)
OP(index_scores, IndexArgs)
OP(route, RouteArgs)
OP(rope, RopeArgs)
OP(paged_write, WriteArgs)
OP(rms_norm, NormArgs)
OP(draw, DrawArgs)
#undef OP

const char* distill_swiglu_linear(const LinearArgs* args, const Packed* up) {
    std::lock_guard<std::mutex> lock(one_caller);
    chosen->swiglu_linear(*args, *up);
    return nullptr;
}

const char* distill_decode_layer(const LayerArgs* layer, const StepArgs* step, uint8_t* cache) {
    if (const char* wrong = check(*step)) return wrong;
    std::lock_guard<std::mutex> lock(one_caller);
    chosen->decode_layer(*layer, *step, cache);
    return nullptr;
}

}  // extern "C"

#else  // ---------------------------------------------------------------- once for each instruction set
namespace {
namespace ISA {

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
INLINE V load(const float* p) { V v; std::memcpy(&v, p, 64); return v; }
INLINE void store(float* p, V v) { std::memcpy(p, &v, 64); }
INLINE V all(float x) { return x - V{}; }  // adding to zero would lose the sign of a zero, and thus be done
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
INLINE V max(V a, V b) { return a > b ? a : b; }  // b where either is NaN

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
INLINE I load_pairs(const void* p) { I v; std::memcpy(&v, p, 64); return v; }
INLINE void decode_codes(const uint8_t* p, I& first, I& second) {
#if LEVEL == 3
    const __m512i code = _mm512_loadu_si512(p);
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(code_bytes.low), code, _mm512_load_si512(code_bytes.low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(code_bytes.high), code, _mm512_load_si512(code_bytes.high + 64));
    high = _mm512_ternarylogic_epi32(high, code, _mm512_set1_epi8(char(0x80)), 0xF8);  // high | (code & sign)
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

// sum + w.first · x.first + w.second · x.second, for two bfloat16 in each 32 bits.
INLINE V dot2(V sum, I w, I x) {
#if LEVEL == 3
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#else
    const I high = I{} + int32_t(0xffff0000u);
    sum = fma((V)(w << 16), (V)(x << 16), sum);
    return fma((V)(w & high), (V)(x & high), sum);
#endif
}
INLINE I pair_at(const void* p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return I{} + pair;
}

// Where a tile finds its panel: in memory, fetched a block ahead and `after` next; there, and its codes are written to
// `kept` as bfloat16 for the tiles that follow; or in the cache, while a line from `after` on is fetched for every unit.
enum Where { MEMORY, KEEPING, CACHE };

// Whether sums may change from the unit of one block's scale to that of the next without leaving float32's range.
INLINE bool steady(const float* scale, int blocks) {
    bool within = true;
    for (int b = 0; b < blocks; b++) within &= scale[b] >= 0x1p-30f && scale[b] <= 0x1p30f;
    return within;
}

// out [ROWS, NV·16] = rows a · panel, k products in order. At the end of each 128 of them the sums, which are in units of
// the block's scale, are turned into units of the next one's; where scales are too far apart for that (zero, say), they
// are scaled and added up in `out`.
// a[r]: row r's first part; `part` bytes further the next one. Float32 rows have one part. STEP: bytes from one pair of
// bfloat16, or one float32, of a row to the next. after: the panel that will be read after this one.
template <int KIND, int ROWS, int NV, int PARTS, int STEP = 4, Where WHERE = MEMORY>
INLINE void tile(const uint8_t* const* a, size_t part, const uint8_t* w, int k, const float* scale, float* out, const uint8_t* after, uint8_t* kept = nullptr) {
    constexpr int UNIT = KIND == FP8 ? 4 : KIND == BF16 ? 2 : 1;
    const bool together = !scale || steady(scale, ceil_div(k, BLOCK));
    V sum[ROWS][NV] = {};
    for (int begin = 0; begin < k; begin += BLOCK) {
        const int end = std::min(k, begin + BLOCK), block = begin / BLOCK;
        const int64_t ahead = end < k ? BLOCK / UNIT * NV * 64 : after - w;
        for (int at = begin; at < end; at += UNIT, w += NV * 64) {
            if (WHERE == CACHE) fetch(after + size_t(at / UNIT) * 64);
            else if (KIND != F32 && NV > 1)  // one vector: queries, which stay in the cache
                for (int v = 0; v < NV; v++) fetch(w + ahead + 64 * v);
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
                            for (int p = 0; p < PARTS; p++)
                                sum[r][v] = dot2(sum[r][v], half ? second : first, pair_at(a[r] + p * part + (size_t(at / 2) + half) * STEP));
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

constexpr int MAX_ROWS = LEVEL >= 2 ? 6 : 2;  // sums of a tile: 24 of AVX512's 32 registers
using Tile = void (*)(const uint8_t* const*, size_t, const uint8_t*, int, const float*, float*, const uint8_t*, uint8_t*);
template <int KIND, int ROWS, int PARTS, Where WHERE>
void tile_call(const uint8_t* const* a, size_t part, const uint8_t* w, int k, const float* scale, float* out, const uint8_t* after, uint8_t* kept) {
    tile<KIND, ROWS, 4, PARTS, 4, WHERE>(a, part, w, k, scale, out, after, kept);
}
template <int KIND, int PARTS, Where WHERE> Tile tile_for(int rows) {
#if LEVEL >= 2
    constexpr Tile by_rows[] = {tile_call<KIND, 1, PARTS, WHERE>, tile_call<KIND, 2, PARTS, WHERE>, tile_call<KIND, 3, PARTS, WHERE>,
                                tile_call<KIND, 4, PARTS, WHERE>, tile_call<KIND, 5, PARTS, WHERE>, tile_call<KIND, 6, PARTS, WHERE>};
#else
    constexpr Tile by_rows[] = {tile_call<KIND, 1, PARTS, WHERE>, tile_call<KIND, 2, PARTS, WHERE>};
#endif
    return by_rows[rows - 1];
}
Tile tile_for(int kind, int parts, int rows, Where where) {
    if (kind == F32) return tile_for<F32, 1, MEMORY>(rows);
    if (kind == BF16 && where == CACHE) return parts == 1 ? tile_for<BF16, 1, CACHE>(rows) : tile_for<BF16, 3, CACHE>(rows);
    if (kind == BF16) return parts == 1 ? tile_for<BF16, 1, MEMORY>(rows) : tile_for<BF16, 3, MEMORY>(rows);
    if (where == KEEPING) return parts == 1 ? tile_for<FP8, 1, KEEPING>(rows) : tile_for<FP8, 3, KEEPING>(rows);
    return parts == 1 ? tile_for<FP8, 1, MEMORY>(rows) : tile_for<FP8, 3, MEMORY>(rows);
}

constexpr int KEEP_ROWS = 2 * MAX_ROWS + 1;  // from here on it pays to turn a panel's codes into bfloat16 once

// All rows through one panel, in tiles of at most MAX_ROWS. row(i): pointer; done(i, sums[64]): takes the result; after:
// the panel that comes next (null: the next one of the matrix).
template <class Row, class Done>
INLINE void through_panel(const Packed& w, int group, int panel, int rows, int parts, size_t part, Row row, Done done, const uint8_t* after = nullptr) {
    const int all_panels = panels_of(w.n), index = group * all_panels + panel;
    const uint8_t* data = w.data + index * panel_bytes(w.kind, w.k);
    if (!after) after = data + panel_bytes(w.kind, w.k);
    const float* scale = w.scale ? w.scale + size_t(index) * ceil_div(w.k, BLOCK) : nullptr;
    alignas(64) float sums[MAX_ROWS * PANEL];
    const uint8_t* a[MAX_ROWS];
    uint8_t* const kept = w.kind == FP8 && rows >= KEEP_ROWS ? own_scratch[5].take<uint8_t>(size_t(padded_k(w.k)) * 128) : nullptr;
    const uint8_t* const after_end = after + panel_bytes(w.kind, w.k);
    for (int begin = 0, tiles = ceil_div(rows, MAX_ROWS); tiles; tiles--) {
        const int count = ceil_div(rows - begin, tiles);
        for (int r = 0; r < count; r++) a[r] = row(begin + r);
        if (!kept) {
            tile_for(w.kind, parts, count, MEMORY)(a, part, data, w.k, scale, sums, tiles > 1 ? data : after, nullptr);
        } else if (begin == 0) {
            tile_for(FP8, parts, count, KEEPING)(a, part, data, w.k, scale, sums, after, kept);
        } else {
            tile_for(BF16, parts, count, CACHE)(a, part, kept, padded_k(w.k), scale, sums, after < after_end ? after : kept, nullptr);
            after += padded_k(w.k) * 32;
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

constexpr int ROW_CHUNK = 96;  // rows a task takes through a panel

// What the products read: float32 rows as they are, or their bfloat16 parts in scratch, [parts][rows][groups · padded k].
struct Activations {
    const uint8_t* base;
    size_t row_bytes, group_bytes, part_bytes;
    const uint8_t* at(int row, int group) const { return base + row * row_bytes + group * group_bytes; }
};
Activations prepare(const float* x, int64_t stride, int64_t group, int rows, int k, int groups, int kind, int parts, int threads, Scratch& scratch) {
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

// Products with several matrices that read the same rows, as one job.
void linears(const LinearArgs* args, int count) {
    const LinearArgs& first_of = args[0];
    const Packed& w0 = *first_of.w;
    const int chunks = ceil_div(first_of.rows, ROW_CHUNK);
    const Activations x = prepare(first_of.x, first_of.x_stride, first_of.x_group, first_of.rows, w0.k, w0.groups, w0.kind,
                                  first_of.parts, first_of.threads, shared_scratch[0]);
    int tasks = 0;
    for (int i = 0; i < count; i++) tasks += args[i].w->groups * panels_of(args[i].w->n) * chunks;
    pool().run(first_of.threads, tasks, [&](int task) {
        const LinearArgs* of = args;
        for (int own; task >= (own = of->w->groups * panels_of(of->w->n) * chunks); of++) task -= own;
        const Packed& w = *of->w;
        const int panels = panels_of(w.n), chunk = task % chunks, panel = task / chunks % panels, group = task / chunks / panels;
        const int first = chunk * ROW_CHUNK, rows = std::min(ROW_CHUNK, of->rows - first);
        const int column = panel * PANEL, width = std::min(PANEL, w.n - column);
        const float* bias = of->bias ? of->bias + size_t(group) * w.n + column : nullptr;
        const size_t step = chunks > 1 ? 1 : size_t(of->threads);  // threads take panels in turn
        const uint8_t* after = w.data + (size_t(group) * panels + panel + step) * panel_bytes(w.kind, w.k);
        through_panel(
            w, group, panel, rows, of->parts, x.part_bytes, [&](int i) { return x.at(first + i, group); },
            [&](int i, const float* sums) {
                float* to = of->out + (first + i) * of->out_stride + group * of->out_group + column;
                if (of->add)
                    for (int j = 0; j < width; j++) to[j] += bias ? sums[j] + bias[j] : sums[j];
                else
                    for (int j = 0; j < width; j++) to[j] = bias ? sums[j] + bias[j] : sums[j];
            },
            after);
    });
}
void linear(const LinearArgs& args) { linears(&args, 1); }

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

// 64 rows of codes into a panel: blocks of 16 rows × 64 codes are turned as 16×16 words of 4 codes, whose halves then
// part. k up to the last multiple of 64; the caller does the rest.
void pack_codes(const uint8_t* rows, int64_t row_stride, int k, uint8_t* panel) {
    typedef int16_t S __attribute__((vector_size(64)));
    I lane;
    for (int i = 0; i < 16; i++) lane[i] = i;
    S halves;
    for (int i = 0; i < 32; i++) halves[i] = int16_t(i / 8 * 8 + i % 4 * 2 + i % 8 / 4);
    for (int k0 = 0; k0 + 64 <= k; k0 += 64)
        for (int set = 0; set < 4; set++) {
            I word[16];
            for (int r = 0; r < 16; r++) word[r] = load_pairs(rows + (set * 16 + r) * row_stride + k0);
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
            for (int unit = 0; unit < 16; unit++) {
                const S parted = shuffled((S)word[unit], (S)word[unit], halves);
                std::memcpy(panel + size_t(k0 / 4 + unit) * 256 + set * 64, &parted, 64);
            }
        }
}

// silu(gate) · up of 64 sums each.
INLINE void swiglu(const float* gate, const float* up, float* out) {
    for (int v = 0; v < PANEL; v += 16) {
        const V g = load(gate + v);
        store(out + v, g / (all(1.f) + exp(-g)) * load(up + v));
    }
}

// out = silu(x·gateᵀ) · (x·upᵀ): args.w is the gate.
void swiglu_linear(const LinearArgs& args, const Packed& up) {
    const Packed& gate = *args.w;
    const int panels = panels_of(gate.n), chunks = ceil_div(args.rows, ROW_CHUNK);
    const Activations x = prepare(args.x, args.x_stride, 0, args.rows, gate.k, 1, gate.kind, args.parts, args.threads, shared_scratch[0]);
    pool().run(args.threads, panels * chunks, [&](int task) {
        const int chunk = task % chunks, panel = task / chunks;
        const int first = chunk * ROW_CHUNK, count = std::min(ROW_CHUNK, args.rows - first);
        const int width = std::min(PANEL, gate.n - panel * PANEL);
        alignas(64) float gates[ROW_CHUNK * PANEL];
        const auto row = [&](int i) { return x.at(first + i, 0); };
        through_panel(gate, 0, panel, count, args.parts, x.part_bytes, row,
                      [&](int i, const float* sums) { std::memcpy(gates + i * PANEL, sums, PANEL * 4); });
        through_panel(up, 0, panel, count, args.parts, x.part_bytes, row, [&](int i, const float* sums) {
            alignas(64) float y[PANEL];
            swiglu(gates + i * PANEL, sums, y);
            std::memcpy(args.out + (first + i) * args.out_stride + panel * PANEL, y, size_t(width) * 4);
        });
    });
}

// The gated half of an MLP for some rows and one panel: silu(x·gateᵀ) · (x·upᵀ), split into what the product with `down`
// reads: rows of h from `first` on.
template <class Row>
INLINE void gated_panel(const Packed& gate, const Packed& up, int panel, int rows, int parts, size_t part, Row row, uint8_t* h,
                        size_t h_part, size_t h_width, size_t first) {
    const int width = std::min(PANEL, gate.n - panel * PANEL);
    alignas(64) float gates[ROW_CHUNK * PANEL];
    through_panel(
        gate, 0, panel, rows, parts, part, row, [&](int i, const float* sums) { std::memcpy(gates + i * PANEL, sums, PANEL * 4); },
        up.data + panel * panel_bytes(up.kind, up.k));
    through_panel(up, 0, panel, rows, parts, part, row, [&](int i, const float* sums) {
        alignas(64) float y[PANEL];
        swiglu(gates + i * PANEL, sums, y);
        const size_t at = (first + i) * h_width + size_t(panel) * PANEL;
        if (gate.kind == F32) std::memcpy(reinterpret_cast<float*>(h) + at, y, size_t(width) * 4);
        else split(y, width, parts, h_part, reinterpret_cast<bf16*>(h) + at);
    }, gate.data + (panel + 2) * panel_bytes(gate.kind, gate.k));
}

// The shared expert is computed beside the routed ones, as one more whose rows are all tokens, and added last.
void experts(const ExpertsArgs& args) {
    const int pairs = args.tokens * args.per_token, c = args.gate[0].k, kind = args.gate[0].kind;
    // Pairs (token, choice) sorted by expert: `start[e]` … `start[e+1]` of `order`.
    int* start = shared_scratch[1].take<int>(size_t(args.experts) + 1 + 2 * size_t(pairs));
    int *order = start + args.experts + 1, *place = order + pairs;
    std::fill(start, start + args.experts + 1, 0);
    for (int i = 0; i < pairs; i++) start[args.expert[i] + 1]++;
    for (int e = 0; e < args.experts; e++) start[e + 1] += start[e];
    std::vector<int> next(start, start + args.experts);
    for (int i = 0; i < pairs; i++) place[i] = next[args.expert[i]]++, order[place[i]] = i;

    // Who has rows, so that tasks are even: `rows` of h and y, from `first` on.
    struct Busy { const Packed *gate, *up, *down; int first, rows, expert; };
    std::vector<Busy> busy;
    for (int e = 0; e < args.experts; e++)
        if (start[e + 1] > start[e])
            busy.push_back({args.gate + e, args.up + e, args.down + e, start[e], start[e + 1] - start[e], e});
    const bool shared = args.shared_gate;
    if (shared) busy.push_back({args.shared_gate, args.shared_up, args.shared_down, pairs, args.tokens, -1});
    const auto task_of = [&](int task) {
        size_t i = 0;
        for (int own; task >= (own = panels_of(busy[i].gate->n)); i++) task -= own;
        return std::pair<const Busy&, int>(busy[i], task);
    };

    const Activations x = prepare(args.x, c, 0, args.tokens, c, 1, kind, args.parts, args.threads, shared_scratch[0]);
    const int widest = std::max(args.gate[0].n, shared ? args.shared_gate->n : 0);
    const size_t h_rows = size_t(pairs) + (shared ? args.tokens : 0), h_width = kind == F32 ? widest : padded_k(widest), h_part = h_rows * h_width;
    uint8_t* h = shared_scratch[2].take<uint8_t>(kind == F32 ? h_part * 4 : h_part * 2 * args.parts);
    int tasks = 0;
    for (const Busy& b : busy) tasks += panels_of(b.gate->n);
    pool().run(args.threads, tasks, [&](int task) {
        const auto [b, panel] = task_of(task);
        for (int done = 0; done < b.rows; done += ROW_CHUNK) {
            const int first = b.first + done;
            const auto row = [&](int i) { return x.at(b.expert < 0 ? first + i - pairs : order[first + i] / args.per_token, 0); };
            gated_panel(*b.gate, *b.up, panel, std::min(ROW_CHUNK, b.rows - done), args.parts, x.part_bytes, row, h, h_part, h_width, size_t(first));
        }
    });
    // A task sums up 64 columns of all tokens: experts in the order of their numbers, the shared one last.
    const size_t h_row = h_width * (kind == F32 ? 4 : 2);
    pool().run(args.threads, panels_of(c), [&](int panel) {
        float* sum = own_scratch[0].take<float>(size_t(args.tokens) * PANEL);
        std::fill(sum, sum + size_t(args.tokens) * PANEL, 0.f);
        for (size_t n = 0; n < busy.size(); n++) {
            const Busy& b = busy[n];
            const Packed* next = n + 1 < busy.size() ? busy[n + 1].down : nullptr;
            through_panel(
                *b.down, 0, panel, b.rows, args.parts, h_part * 2, [&](int i) { return h + size_t(b.first + i) * h_row; },
                [&](int i, const float* sums) {
                    const int pair = b.expert < 0 ? 0 : order[b.first + i];
                    const V weight = all(b.expert < 0 ? 1.f : args.weight[pair]);
                    float* to = sum + size_t(b.expert < 0 ? i : pair / args.per_token) * PANEL;
                    for (int v = 0; v < PANEL; v += LANES) store(to + v, load(to + v) + load(sums + v) * weight);
                },
                next ? next->data + panel * panel_bytes(next->kind, next->k) : nullptr);
        }
        const int width = std::min(PANEL, c - panel * PANEL);
        for (int t = 0; t < args.tokens; t++) {
            float* to = args.out + size_t(t) * c + panel * PANEL;
            const float* from = sum + size_t(t) * PANEL;
            if (args.add)
                for (int j = 0; j < width; j++) to[j] += from[j];
            else
                std::memcpy(to, from, size_t(width) * 4);
        }
    });
}

void route(const RouteArgs& args) {
    const int x = args.experts, per_group = x / args.groups;
    const int chunk = std::max(1, 2048 / x);
    pool().run(args.threads, ceil_div(args.tokens, chunk), [&](int task) {
        float* score = own_scratch[0].take<float>(size_t(ceil_div(x, LANES) * LANES) * 2 + args.groups);
        float *choice = score + ceil_div(x, LANES) * LANES, *group = choice + ceil_div(x, LANES) * LANES;
        const auto best = [](const float* values, int count) { return int(std::max_element(values, values + count) - values); };
        for (int t = task * chunk; t < std::min(args.tokens, (task + 1) * chunk); t++) {
            std::memcpy(score, args.logits + size_t(t) * x, size_t(x) * 4);
            if (args.softmax) {
                const float top = score[best(score, x)];
                float sum = 0;
                for (int i = 0; i < x; i += LANES) store(score + i, exp(load(score + i) - top));
                for (int i = 0; i < x; i++) sum += score[i];
                for (int i = 0; i < x; i++) score[i] /= sum;
            } else {
                for (int i = 0; i < x; i += LANES) store(score + i, all(1.f) / (all(1.f) + exp(-load(score + i))));
            }
            bool ordered = true;
            for (int i = 0; i < x; i++) {
                choice[i] = args.bias ? score[i] + args.bias[i] : score[i];
                ordered &= choice[i] == choice[i];
            }
            if (!ordered) {  // there is no best one
                for (int i = 0; i < args.per_token; i++) {
                    args.expert[size_t(t) * args.per_token + i] = i;
                    args.weight[size_t(t) * args.per_token + i] = NAN;
                }
                continue;
            }
            if (args.groups > 1) {
                for (int g = 0; g < args.groups; g++) {
                    const float* of = choice + g * per_group;
                    const int first = best(of, per_group);
                    group[g] = of[first];
                    if (args.group_by_best) continue;
                    float second = -INFINITY;
                    for (int i = 0; i < per_group; i++)
                        if (i != first) second = std::max(second, of[i]);
                    group[g] += second;
                }
                for (int kept = 0; kept < args.groups_kept; kept++) group[best(group, args.groups)] = -INFINITY;
                for (int g = 0; g < args.groups; g++)  // the chosen ones are marked by now
                    if (group[g] != -INFINITY) std::fill(choice + g * per_group, choice + (g + 1) * per_group, -INFINITY);
            }
            float sum = 0;
            for (int i = 0; i < args.per_token; i++) {
                const int chosen = best(choice, x);
                choice[chosen] = -INFINITY;
                args.expert[size_t(t) * args.per_token + i] = chosen;
                sum += args.weight[size_t(t) * args.per_token + i] = score[chosen];
            }
            const float divisor = args.normalise ? sum + 1e-20f : 1.f;
            for (int i = 0; i < args.per_token; i++) {
                float& weight = args.weight[size_t(t) * args.per_token + i];
                weight = weight / divisor * args.factor;
            }
        }
    });
}

// ---------------------------------------------------------------- attention

// 16 queries against the keys and values of one head. Lane i sees tokens 0 … limit[i]-1 of those that come by.
struct Lanes {
    int d, e;             // width of keys and of values
    bool wide;            // float32 keys and values, else bfloat16
    float scale;
    const uint8_t* q;     // packed: units of k, one vector of 16 lanes each
    I limit;
    V top, total;         // running maximum and sum of the softmax
    float* out;           // [16, e rounded up to 64], not yet divided by `total`
    int width;            // of a row of `out`
    const uint8_t* panels = nullptr;  // all values in the form of `value_panel`; null: they are rows
};
// Values of KEYS keys and 64 columns: float32 rows, or rows of the pairs (key 2i, key 2i+1) of bfloat16.
constexpr size_t value_panel_bytes(bool wide) { return size_t(wide ? KEYS : KEYS / 2) * 256; }

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
    const V kept = exp(s.top - top);  // first block: top was -inf, and e^-inf is as good as 0 for an empty sum
    V total = s.total * kept;
    // The probabilities replace the scores: as float32, or as pairs of bfloat16 of keys 2i and 2i+1 in row i.
    for (int i = 0; i < count; i += 2) {
        V p[2] = {};
        for (int j = 0; j < 2 && i + j < count; j++) {
            const V x = load(score + (i + j) * LANES);
            p[j] = x == all(-INFINITY) ? V{} : exp(x - top);  // a NaN stays one
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

    // Values of the block as panels of 64 columns, then out = out · kept + p · values.
    constexpr size_t SIZE = value_panel_bytes(WIDE);
    const uint8_t* rows[KEYS + 1];
    uint8_t* made = nullptr;
    if (!s.panels) {
        made = own_scratch[0].take<uint8_t>(SIZE);
        values.find(first, count, rows);
        rows[count] = nullptr;
    }
    const uint8_t* p_row[LANES];
    for (int lane = 0; lane < LANES; lane++) p_row[lane] = reinterpret_cast<const uint8_t*>(score + lane);
    const int used = WIDE ? count : (count + 1) / 2 * 2;
    for (int column = 0; column < s.e; column += PANEL) {
        const int width = std::min(PANEL, s.e - column);
        const uint8_t* panel = made;
        if (made && width < PANEL) std::memset(made, 0, SIZE);
        if (!made) {
            panel = s.panels + size_t(first / KEYS * panels_of(s.e) + column / PANEL) * SIZE;
        } else if (WIDE) {
            for (int i = 0; i < used; i++) std::memcpy(made + i * 256, rows[i] + size_t(column) * 4, size_t(width) * 4);
        } else {
            for (int i = 0; i < used; i += 2) {
                const bf16* even = reinterpret_cast<const bf16*>(rows[i]) + column;
                const bf16* odd = rows[i + 1] ? reinterpret_cast<const bf16*>(rows[i + 1]) + column : nullptr;
                uint32_t* to = reinterpret_cast<uint32_t*>(made + i / 2 * 256);
                if (odd)
                    for (int j = 0; j < width; j++) to[j] = uint32_t(even[j]) | uint32_t(odd[j]) << 16;
                else
                    for (int j = 0; j < width; j++) to[j] = even[j];
            }
        }
        alignas(64) float sums[LANES * PANEL];
        for (int lane = 0; lane < LANES; lane += 4)
            tile<KIND, 4, 4, 1, 64>(p_row + lane, 0, panel, used, nullptr, sums + lane * PANEL, panel);
        alignas(64) float factor[LANES];
        store(factor, kept);
        for (int lane = 0; lane < LANES; lane++)
            for (int v = 0; v < PANEL; v += 16) {
                float* to = s.out + size_t(lane) * s.width + column + v;
                store(to, fma(load(to), all(factor[lane]), load(sums + lane * PANEL + v)));
            }
    }
}

void attend(Lanes& s, const Rows& keys, const Rows& values, int begin, int end) {
    for (int first = begin; first < end; first += KEYS) {
        const int count = std::min(KEYS, end - first);
        if (s.wide) attend_block<true>(s, keys, values, first, count);
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

// Begin with nothing seen, and sum into `out` [16, width].
void restart(Lanes& s, float* out) {
    s.top = all(-1e30f);
    s.total = V{};
    s.out = out;
    std::fill(out, out + LANES * s.width, 0.f);
}

// A context is attended to in parts of so many tokens, which are then joined in order, whoever computed them.
constexpr int PART = 2 * KEYS;

// The softmax over some tokens of 16 queries: maximum, sum, and the values weighed, not yet divided by the sum.
struct Part {
    float* data;  // [2][16], then [16][width]
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
        for (int lane = 0; lane < LANES; lane++) {
            float* to = values() + size_t(lane) * width;
            const float* from = next.values() + size_t(lane) * width;
            for (int j = 0; j < width; j += LANES) store(to + j, fma(load(to + j), all(own[lane]), load(from + j) * other[lane]));
        }
    }
    void finish(int lanes, int e, int width, float* out) const {
        for (int lane = 0; lane < lanes; lane++) {
            const float* from = values() + size_t(lane) * width;
            for (int j = 0; j < e; j++) out[size_t(lane) * e + j] = from[j] / data[LANES + lane];
        }
    }
};

void decode(const DecodeArgs& args) {
    const int size = args.wide ? 4 : 2, shared_by = args.heads / args.kv_heads, sets = ceil_div(shared_by, LANES);
    const int units = args.rows * args.kv_heads * sets, width = ceil_div(args.e, PANEL) * PANEL;
    const auto queries_of = [&](int unit) {
        const int row = unit / (args.kv_heads * sets), head = unit / sets % args.kv_heads, set = unit % sets;
        const int lanes = std::min(LANES, shared_by - set * LANES), first = head * shared_by + set * LANES;
        return lanes_for(args.d, args.e, args.wide, args.scale, I{} + int(args.length[row]), [&](int lane) {
            return lane < lanes ? args.q + (size_t(row) * args.heads + first + lane) * args.d : nullptr;
        });
    };
    const auto part_of = [&](int unit, int part, Lanes& s, Part result) {
        const int row = unit / (args.kv_heads * sets), head = unit / sets % args.kv_heads;
        const auto rows = [&](const void* pool_, int width_) {
            const int64_t row_bytes = int64_t(width_) * size, head_bytes = row_bytes * args.page_size;
            return Rows{static_cast<const uint8_t*>(pool_), args.table + row * args.table_stride,
                        head_bytes * args.kv_heads, head_bytes * head, row_bytes, args.page_size};
        };
        const int begin = part * PART, end = std::min(int(args.length[row]), begin + PART);
        restart(s, result.values());
        attend(s, rows(args.k, args.k_width), rows(args.v, args.v_width), begin, end);
        result.put(s);
    };
    const auto finish = [&](int unit, Part result) {
        const int row = unit / (args.kv_heads * sets), head = unit / sets % args.kv_heads, set = unit % sets;
        const int lanes = std::min(LANES, shared_by - set * LANES), first = head * shared_by + set * LANES;
        result.finish(lanes, args.e, width, args.out + (size_t(row) * args.heads + first) * args.e);
    };
    const auto parts_of = [&](int unit) { return ceil_div(int(args.length[unit / (args.kv_heads * sets)]), PART); };

    if (units >= 2 * args.threads) {
        pool().run(args.threads, units, [&](int unit) {
            float* memory = own_scratch[3].take<float>(2 * Part::size(width));
            Part whole{memory}, next{memory + Part::size(width)};
            Lanes s = queries_of(unit);
            part_of(unit, 0, s, whole);
            for (int part = 1; part < parts_of(unit); part++) {
                part_of(unit, part, s, next);
                whole.join(next, width);
            }
            finish(unit, whole);
        });
        return;
    }
    std::vector<int> first(size_t(units) + 1, 0);
    for (int unit = 0; unit < units; unit++) first[unit + 1] = first[unit] + parts_of(unit);
    float* memory = shared_scratch[4].take<float>(Part::size(width) * first[units]);
    const auto at = [&](int index) { return Part{memory + Part::size(width) * index}; };
    pool().run(args.threads, first[units], [&](int index) {
        const int unit = int(std::upper_bound(first.begin(), first.end(), index) - first.begin()) - 1;
        Lanes s = queries_of(unit);
        part_of(unit, index - first[unit], s, at(index));
    });
    for (int unit = 0; unit < units; unit++) {
        Part whole = at(first[unit]);
        for (int index = first[unit] + 1; index < first[unit + 1]; index++) whole.join(at(index), width);
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
                        head_bytes * (head / shared_by), row_bytes, args.page_size};
        };
        Rows keys = pooled(args.k, args.k_width), values = latent ? keys : pooled(args.v, args.v_width);
        uint8_t* v = nullptr;
        if (latent) {
            uint8_t* const k = own_scratch[3].take<uint8_t>(size_t(args.length) * args.d * size);
            const size_t block = value_panel_bytes(args.wide) * panels_of(args.e);
            v = own_scratch[4].take<uint8_t>(ceil_div(args.length, KEYS) * block);
            const auto expand = [&](const Packed& w, auto put) {
                for (int panel = 0; panel < panels_of(w.n); panel++)
                    through_panel(w, head, panel, args.length, 1, 0, [&](int i) { return keys.at(i); },
                                  [&](int i, const float* sums) { put(i, panel, sums, std::min(PANEL, w.n - panel * PANEL)); });
            };
            expand(*args.uk, [&](int i, int panel, const float* sums, int columns) {
                const size_t at = size_t(i) * args.d + panel * PANEL;
                if (args.wide) std::memcpy(reinterpret_cast<float*>(k) + at, sums, size_t(columns) * 4);
                else split(sums, columns, 1, 0, reinterpret_cast<bf16*>(k) + at);
            });
            expand(*args.uv, [&](int i, int panel, const float* sums, int) {
                uint8_t* to = v + i / KEYS * block + panel * value_panel_bytes(args.wide) + i % KEYS / (args.wide ? 1 : 2) * 256;
                if (args.wide) std::memcpy(to, sums, 256);
                else
                    for (int j = 0; j < PANEL; j += LANES, to += 64) {
                        const U value = rounded(load(sums + j));
                        store(reinterpret_cast<float*>(to), (V)(i % 2 ? value | (U)load(reinterpret_cast<float*>(to)) : value >> 16));
                    }
            });
            for (int i = 0; i < args.length; i++)
                std::memcpy(k + (size_t(i) * args.d + nope) * size, keys.at(i) + size_t(rank) * size, size_t(rope) * size);
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
                    args.out[(size_t(first + lane) * args.heads + head) * args.e + j] = s.out[size_t(lane) * s.width + j] / s.total[lane];
        }
    });
}

// Scores of sparse attention: the heads of a query lie in the lanes, keys are the rows. -inf for keys yet to come.
template <bool WIDE> void index_scores(const IndexArgs& args) {
    constexpr int KIND = WIDE ? F32 : BF16, UNIT = WIDE ? 1 : 2, SLICE = 512;
    const int panels = ceil_div(args.heads, PANEL), slices = ceil_div(args.length, SLICE);
    const size_t panel = panel_bytes(KIND, args.d), row_bytes = size_t(args.d) * (WIDE ? 4 : 2);
    const Rows keys{static_cast<const uint8_t*>(args.keys), args.table, int64_t(row_bytes) * args.page_size, 0,
                    int64_t(row_bytes), args.page_size};
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

// Interleaved pairs are (x0, x1), (x2, x3)…; otherwise pair i is (x[i], x[i + r]).
void rope(const RopeArgs& args) {
    const int chunk = std::max(1, 8192 / (args.heads * args.r));
    pool().run(args.threads, ceil_div(args.rows, chunk), [&](int task) {
        for (int row = task * chunk; row < std::min(args.rows, (task + 1) * chunk); row++)
            for (int head = 0; head < args.heads; head++) {
                const float* x = args.x + row * args.x_row + head * args.x_head;
                float* out = args.out + row * args.out_row + head * args.out_head;
                const float *cos = args.cos + size_t(row) * args.r, *sin = args.sin + size_t(row) * args.r;
                const int step = args.interleaved ? 2 : 1, other = args.interleaved ? 1 : args.r;
                for (int i = 0; i < args.r; i++) {
                    const float a = x[i * step], b = x[i * step + other];
                    out[i * step] = a * cos[i] - b * sin[i];
                    out[i * step + other] = b * cos[i] + a * sin[i];
                }
            }
    });
}

// Token t of x [rows, heads, width] to page[t], place offset[t] of a pool.
void paged_write(const WriteArgs& args) {
    const size_t size = args.wide ? 4 : 2;
    for (int row = 0; row < args.rows; row++)
        for (int head = 0; head < args.heads; head++) {
            const float* x = args.x + row * args.x_row + head * args.x_head;
            const size_t place = (size_t(args.page[row]) * args.heads + head) * args.page_size + args.offset[row];
            uint8_t* to = args.pool + place * args.width * size;
            if (args.wide) std::memcpy(to, x, size_t(args.width) * 4);
            else
                for (int j = 0; j < args.width; j++) reinterpret_cast<bf16*>(to)[j] = round_bf16(x[j]);
        }
}

void rms_norm(const NormArgs& args) {
    const int chunk = std::max(1, 16384 / args.c);
    pool().run(args.threads, ceil_div(args.rows, chunk), [&](int task) {
        for (int row = task * chunk; row < std::min(args.rows, (task + 1) * chunk); row++) {
            const float* x = args.x + row * args.x_stride;
            float* out = args.out + row * args.out_stride;
            V squares{};
            int j = 0;
            for (; j + 16 <= args.c; j += 16) squares = fma(load(x + j), load(x + j), squares);
            float sum = 0;
            for (int lane = 0; lane < LANES; lane++) sum += squares[lane];
            for (; j < args.c; j++) sum += x[j] * x[j];
            const float factor = 1 / std::sqrt(sum / float(args.c) + args.eps);
            for (j = 0; j < args.c; j++) out[j] = x[j] * factor * args.weight[j];
        }
    });
}

// Maximum and Σ e^(x - maximum) of one row.
struct Row { float top; int where; double total; };
Row softmax_of(const float* x, int n) {
    V best = all(-INFINITY);
    int j = 0;
    for (; j + LANES <= n; j += LANES) best = max(best, load(x + j));
    float top = -INFINITY;
    for (int lane = 0; lane < LANES; lane++) top = std::max(top, best[lane]);
    for (; j < n; j++) top = std::max(top, x[j]);
    double total = 0;
    V part{};
    for (j = 0; j + LANES <= n; j += LANES) {
        part += exp(load(x + j) - top);
        if (j % 4096 == 4096 - LANES) {
            for (int lane = 0; lane < LANES; lane++) total += part[lane];
            part = V{};
        }
    }
    for (int lane = 0; lane < LANES; lane++) total += part[lane];
    for (; j < n; j++) total += std::exp(x[j] - top);
    return {top, int(std::find(x, x + n, top) - x), total};
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
    int whole = -1;  // the last bucket, if all of it was taken
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
        for (int j = 0; j < n; j += LANES) {  // padded with zeros
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
        if (kept < best.size() || among == k || everything) return best[kept - 1];  // else more may be let through
    }
}

void draw(const DrawArgs& args) {
    const int n = args.vocabulary, padded = ceil_div(n, LANES) * LANES;
    pool().run(args.threads, args.draws, [&](int index) {
        const float* x = args.logits + size_t(args.row[index]) * n;
        const Row raw = softmax_of(x, n);
        if (!std::isfinite(raw.total)) {  // a NaN, an infinity, or nothing but -inf: no distribution
            args.token[index] = 0;
            args.logprob[index] = NAN;
            return;
        }
        int token = raw.where;
        if (const float temperature = args.temperature[index]; temperature > 0) {
            float* p = own_scratch[0].take<float>(size_t(padded));
            double total = 0;
            for (int j = 0; j < n; j += LANES) {
                alignas(64) float some[LANES];
                std::fill(some, some + LANES, -INFINITY);
                std::memcpy(some, x + j, size_t(std::min(LANES, n - j)) * 4);
                V value = exp((load(some) - raw.top) / temperature);
                value = load(some) > all(-INFINITY) ? value : V{};
                store(p + j, value);
                float sum = 0;
                for (int lane = 0; lane < LANES; lane++) sum += value[lane];
                total += sum;
            }
            float least = 0;
            if (args.top_k[index] > 0 || args.top_p[index] < 1) {
                static thread_local std::vector<float> best;
                least = threshold(p, n, total, args.top_k[index], args.top_p[index], best);
            }
            // The cumulative distribution in vocabulary order, by blocks.
            constexpr int BLOCK_OF = 256;
            double* sums = own_scratch[1].take<double>(size_t(ceil_div(n, BLOCK_OF)));
            double kept = 0;
            for (int block = 0; block * BLOCK_OF < n; block++) {
                double sum = 0;
                for (int j = block * BLOCK_OF; j < std::min(padded, (block + 1) * BLOCK_OF); j += LANES) {
                    const V value = load(p + j), some = value >= all(least) ? value : V{};
                    store(p + j, some);
                    for (int lane = 0; lane < LANES; lane++) sum += some[lane];
                }
                sums[block] = sum;
                kept += sum;
            }
            const double aim = args.uniform[index] * kept;
            double before = 0;
            int block = 0;
            while ((block + 1) * BLOCK_OF < n && before + sums[block] <= aim) before += sums[block++];
            token = -1;
            for (int j = block * BLOCK_OF; j < n; j++) {
                if (p[j] > 0) token = j;  // if rounding leaves nothing past the aim, the last one that is possible
                before += p[j];
                if (before > aim && p[j] > 0) break;
            }
            for (int j = block * BLOCK_OF; token < 0; j--)
                if (p[j] > 0) token = j;
        }
        args.token[index] = token;
        args.logprob[index] = float(double(x[token]) - raw.top - std::log(raw.total));
    });
}

// One layer for rows that decode: what model.py does op by op, in one call.
void decode_layer(const LayerArgs& w, const StepArgs& s, uint8_t* cache) {
    const int rows = s.rows, head = w.nope + w.rope, rank = w.kv_a->n - w.rope, latent = w.kv_a->n, q_rank = w.q_a ? w.q_a->n : 0;
    const int v = w.expand_v->n, threads = s.threads;
    Scratch& scratch = shared_scratch[6];
    const size_t width = size_t(w.c) + q_rank + size_t(w.heads) * (head + latent + rank + v) + 2 * latent + w.experts + w.per_token;
    float* normed = scratch.take<float>(width * rows);
    float *q_a = normed + size_t(rows) * w.c, *q = q_a + size_t(rows) * q_rank, *kv = q + size_t(rows) * w.heads * head;
    float *row = kv + size_t(rows) * latent, *query = row + size_t(rows) * latent, *mixed = query + size_t(rows) * w.heads * latent;
    float *value = mixed + size_t(rows) * w.heads * rank, *logits = value + size_t(rows) * w.heads * v;
    float* weight = logits + size_t(rows) * w.experts;
    const auto product = [&](const float* x, const Packed* m, const float* bias, float* out, int add) {
        return LinearArgs{x, m->k, 0, m, bias, out, m->n, 0, rows, w.parts, add, threads};
    };

    rms_norm({s.x, w.c, w.attention_norm, normed, w.c, rows, w.c, w.eps, threads});
    if (w.q_a) {
        const LinearArgs both[2] = {product(normed, w.q_a, w.q_a_bias, q_a, 0), product(normed, w.kv_a, w.kv_a_bias, kv, 0)};
        linears(both, 2);
        rms_norm({q_a, q_rank, w.q_norm, q_a, q_rank, rows, q_rank, w.latent_eps, threads});
        linear(product(q_a, w.q, nullptr, q, 0));
    } else {
        const LinearArgs both[2] = {product(normed, w.q, nullptr, q, 0), product(normed, w.kv_a, w.kv_a_bias, kv, 0)};
        linears(both, 2);
    }
    rms_norm({kv, latent, w.kv_norm, row, latent, rows, rank, w.latent_eps, threads});
    rope({kv + rank, latent, 0, s.cos, s.sin, row + rank, latent, 0, rows, 1, w.rope / 2, w.interleaved, threads, 0});
    paged_write({cache, s.page, s.offset, row, latent, 0, s.pages, rows, 1, latent, s.page_size, s.wide});
    linear({q, w.heads * head, head, w.absorb, nullptr, query, int64_t(w.heads) * latent, latent, rows, w.parts, 0, threads});
    rope({q + w.nope, w.heads * head, head, s.cos, s.sin, query + rank, int64_t(w.heads) * latent, latent, rows, w.heads, w.rope / 2,
          w.interleaved, threads, 0});
    decode({query, cache, cache, s.table, s.length, mixed, s.table_stride, s.table_width, s.pages, rows, w.heads, 1, latent, rank, latent, latent, s.page_size,
            s.wide, threads, w.scale});
    linear({mixed, w.heads * rank, rank, w.expand_v, nullptr, value, int64_t(w.heads) * v, v, rows, w.parts, 0, threads});
    linear(product(value, w.o, w.o_bias, s.x, 1));

    rms_norm({s.x, w.c, w.mlp_norm, normed, w.c, rows, w.c, w.eps, threads});
    if (!w.router) {
        float* gated = shared_scratch[7].take<float>(size_t(rows) * w.gate->n);
        swiglu_linear({normed, w.c, 0, w.gate, nullptr, gated, w.gate->n, 0, rows, w.parts, 0, threads}, *w.up);
        linear(product(gated, w.down, nullptr, s.x, 1));
        return;
    }
    int64_t* expert = shared_scratch[7].take<int64_t>(size_t(rows) * w.per_token);
    LinearArgs to_router = product(normed, w.router, nullptr, logits, 0);
    to_router.parts = 3;
    linear(to_router);
    route({logits, w.correction, expert, weight, rows, w.experts, w.groups, w.groups_kept, w.per_token, w.softmax, w.group_by_best,
           w.normalise, w.factor, threads});
    experts({normed, expert, weight, w.gate, w.up, w.down, w.shared_gate, w.shared_up, w.shared_down, s.x, rows, w.per_token, w.experts,
             w.parts, 1, threads});
}

#define STRINGIFY(x) #x
#define NAME(x) STRINGIFY(x)
const Kernels table = {NAME(ISA), pack_codes, linear, swiglu_linear, experts, decode, prefill, index_scores, route, rope, paged_write, rms_norm, draw, decode_layer};
#undef NAME
#undef STRINGIFY
#undef INLINE

}  // namespace ISA
}  // namespace
#endif
