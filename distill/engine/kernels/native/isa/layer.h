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
        rms_norm({.x = x,
                  .x_stride = stride,
                  .weight = by,
                  .out = out,
                  .out_stride = stride,
                  .rows = rows,
                  .c = c,
                  .eps = eps,
                  .threads = threads});
    };
    const auto rotate = [&](const float* x, int64_t x_row, int64_t x_head, float* out, int64_t out_row,
                            int64_t out_head, int heads) {
        rope({.x = x,
              .x_row = x_row,
              .x_head = x_head,
              .cos = s.cos,
              .sin = s.sin,
              .out = out,
              .out_row = out_row,
              .out_head = out_head,
              .rows = rows,
              .heads = heads,
              .r = w.rope / 2,
              .interleaved = w.interleaved,
              .threads = threads,
              .unused = 0});
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
    rotate(kv + rank, latent, 0, row + rank, latent, 0, 1);
    paged_write({.pool = cache,
                 .page = s.page,
                 .offset = s.offset,
                 .x = row,
                 .x_row = latent,
                 .x_head = 0,
                 .pages = s.pages,
                 .rows = rows,
                 .heads = 1,
                 .width = latent,
                 .page_size = s.page_size,
                 .wide = s.wide});
    linear(heads_product(q, head, w.absorb, query, latent));
    rotate(q + w.nope, w.heads * head, head, query + rank, int64_t(w.heads) * latent, latent, w.heads);
    decode({.q = query,
            .k = cache,
            .v = cache,
            .table = s.table,
            .length = s.length,
            .out = mixed,
            .table_stride = s.table_stride,
            .table_width = s.table_width,
            .pages = s.pages,
            .rows = rows,
            .heads = w.heads,
            .kv_heads = 1,
            .d = latent,
            .e = rank,
            .k_width = latent,
            .v_width = latent,
            .page_size = s.page_size,
            .wide = s.wide,
            .threads = threads,
            .scale = w.scale});
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
        rms_norm({.x = x,
                  .x_stride = c,
                  .weight = by,
                  .out = out,
                  .out_stride = c,
                  .rows = count,
                  .c = c,
                  .eps = w.eps,
                  .threads = s.threads});
    };
    const auto place = [&](float* x, const float* by, int heads) { // in the sequence
        if (by) norm(x, by, x, rows * heads, d);
        rope({.x = x,
              .x_row = int64_t(heads) * d,
              .x_head = d,
              .cos = s.cos,
              .sin = s.sin,
              .out = x,
              .out_row = int64_t(heads) * d,
              .out_head = d,
              .rows = rows,
              .heads = heads,
              .r = d / 2,
              .interleaved = w.interleaved,
              .threads = s.threads,
              .unused = 0});
    };
    const auto write = [&](uint8_t* pool_, const float* x) {
        paged_write({.pool = pool_,
                     .page = s.page,
                     .offset = s.offset,
                     .x = x,
                     .x_row = keys,
                     .x_head = d,
                     .pages = s.pages,
                     .rows = rows,
                     .heads = w.kv_heads,
                     .width = d,
                     .page_size = s.page_size,
                     .wide = s.wide});
    };

    norm(s.x, w.attention_norm, normed, rows, w.c);
    const LinearArgs all[3] = {product_of(s, w.parts, normed, w.q, w.q_bias, q, 0),
                               product_of(s, w.parts, normed, w.k, w.k_bias, k, 0),
                               product_of(s, w.parts, normed, w.v, w.v_bias, v, 0)};
    linears(all, 3);
    place(k, w.k_norm, w.kv_heads);
    write(k_pool, k);
    write(v_pool, v);
    place(q, w.q_norm, w.heads);
    decode({.q = q,
            .k = k_pool,
            .v = v_pool,
            .table = s.table,
            .length = s.length,
            .out = mixed,
            .table_stride = s.table_stride,
            .table_width = s.table_width,
            .pages = s.pages,
            .rows = rows,
            .heads = w.heads,
            .kv_heads = w.kv_heads,
            .d = d,
            .e = d,
            .k_width = d,
            .v_width = d,
            .page_size = s.page_size,
            .wide = s.wide,
            .threads = s.threads,
            .scale = w.scale});
    linear(product_of(s, w.parts, mixed, w.o, w.o_bias, s.x, 1));
    norm(s.x, w.mlp_norm, normed, rows, w.c);
    decode_mlp(s, w.parts, normed, w.gate, w.up, w.down);
}
