// Whether this process may use AMX: the processor has it, the kernel grants it, and its bits are those of its definition.
//
// The kernel is asked once, before the first instruction on tiles (arch_prctl; it may refuse, as where a thread's stack
// for signals is too small for them). Then the instruction is held against the emulation on random tiles, which takes
// some milliseconds: a wrong bit would change every text silently.
#pragma once

#include "common.h"

#ifdef TILE_VARIANTS
#include <cpuid.h>
#include <sys/syscall.h>
#endif

namespace {

#ifdef TILE_VARIANTS

bool processor_has_amx() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false; // the system saves extended states
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & d >> 24 & 1)) return false; // AMX-BF16, AMX-TILE
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low >> 17 & 3) == 3; // shapes and contents of tiles
}

bool kernel_grants_amx() {
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}

// Bits of bfloat16 numbers: of any size, near one, or whose products are about the smallest normal float32.
struct Draw {
    uint64_t state;
    uint32_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return uint32_t(state >> 32);
    }
    bf16 number(int kind) {
        const uint32_t bits = next(), sign_and_mantissa = bits & 0x807f, exponent = bits >> 16 & 0xff;
        const uint32_t of[] = {exponent % 255, 120 + exponent % 16, 56 + exponent % 16};
        return bf16(sign_and_mantissa | of[kind] << 7);
    }
};

bool amx_keeps_to_its_definition() {
    Draw draw{1};
    for (int trial = 0; trial < 24; trial++) {
        alignas(64) bf16 rows[512], columns[512];
        alignas(64) float real[256], emulated[256];
        for (int i = 0; i < 512; i++) rows[i] = draw.number(trial % 3), columns[i] = draw.number(trial % 3);
        for (int i = 0; i < 256; i++) {
            const uint32_t bits = uint32_t(draw.number(trial % 3)) << 16 | draw.next() >> 16;
            std::memcpy(&real[i], &bits, 4);
        }
        std::memcpy(emulated, real, sizeof real);
        amx::tile_probe(real, rows, columns);
        amx_emulated_portable::tile_probe(emulated, rows, columns);
        for (int i = 0; i < 256; i++) {
            const bool nan = real[i] != real[i] && emulated[i] != emulated[i]; // whichever
            if (!nan && std::memcmp(&real[i], &emulated[i], 4)) return false;
        }
    }
    return true;
}

const char* find_amx_missing() {
    __builtin_cpu_init();
    const bool base = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512bf16");
    if (!base || !processor_has_amx()) return "the processor has no AMX for bfloat16, or the system does not enable it";
    if (!kernel_grants_amx()) return "the operating system refuses the use of AMX";
    if (!amx_keeps_to_its_definition()) return "the processor's AMX gives other bits than its definition";
    return nullptr;
}
const char* amx_missing() {
    static const char* const missing = find_amx_missing();
    return missing;
}

#else
const char* amx_missing() { return "the kernels were compiled without it (needed: x86-64 and GCC 11)"; }
#endif

} // namespace
