// Layers for rows that decode: what model.py does op by op, in one call.
// Part of isa.h, within the namespace of one instruction set.

// Rows of x times a matrix; out's rows follow each other.
LinearArgs product_of(const StepArgs& s, int parts, const float* x, const Packed* m, const float* bias, float* out,
                      int add) {
    return {.x = x,
            .x_stride = m->k,
            .x_group = 0,
            .w = m,
            .bias = bias,
            .out = out,
            .out_stride = m->n,
            .out_group = 0,
            .rows = s.rows,
            .parts = parts,
            .add = add,
            .threads = s.threads};
}

// The gated MLP, added to the hidden states.
void decode_mlp(const StepArgs& s, int parts, const float* normed, const Packed* gate, const Packed* up,
                const Packed* down) {
    float* gated = shared_scratch[7].take<float>(size_t(s.rows) * gate->n);
    swiglu_linear(product_of(s, parts, normed, gate, nullptr, gated, 0), *up);
    linear(product_of(s, parts, gated, down, nullptr, s.x, 1));
}

// Heads of the rows of a step: consecutive rows lie `row` floats apart, heads of a row `head` floats.
struct Heads {
    float* x;
    int64_t row, head;
    int count;
};

void decode_norm(const StepArgs& s, const float* x, int64_t stride, const float* weight, float* out, int rows, int c,
                 float eps) {
    rms_norm({.x = x,
              .x_stride = stride,
              .weight = weight,
              .out = out,
              .out_stride = stride,
              .rows = rows,
              .c = c,
              .eps = eps,
              .threads = s.threads});
}

// The first `width` numbers of each head.
void decode_rope(const StepArgs& s, const Heads& from, const Heads& to, int width, int interleaved) {
    rope({.x = from.x,
          .x_row = from.row,
          .x_head = from.head,
          .cos = s.cos,
          .sin = s.sin,
          .out = to.x,
          .out_row = to.row,
          .out_head = to.head,
          .rows = s.rows,
          .heads = from.count,
          .r = width / 2,
          .interleaved = interleaved,
          .threads = s.threads,
          .unused = 0});
}

void decode_write(const StepArgs& s, const Heads& from, int width, uint8_t* pool_) {
    paged_write({.pool = pool_,
                 .page = s.page,
                 .offset = s.offset,
                 .x = from.x,
                 .x_row = from.row,
                 .x_head = from.head,
                 .pages = s.pages,
                 .rows = s.rows,
                 .heads = from.count,
                 .width = width,
                 .page_size = s.page_size,
                 .wide = s.wide});
}

// Attention of queries [heads, d] over keys whose first d, and values whose first e numbers count.
void decode_attention(const StepArgs& s, const float* q, const uint8_t* k, const uint8_t* v, float* out, int heads,
                      int kv_heads, int d, int e, float scale) {
    decode({.q = q,
            .k = k,
            .v = v,
            .table = s.table,
            .length = s.length,
            .out = out,
            .table_stride = s.table_stride,
            .table_width = s.table_width,
            .pages = s.pages,
            .rows = s.rows,
            .heads = heads,
            .kv_heads = kv_heads,
            .d = d,
            .e = e,
            .k_width = d,
            .v_width = k == v ? d : e, // latents are keys and values
            .page_size = s.page_size,
            .wide = s.wide,
            .threads = s.threads,
            .scale = scale});
}

