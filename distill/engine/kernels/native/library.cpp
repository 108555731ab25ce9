// The library: one translation unit, a plain C interface and no torch header, so that one build serves every torch.
//
// The kernels (isa.h) are compiled once for each instruction set, and the best one that the machine has is picked at run
// time. Several translation units were rejected: all instruction sets share these headers, and a compiler that sees the
// whole file inlines the innermost products.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>
#include <mutex>
#include <string>
#include <unistd.h>
#include <vector>

// Instruction sets past the portable one are chosen function by function, which is written differently for other compilers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define X86_LEVELS
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Tiles need an assembler that knows them, which compilers of that age are installed with.
#if defined(X86_LEVELS) && __GNUC__ >= 11
#define TILE_VARIANTS
#endif

#include "arguments.h"
#include "checks.h"
#include "common.h"
#include "kernels.h"
#include "layouts.h"
#include "threads.h"

#define ISA portable
#define LEVEL 0
#include "isa.h"
#undef ISA
#ifdef TILE_VARIANTS
#define ISA amx_emulated_portable
#define BASE portable
#define TILES 1
#include "tile_variant.h"
#undef ISA
#undef BASE
#undef TILES
#endif
#undef LEVEL

#ifdef X86_LEVELS
#define ISA avx2
#define LEVEL 1
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#include "isa.h"
#pragma GCC pop_options
#undef ISA
#undef LEVEL
#define ISA avx512
#define LEVEL 2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq")
#include "isa.h"
#pragma GCC pop_options
#undef ISA
#undef LEVEL
#define ISA avx512_bf16
#define LEVEL 3
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512bf16")
#include "isa.h"
#undef ISA
#ifdef TILE_VARIANTS
#define BASE avx512_bf16
#define ISA amx_emulated
#define TILES 1
#include "tile_variant.h"
#undef ISA
#undef TILES
#define ISA amx
#define TILES 2
#include "tile_variant.h"
#undef ISA
#undef TILES
#undef BASE
#endif
#pragma GCC pop_options
#undef LEVEL
#endif

#include "amx.h"

