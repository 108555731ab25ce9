// Arguments of the ops, laid out alike in cpu_structs.py; layouts.h describes them to it.
#pragma once

#include <cstdint>

// A packed matrix, or `groups` of equal ones, one after the other. scale: [groups][panels][⌈k/128⌉], FP8 only.
struct Packed {
    int32_t kind, n, k, groups;
    const uint8_t* data;
    const float* scale;
};

// A row-major matrix to pack: in memory, or (fd ≥ 0) at a file's offset, rows without gaps. out: null to look at it only.
// stored: its kind in the source, which is `kind`, or F32 for a matrix that is rounded to BF16.
struct PackJob {
    const uint8_t* source;
    int64_t row_stride, offset;
    uint8_t* out;
    int32_t fd, stored, kind, n, k;
};

struct LinearArgs {
    const float* x;
    int64_t x_stride, x_group; // between rows, and between the groups of a row
    const Packed* w;
    const float* bias; // [groups · n] or null
    float* out;
    int64_t out_stride, out_group;
    int32_t rows, parts, add, threads; // add: to what `out` holds
};

struct ExpertsArgs {
    const float* x;        // [tokens, c]
    const int64_t* expert; // [tokens, per_token]
    const float* weight;   // likewise
    const Packed* gate;    // one per expert
    const Packed* up;
    const Packed* down;
    const Packed* shared_gate; // null: no shared expert
    const Packed* shared_up;
    const Packed* shared_down;
    float* out; // [tokens, c]
    int32_t tokens, per_token, experts, parts, add, threads;
};

struct DecodeArgs {
    const float* q; // [rows, heads, d]
    const void* k;  // pools [pages, kv_heads, page_size, width]
    const void* v;
    const int64_t* table;  // [rows, table_stride]
    const int64_t* length; // [rows]
    float* out;            // [rows, heads, e]
    int64_t table_stride;
    int32_t table_width, pages, rows, heads, kv_heads, d, e, k_width, v_width, page_size, wide,
        threads; // wide: pools are float32
    float scale;
};

struct PrefillArgs {
    const float* q; // [rows, heads, d]: the last `rows` of `length` positions
    const void* k;
    const void* v;        // GQA: pools as above. MLA: v is null, k the pool of latents
    const int64_t* table; // [pages]
    const Packed* uk;     // MLA: groups = heads, [nope, latent] and [e, latent]
    const Packed* uv;
    float* out; // [rows, heads, e]
    int32_t table_width, pages, rows, length, heads, kv_heads, d, e, k_width, v_width, page_size, wide, threads;
    float scale;
};

struct IndexArgs {
    const float* q;       // [rows, heads, d]: the last `rows` of `length` positions
    const float* weight;  // [rows, heads]
    const void* keys;     // pool [pages, 1, page_size, d]
    const int64_t* table; // [pages]
    float* out;           // [rows, length]
    int32_t table_width, pages, rows, length, heads, d, page_size, wide, threads, unused;
};

struct RouteArgs {
    const float* logits; // [tokens, experts]
    const float* bias;   // [experts] or null; moves the choice, never the weight
    int64_t* expert;     // [tokens, per_token], best first
    float* weight;
    int32_t tokens, experts, groups, groups_kept, per_token, softmax, group_by_best, normalise;
    float factor;
    int32_t threads;
};

struct RopeArgs {
    const float* x;        // [rows, heads, 2r]
    int64_t x_row, x_head; // strides
    const float* cos;      // [rows, r]
    const float* sin;
    float* out;
    int64_t out_row, out_head;
    int32_t rows, heads, r, interleaved, threads, unused;
};

struct WriteArgs {
    uint8_t* pool;       // [pages, heads, page_size, width]
    const int64_t* page; // [rows]
    const int64_t* offset;
    const float* x; // [rows, heads, width]
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
    const Packed *q_a, *q, *kv_a, *absorb, *expand_v, *o; // q_a null: q takes the hidden state
    const float *q_a_bias, *kv_a_bias, *o_bias;           // or null
    const Packed* router;                                 // null: gate, up and down are a plain MLP
    const Packed *gate, *up, *down, *shared_gate, *shared_up, *shared_down;
    int32_t c, heads, nope, rope, interleaved, experts, groups, groups_kept, per_token, softmax, group_by_best,
        normalise, parts;
    float eps, latent_eps, scale, factor;
    int32_t unused;
};

