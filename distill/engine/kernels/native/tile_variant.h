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
const Kernels table = {NAME(ISA),
                       BASE::pack_words,
                       linear,
                       swiglu_linear,
                       experts,
                       BASE::decode,
                       BASE::prefill,
                       BASE::index_scores,
                       BASE::route,
                       BASE::rope,
                       BASE::paged_write,
                       BASE::rms_norm,
                       BASE::draw,
                       decode_layer,
                       decode_dense_layer,
                       BASE::train_norm,
                       BASE::train_gate,
                       BASE::train_rope,
                       BASE::train_softmax,
                       tile_release,
                       tile_probe,
                       &use_vectors};
#undef INLINE
#undef NAME
#undef STRINGIFY

} // namespace ISA
} // namespace