namespace {
// The instruction sets of this machine, the fastest first.
std::vector<const Kernels*> supported(bool with_amx = true) {
    std::vector<const Kernels*> list;
#ifdef TILE_VARIANTS
    if (with_amx && !amx_missing()) list.push_back(&amx::table);
#endif
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
const Kernels* use(const Kernels* kernels) {
    pool().leave = kernels->leave;
    return kernels;
}
const Kernels* chosen = use(supported(false).front()); // AMX only by its name (see cpu_library.py)
// Emulations of others, for tests: found by name only.
std::vector<const Kernels*> emulations() {
    std::vector<const Kernels*> list;
#ifdef TILE_VARIANTS
    const auto sets = supported(false);
    if (std::find(sets.begin(), sets.end(), &avx512_bf16::table) != sets.end()) list.push_back(&amx_emulated::table);
    list.push_back(&amx_emulated_portable::table);
#endif
    return list;
}
} // namespace

extern "C" {

// The instruction set in use; with a name, switches to it first. Null if this machine does not have it.
const char* distill_isa(const char* name) {
    if (name) {
        auto list = supported();
        for (const Kernels* emulation : emulations()) list.push_back(emulation);
        const auto match = std::find_if(list.begin(), list.end(), [&](auto* k) { return !std::strcmp(k->name, name); });
        if (match == list.end()) return nullptr;
        std::lock_guard<std::mutex> lock(one_caller);
        chosen = use(*match);
    }
    return chosen->name;
}

// Why AMX cannot be used; null if it can.
const char* distill_amx_missing() { return amx_missing(); }

// With an instruction set in use that has tiles: one tile instruction, sums [16, 16] += rows [16, 32] · columns [16 pairs
// of k, 16] (see `tile_probe`); and whether few rows are multiplied by vectors in place of tiles. False: it has none.
bool distill_tile_probe(float* sums, const uint16_t* rows, const uint16_t* columns) {
    if (chosen->probe) chosen->probe(sums, rows, columns);
    return chosen->probe;
}
bool distill_tile_vectors(bool used) {
    if (chosen->use_vectors) *chosen->use_vectors = used;
    return chosen->use_vectors;
}

// The layout of every struct of the interface (see `all_layouts`).
const char* distill_layouts() {
    static const std::string text = all_layouts();
    return text.c_str();
}

int64_t distill_packed_bytes(int kind, int n, int k) { return int64_t(panels_of(n)) * int64_t(panel_bytes(kind, k)); }

} // extern "C"

#include "packing.h"

extern "C" {

// Pack matrices, and look for NaN codes and numbers that are not finite. A file is read a panel at a time, so that a
// panel is in the cache when it is packed and takes no memory. Returns the number of a matrix that has such a number, -1
// for none, -2 if a file could not be read. On one thread it may run beside the other ops.
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
        const int64_t size = 4 / unit_k(job.stored), stride = job.row_stride * size;
        const uint8_t* from = job.source + panel * PANEL * stride;
        if (job.fd >= 0) {
            uint8_t* buffer = own_scratch[0].take<uint8_t>(size_t(rows * stride));
            for (int64_t done = 0, all = rows * stride; done < all;) {
                const int64_t got =
                    pread(job.fd, buffer + done, size_t(all - done), job.offset + panel * PANEL * stride + done);
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
            if (has_damage(job.stored, from + row * stride, job.k) && bad == -1) bad = index;
        int64_t row_stride = job.row_stride;
        if (job.stored != job.kind) {
            bf16* rounded = own_scratch[1].take<bf16>(size_t(rows) * job.k);
            for (int row = 0; row < rows; row++)
                round_row(reinterpret_cast<const float*>(from + row * stride), job.k, rounded + row * job.k);
            from = reinterpret_cast<const uint8_t*>(rounded);
            row_stride = job.k;
            if (has_damage(BF16, from, int64_t(rows) * job.k) && bad == -1) bad = index; // the largest become infinite
        }
        if (job.out)
            pack_panel(job.kind, rows, job.k, from, row_stride, job.out + panel * panel_bytes(job.kind, job.k));
    });
    return bad;
}

// Whether any e4m3 code is a NaN.
int distill_has_nan(const uint8_t* codes, int64_t count, int threads) {
    std::lock_guard<std::mutex> lock(one_caller);
    constexpr int64_t SLICE = 1 << 18;
    std::atomic<int> any{0};
    pool().run(threads, int((count + SLICE - 1) / SLICE), [&](int task) {
        if (has_nan(codes + task * SLICE, std::min(SLICE, count - task * SLICE))) any = 1;
    });
    return any;
}

// Each op returns null, or what is wrong with its arguments, in which case it has done nothing.
#define OP(name, Args)                                      \
    const char* distill_##name(const Args* args) {          \
        if (const char* wrong = check(*args)) return wrong; \
        std::lock_guard<std::mutex> lock(one_caller);       \
        chosen->name(*args);                                \
        return nullptr;                                     \
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
OP(likeliest, LikeliestArgs)
OP(delta_rule, DeltaArgs)
OP(sigmoid_gate, SigmoidGateArgs)
OP(train_norm, TrainNormArgs)
OP(train_gate, TrainGateArgs)
OP(train_rope, TrainRopeArgs)
OP(train_softmax, TrainSoftmaxArgs)
#undef OP

const char* distill_swiglu_linear(const LinearArgs* args, const Packed* up) {
    std::lock_guard<std::mutex> lock(one_caller);
    chosen->swiglu_linear(*args, *up);
    return nullptr;
}

// pools: the cache of each layer; for dense layers its keys, then its values.
const char* distill_decode_layers(const LayerArgs* layers, const StepArgs* step, uint8_t* const* pools, int count) {
    if (const char* wrong = check(*step)) return wrong;
    std::lock_guard<std::mutex> lock(one_caller);
    for (int i = 0; i < count; i++) chosen->decode_layer(layers[i], *step, pools[i]);
    return nullptr;
}

const char* distill_decode_dense_layers(const DenseLayerArgs* layers, const StepArgs* step, uint8_t* const* pools,
                                        int count) {
    if (const char* wrong = check(*step)) return wrong;
    std::lock_guard<std::mutex> lock(one_caller);
    for (int i = 0; i < count; i++) chosen->decode_dense_layer(layers[i], *step, pools[2 * i], pools[2 * i + 1]);
    return nullptr;
}

} // extern "C"
