// A layer with latent attention, for rows that decode, in one call.
// Part of isa.h, within the namespace of one instruction set.

// One layer for rows that decode: what model.py does op by op, in one call.
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
        return LinearArgs{.x = x,
                          .x_stride = m->k,
                          .x_group = 0,
                          .w = m,
                          .bias = bias,
                          .out = out,
                          .out_stride = m->n,
                          .out_group = 0,
                          .rows = rows,
                          .parts = w.parts,
                          .add = add,
                          .threads = threads};
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
    if (!w.router) {
        float* gated = shared_scratch[7].take<float>(size_t(rows) * w.gate->n);
        swiglu_linear(product(normed, w.gate, nullptr, gated, 0), *w.up);
        linear(product(gated, w.down, nullptr, s.x, 1));
        return;
    }
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