// A dense layer with grouped-query attention.
struct DenseLayerArgs {
    const float *attention_norm, *q_norm, *k_norm, *mlp_norm; // q_norm, k_norm: over each head, or null
    const Packed *q, *k, *v, *o, *gate, *up, *down;
    const float *q_bias, *k_bias, *v_bias, *o_bias; // or null
    int32_t c, heads, kv_heads, head_dim, rotated, interleaved, parts;
    float eps, scale;
    int32_t unused;
};

struct StepArgs {
    float* x;         // [rows, c], in and out
    const float* cos; // [rows, rope/2]
    const float* sin;
    const int64_t *page, *offset, *table, *length;
    int64_t table_stride;
    int32_t table_width, pages, rows, page_size, wide, threads;
};

// Drawing tokens: see `draw` in reference.py. Threads take rows.
struct DrawArgs {
    const float* logits; // [rows, vocabulary]
    const int64_t* row;  // [draws]
    const double* uniform;
    const float* temperature;
    const int64_t* top_k; // 0: off
    const double* top_p;
    int64_t* token;
    float* logprob;
    int32_t rows, draws, vocabulary, threads;
};

// The likeliest tokens of each row: see `likeliest` in reference.py. Threads take rows.
struct LikeliestArgs {
    const float* logits;     // [rows, vocabulary]
    const float* normaliser; // [rows]
    const int64_t* given;    // [rows, given_count], -1 for none
    int32_t* id;             // [rows, k + given_count]
    float* logprob;
    int32_t rows, vocabulary, k, given_count, threads, unused;
};

// A gated delta rule: see `delta_rule` in reference_delta.py. Threads take channels, then heads.
struct DeltaArgs {
    const float *qkv, *write, *decay,
        *gate; // [rows, channels], twice [rows, value_heads], [rows, value_heads · value_dim]
    const float *conv, *rate, *rate_bias, *norm; // [taps, channels], twice [value_heads], [value_dim]
    float* conv_state;                           // [slots, taps - 1, channels]
    float* state;                                // [slots, value_heads, key_dim, value_dim]
    const int64_t *row, *first, *slot, *fresh;   // [rows], [sequences + 1], twice [sequences]
    float* out;                                  // as gate
    int32_t rows, sequences, slots, channels, key_heads, value_heads, key_dim, value_dim, taps, threads;
    float eps;
    int32_t unused;
};
struct SigmoidGateArgs {
    const float *x, *gate;
    float* out;
    int64_t count;
    int32_t threads, unused;
};

// Ops of training (isa/training.h). `half`: rows are bfloat16, else float32. They take TRAIN_CHUNK rows at a time.
constexpr int TRAIN_CHUNK = 16;
struct TrainNormArgs {
    const void* x; // [rows, c]
    const float* weight;
    float* factor;          // [rows]: out forward, in backward
    void* out;              // [rows, c]; backward: the gradient
    const void* residual;   // backward: added to x_gradient, or null
    void* x_gradient;       // backward, [rows, c]
    float* weight_gradient; // backward, [⌈rows / TRAIN_CHUNK⌉, c]
    int32_t rows, c, x_half, out_half, backward, threads;
    float eps;
    int32_t unused;
};
struct TrainGateArgs {
    const void* both; // [rows, 2, n]: gate and up
    void* out;        // [rows, n]; backward: in the gradient, out the product
    void* gradient;   // backward, [rows, 2, n]
    int32_t rows, n, half, backward, threads, unused;
};
struct TrainRopeArgs {
    const void* x;
    int64_t x_row, x_head;
    const float *cos, *sin; // [rows, r]
    void* out;
    int64_t out_row, out_head;
    int32_t rows, heads, r, half, backward, threads;
};
struct TrainSoftmaxArgs {
    void* scores;                               // [rows, width]; backward: the probabilities
    void* gradient;                             // backward
    int32_t rows, width, heads, queries, first; // a matrix has a row for each of `heads` of `queries`, from `first` on
    int32_t half, backward, threads;
    float scale;
};
