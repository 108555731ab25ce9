// The kernels of an instruction set with products on tiles: library.cpp includes this file once for each variant, with
// ISA (its name), BASE (the instruction set that it extends, whose LEVEL stays defined) and TILES (2: the processor's
// tiles, 1: emulated ones) defined. Attention, rows, drawing and training are the base's. Hence no include guard.
namespace {
namespace ISA {
using namespace BASE;
#define INLINE inline __attribute__((always_inline))

#include "isa/tile_registers.h"
#include "isa/tile_products.h"
#include "isa/products.h"
#include "isa/experts.h"
#include "isa/layer.h"

#define STRINGIFY(x) #x
#define NAME(x) STRINGIFY(x)
const Kernels table = [] {
    Kernels kernels = BASE::table;
    kernels.name = NAME(ISA);
    kernels.linear = linear;
    kernels.swiglu_linear = swiglu_linear;
    kernels.experts = experts;
    kernels.decode_layer = decode_layer;
    kernels.decode_dense_layer = decode_dense_layer;
    kernels.leave = tile_release;
    kernels.probe = tile_probe;
    kernels.use_vectors = &use_vectors;
    return kernels;
}();
#undef INLINE
#undef NAME
#undef STRINGIFY

} // namespace ISA
} // namespace
