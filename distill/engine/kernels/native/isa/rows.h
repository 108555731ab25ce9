// Ops on rows of activations: rotation, norm, writing to a cache.
// Part of isa.h, within the namespace of one instruction set.

// Interleaved pairs are (x0, x1), (x2, x3)…; otherwise pair i is (x[i], x[i + r]).
void rope(const RopeArgs& args) {
    const int chunk = std::max(1, 8192 / (args.heads * args.r));
    pool().run(args.threads, ceil_div(args.rows, chunk), [&](int task) {
        for (int row = task * chunk; row < std::min(args.rows, (task + 1) * chunk); row++)
            for (int head = 0; head < args.heads; head++) {
                const float* x = args.x + row * args.x_row + head * args.x_head;
                float* out = args.out + row * args.out_row + head * args.out_head;
                const float *cos = args.cos + size_t(row) * args.r, *sin = args.sin + size_t(row) * args.r;
                const int step = args.interleaved ? 2 : 1, other = args.interleaved ? 1 : args.r;
                for (int i = 0; i < args.r; i++) {
                    const float a = x[i * step], b = x[i * step + other];
                    out[i * step] = a * cos[i] - b * sin[i];
                    out[i * step + other] = b * cos[i] + a * sin[i];
                }
            }
    });
}

// Token t of x [rows, heads, width] to page[t], place offset[t] of a pool.
void paged_write(const WriteArgs& args) {
    const size_t size = args.wide ? 4 : 2;
    for (int row = 0; row < args.rows; row++)
        for (int head = 0; head < args.heads; head++) {
            const float* x = args.x + row * args.x_row + head * args.x_head;
            const size_t place = (size_t(args.page[row]) * args.heads + head) * args.page_size + args.offset[row];
            uint8_t* to = args.pool + place * args.width * size;
            if (args.wide) std::memcpy(to, x, size_t(args.width) * 4);
            else
                for (int j = 0; j < args.width; j++) reinterpret_cast<bf16*>(to)[j] = round_bf16(x[j]);
        }
}

void rms_norm(const NormArgs& args) {
    const int chunk = std::max(1, 16384 / args.c);
    pool().run(args.threads, ceil_div(args.rows, chunk), [&](int task) {
        for (int row = task * chunk; row < std::min(args.rows, (task + 1) * chunk); row++) {
            const float* x = args.x + row * args.x_stride;
            float* out = args.out + row * args.out_stride;
            V squares{};
            int j = 0;
            for (; j + 16 <= args.c; j += 16) squares = fma(load(x + j), load(x + j), squares);
            float sum = 0;
            for (int lane = 0; lane < LANES; lane++) sum += squares[lane];
            for (; j < args.c; j++) sum += x[j] * x[j];
            const float factor = 1 / std::sqrt(sum / float(args.c) + args.eps);
            for (j = 0; j < args.c; j++) out[j] = x[j] * factor * args.weight[j];
        }
    });
}