// A layer with latent attention.
void decode_layer(const LayerArgs& w, const StepArgs& s, uint8_t* cache) {
    const int rows = s.rows, head = w.nope + w.rope, rank = w.kv_a->n - w.rope, latent = w.kv_a->n,
              q_rank = w.q_a ? w.q_a->n : 0;
    const int v = w.expand_v->n, threads = s.threads;
    Scratch& scratch = shared_scratch[6];
    const size_t width =
        size_t(w.c) + q_rank + size_t(w.heads) * (head + latent + rank + v) + 2 * latent + w.experts + w.per_token;
    float* normed = scratch.take<float>(width * rows);
    float *q_a = normed + size_t(rows) * w.c, *q = q_a + size_t(rows) * q_rank, *kv = q + size_t(rows) * w.heads * head;
    float *row = kv + size_t(rows) * latent, *query = row + size_t(rows) * latent,
          *mixed = query + size_t(rows) * w.heads * latent;
    float *value = mixed + size_t(rows) * w.heads * rank, *logits = value + size_t(rows) * w.heads * v;
    float* weight = logits + size_t(rows) * w.experts;
    const auto product = [&](const float* x, const Packed* m, const float* bias, float* out, int add) {
        return product_of(s, w.parts, x, m, bias, out, add);
    };
    // Each head's row times its own matrix, heads side by side in x and, `out_head` apart, in out.
    const auto heads_product = [&](const float* x, int x_head, const Packed* m, float* out, int out_head) {
        return LinearArgs{.x = x,
                          .x_stride = int64_t(w.heads) * x_head,
                          .x_group = x_head,
                          .w = m,
                          .bias = nullptr,
                          .out = out,
                          .out_stride = int64_t(w.heads) * out_head,
                          .out_group = out_head,
                          .rows = rows,
                          .parts = w.parts,
                          .add = 0,
                          .threads = threads};
    };
    const auto norm = [&](const float* x, int64_t stride, const float* by, float* out, int c, float eps) {
        decode_norm(s, x, stride, by, out, rows, c, eps);
    };

    norm(s.x, w.c, w.attention_norm, normed, w.c, w.eps);
    const LinearArgs to_latent = product(normed, w.kv_a, w.kv_a_bias, kv, 0);
    if (w.q_a) {
        const LinearArgs both[2] = {product(normed, w.q_a, w.q_a_bias, q_a, 0), to_latent};
        linears(both, 2);
        norm(q_a, q_rank, w.q_norm, q_a, q_rank, w.latent_eps);
        linear(product(q_a, w.q, nullptr, q, 0));
    } else {
        const LinearArgs both[2] = {product(normed, w.q, nullptr, q, 0), to_latent};
        linears(both, 2);
    }
    norm(kv, latent, w.kv_norm, row, rank, w.latent_eps);
    decode_rope(s, {kv + rank, latent, 0, 1}, {row + rank, latent, 0, 1}, w.rope, w.interleaved);
    decode_write(s, {row, latent, 0, 1}, latent, cache);
    linear(heads_product(q, head, w.absorb, query, latent));
    const int64_t queries = int64_t(w.heads) * latent;
    decode_rope(s, {q + w.nope, int64_t(w.heads) * head, head, w.heads}, {query + rank, queries, latent, w.heads},
                w.rope, w.interleaved);
    decode_attention(s, query, cache, cache, mixed, w.heads, 1, latent, rank, w.scale);
    linear(heads_product(mixed, rank, w.expand_v, value, v));
    linear(product(value, w.o, w.o_bias, s.x, 1));

    norm(s.x, w.c, w.mlp_norm, normed, w.c, w.eps);
    if (!w.router) return decode_mlp(s, w.parts, normed, w.gate, w.up, w.down);
    int64_t* expert = shared_scratch[7].take<int64_t>(size_t(rows) * w.per_token);
    LinearArgs to_router = product(normed, w.router, nullptr, logits, 0);
    to_router.parts = 3;
    linear(to_router);
    route({.logits = logits,
           .bias = w.correction,
           .expert = expert,
           .weight = weight,
           .tokens = rows,
           .experts = w.experts,
           .groups = w.groups,
           .groups_kept = w.groups_kept,
           .per_token = w.per_token,
           .softmax = w.softmax,
           .group_by_best = w.group_by_best,
           .normalise = w.normalise,
           .factor = w.factor,
           .threads = threads});
    experts({.x = normed,
             .expert = expert,
             .weight = weight,
             .gate = w.gate,
             .up = w.up,
             .down = w.down,
             .shared_gate = w.shared_gate,
             .shared_up = w.shared_up,
             .shared_down = w.shared_down,
             .out = s.x,
             .tokens = rows,
             .per_token = w.per_token,
             .experts = w.experts,
             .parts = w.parts,
             .add = 1,
             .threads = threads});
}

// A dense layer with grouped-query attention.
void decode_dense_layer(const DenseLayerArgs& w, const StepArgs& s, uint8_t* k_pool, uint8_t* v_pool) {
    const int rows = s.rows, d = w.head_dim, queries = w.heads * d, keys = w.kv_heads * d;
    float* normed = shared_scratch[6].take<float>(size_t(rows) * (w.c + 2 * queries + 2 * keys));
    float *q = normed + size_t(rows) * w.c, *k = q + size_t(rows) * queries, *v = k + size_t(rows) * keys;
    float* mixed = v + size_t(rows) * keys;
    const auto norm = [&](const float* x, const float* by, float* out, int count, int c) {
        decode_norm(s, x, c, by, out, count, c, w.eps);
    };
    const auto of = [&](float* x, int heads) { return Heads{x, int64_t(heads) * d, d, heads}; };
    const auto place = [&](const Heads& x, const float* by) { // in the sequence
        if (by) norm(x.x, by, x.x, rows * x.count, d);
        if (w.rotated) decode_rope(s, x, x, d, w.interleaved);
    };

    norm(s.x, w.attention_norm, normed, rows, w.c);
    const LinearArgs all[3] = {product_of(s, w.parts, normed, w.q, w.q_bias, q, 0),
                               product_of(s, w.parts, normed, w.k, w.k_bias, k, 0),
                               product_of(s, w.parts, normed, w.v, w.v_bias, v, 0)};
    linears(all, 3);
    place(of(k, w.kv_heads), w.k_norm);
    decode_write(s, of(k, w.kv_heads), d, k_pool);
    decode_write(s, of(v, w.kv_heads), d, v_pool);
    place(of(q, w.heads), w.q_norm);
    decode_attention(s, q, k_pool, v_pool, mixed, w.heads, w.kv_heads, d, d, w.scale);
    linear(product_of(s, w.parts, mixed, w.o, w.o_bias, s.x, 1));
    norm(s.x, w.mlp_norm, normed, rows, w.c);
    decode_mlp(s, w.parts, normed, w.gate, w.up, w.down);
}
