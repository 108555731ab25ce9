// The kernels for one instruction set: library.cpp includes this file once for each, with ISA (its name) and LEVEL
// (0: portable, 1: AVX2, 2: AVX-512, 3: AVX-512 with bfloat16) defined. Hence no include guard, here or in isa/.
namespace {
namespace ISA {

#include "isa/vectors.h"
#include "isa/products.h"
#include "isa/experts.h"
#include "isa/attention.h"
#include "isa/rows.h"
#include "isa/draw.h"
#include "isa/layer.h"
#include "isa/training.h"
#include "isa/delta.h"

#define STRINGIFY(x) #x
#define NAME(x) STRINGIFY(x)
const Kernels table = {
    NAME(ISA),  pack_words,   linear,      swiglu_linear, experts,    decode,       prefill,      index_scores,
    route,      rope,         paged_write, rms_norm,      draw,       likeliest,    decode_layer, decode_dense_layer,
    delta_rule, sigmoid_gate, train_norm,  train_gate,    train_rope, train_softmax};
#undef NAME
#undef STRINGIFY
#undef INLINE

} // namespace ISA
} // namespace
