// The kernels of one instruction set, as a table of functions.
#pragma once

#include "arguments.h"

namespace {
struct Kernels {
    const char* name;
    void (*pack_words)(bool codes, const uint8_t* rows, int64_t row_bytes, int words, uint8_t* panel);
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
    void (*likeliest)(const LikeliestArgs&);
    void (*decode_layer)(const LayerArgs&, const StepArgs&, uint8_t* pool);
    void (*decode_dense_layer)(const DenseLayerArgs&, const StepArgs&, uint8_t* k_pool, uint8_t* v_pool);
    void (*delta_rule)(const DeltaArgs&);
    void (*sigmoid_gate)(const SigmoidGateArgs&);
    void (*train_norm)(const TrainNormArgs&);
    void (*train_gate)(const TrainGateArgs&);
    void (*train_rope)(const TrainRopeArgs&);
    void (*train_softmax)(const TrainSoftmaxArgs&);
    // Of variants with tiles, else null: what a thread does when its part of a job is done; one instruction alone; whether
    // few rows are multiplied by vectors.
    void (*leave)() = nullptr;
    void (*probe)(float* sums, const uint16_t* rows, const uint16_t* columns) = nullptr;
    bool* use_vectors = nullptr;
};
} // namespace
