// Gated MLPs, the experts of a layer, and the router that chooses them.
// Part of isa.h, within the namespace of one instruction set; variants that multiply otherwise (TILES) take all products.

#ifndef TILES
// silu(gate) · up of 64 sums each.
INLINE void swiglu(const float* gate, const float* up, float* out) {
    for (int v = 0; v < PANEL; v += 16) {
        const V g = load(gate + v);
        store(out + v, g / (all(1.f) + exp(-g)) * load(up + v));
    }
}
#endif // TILES

// out = silu(x·gateᵀ) · (x·upᵀ): args.w is the gate.
void swiglu_linear(const LinearArgs& args, const Packed& up) {
    const Packed& gate = *args.w;
    const int panels = panels_of(gate.n), chunks = ceil_div(args.rows, ROW_CHUNK);
    const BothForms both(args, gate.kind != F32 || up.kind != F32);
    const Activations &x = both.of(gate), &x_up = both.of(up);
    const int step = chunks > 1 ? 1 : args.threads; // threads take panels in turn
    pool().run(args.threads, panels * chunks, [&](int task) {
        const int chunk = task % chunks, panel = task / chunks;
        const int first = chunk * ROW_CHUNK, count = std::min(ROW_CHUNK, args.rows - first);
        const int width = std::min(PANEL, gate.n - panel * PANEL);
        alignas(64) float gates[ROW_CHUNK * PANEL];
        through_panel(
            gate, 0, panel, count, args.parts, x.part_bytes, [&](int i) { return x.at(first + i, 0); },
            [&](int i, const float* sums) { std::memcpy(gates + i * PANEL, sums, PANEL * 4); },
            up.data + panel * panel_bytes(up.kind, up.k));
        through_panel(
            up, 0, panel, count, args.parts, x_up.part_bytes, [&](int i) { return x_up.at(first + i, 0); },
            [&](int i, const float* sums) {
                alignas(64) float y[PANEL];
                swiglu(gates + i * PANEL, sums, y);
                std::memcpy(args.out + (first + i) * args.out_stride + panel * PANEL, y, size_t(width) * 4);
            },
            gate.data + (panel + step) * panel_bytes(gate.kind, gate.k));
    });
}

// The gated half of an MLP for some rows and one panel: silu(x·gateᵀ) · (x·upᵀ), split into what the product with `down`
// reads: rows of h from `first` on.
template <class Row>
INLINE void gated_panel(const Packed& gate, const Packed& up, int panel, int rows, int parts, size_t part, Row row,
                        uint8_t* h, size_t h_part, size_t h_width, size_t first) {
    const int width = std::min(PANEL, gate.n - panel * PANEL);
    alignas(64) float gates[ROW_CHUNK * PANEL];
    through_panel(
        gate, 0, panel, rows, parts, part, row,
        [&](int i, const float* sums) { std::memcpy(gates + i * PANEL, sums, PANEL * 4); },
        up.data + panel * panel_bytes(up.kind, up.k));
    through_panel(
        up, 0, panel, rows, parts, part, row,
        [&](int i, const float* sums) {
            alignas(64) float y[PANEL];
            swiglu(gates + i * PANEL, sums, y);
            const size_t at = (first + i) * h_width + size_t(panel) * PANEL;
            if (gate.kind == F32) std::memcpy(reinterpret_cast<float*>(h) + at, y, size_t(width) * 4);
            else split(y, width, parts, h_part, reinterpret_cast<bf16*>(h) + at);
        },
        gate.data + (panel + 2) * panel_bytes(gate.kind, gate.k));
}

// The shared expert is computed beside the routed ones, as one more whose rows are all tokens, and added last.
void experts(const ExpertsArgs& args) {
    const int pairs = args.tokens * args.per_token, c = args.gate[0].k, kind = args.gate[0].kind;
    // Pairs (token, choice) sorted by expert: `start[e]` … `start[e+1]` of `order`.
    int* start = shared_scratch[1].take<int>(size_t(args.experts) + 1 + 2 * size_t(pairs));
    int *order = start + args.experts + 1, *place = order + pairs;
    std::fill(start, start + args.experts + 1, 0);
    for (int i = 0; i < pairs; i++) start[args.expert[i] + 1]++;
    for (int e = 0; e < args.experts; e++) start[e + 1] += start[e];
    std::vector<int> next(start, start + args.experts);
    for (int i = 0; i < pairs; i++) place[i] = next[args.expert[i]]++, order[place[i]] = i;

    // Experts with rows, so that tasks are even: `rows` rows of h and y, from `first` on.
    struct Busy {
        const Packed *gate, *up, *down;
        int first, rows, expert;
    };
    std::vector<Busy> busy;
    for (int e = 0; e < args.experts; e++)
        if (start[e + 1] > start[e])
            busy.push_back({args.gate + e, args.up + e, args.down + e, start[e], start[e + 1] - start[e], e});
    const bool shared = args.shared_gate;
    if (shared) busy.push_back({args.shared_gate, args.shared_up, args.shared_down, pairs, args.tokens, -1});
    const auto task_of = [&](int task) {
        size_t i = 0;
        for (int own; task >= (own = panels_of(busy[i].gate->n)); i++) task -= own;
        return std::pair<const Busy&, int>(busy[i], task);
    };

    const Activations x = prepare(args.x, c, 0, args.tokens, c, 1, kind, args.parts, args.threads, shared_scratch[0]);
    const int widest = std::max(args.gate[0].n, shared ? args.shared_gate->n : 0);
    const size_t h_rows = size_t(pairs) + (shared ? args.tokens : 0), h_width = kind == F32 ? widest : padded_k(widest),
                 h_part = h_rows * h_width;
    uint8_t* h = shared_scratch[2].take<uint8_t>(kind == F32 ? h_part * 4 : h_part * 2 * args.parts);
    const auto token_of = [&](int row) { return row < pairs ? order[row] / args.per_token : row - pairs; }; // of h
#ifdef TILES
    const Activations read = in_order(x, kind, c, args.parts, int(h_rows), args.threads, token_of);
    const auto row_of = [&](int row) { return read.at(row, 0); };
#else
    const Activations& read = x;
    const auto row_of = [&](int row) { return x.at(token_of(row), 0); };
#endif
    int tasks = 0;
    for (const Busy& b : busy) tasks += panels_of(b.gate->n);
    pool().run(args.threads, tasks, [&](int task) {
        const auto [b, panel] = task_of(task);
        for (int done = 0; done < b.rows; done += ROW_CHUNK) {
            const int first = b.first + done;
            const auto row = [&](int i) { return row_of(first + i); };
            gated_panel(*b.gate, *b.up, panel, std::min(ROW_CHUNK, b.rows - done), args.parts, read.part_bytes, row, h,
                        h_part, h_width, size_t(first));
        }
    });
    // A task sums up 64 columns of all tokens: experts in the order of their numbers, the shared one last.
    const size_t h_row = h_width * (kind == F32 ? 4 : 2);
    pool().run(args.threads, panels_of(c), [&](int panel) {
        float* sum = own_scratch[0].take<float>(size_t(args.tokens) * PANEL);
        std::fill(sum, sum + size_t(args.tokens) * PANEL, 0.f);
        for (size_t n = 0; n < busy.size(); n++) {
            const Busy& b = busy[n];
            const Packed* next = n + 1 < busy.size() ? busy[n + 1].down : nullptr;
            through_panel(
                *b.down, 0, panel, b.rows, args.parts, h_part * 2,
                [&](int i) { return h + size_t(b.first + i) * h_row; },
                [&](int i, const float* sums) {
                    const int pair = b.expert < 0 ? 0 : order[b.first + i];
                    const V weight = all(b.expert < 0 ? 1.f : args.weight[pair]);
                    float* to = sum + size_t(b.expert < 0 ? i : pair / args.per_token) * PANEL;
                    for (int v = 0; v < PANEL; v += LANES) store(to + v, load(to + v) + load(sums + v) * weight);
                },
                next ? next->data + panel * panel_bytes(next->kind, next->k) : nullptr);
        }
        const int width = std::min(PANEL, c - panel * PANEL);
        for (int t = 0; t < args.tokens; t++) {
            float* to = args.out + size_t(t) * c + panel * PANEL;
            const float* from = sum + size_t(t) * PANEL;
            if (args.add)
                for (int j = 0; j < width; j++) to[j] += from[j];
            else std::memcpy(to, from, size_t(width) * 4);
        }
    });
}

#ifndef TILES
void route(const RouteArgs& args) {
    const int x = args.experts, per_group = x / args.groups;
    const int chunk = std::max(1, 2048 / x);
    pool().run(args.threads, ceil_div(args.tokens, chunk), [&](int task) {
        float* score = own_scratch[0].take<float>(size_t(ceil_div(x, LANES) * LANES) * 2 + args.groups);
        float *choice = score + ceil_div(x, LANES) * LANES, *group = choice + ceil_div(x, LANES) * LANES;
        const auto best = [](const float* values, int count) {
            return int(std::max_element(values, values + count) - values);
        };
        for (int t = task * chunk; t < std::min(args.tokens, (task + 1) * chunk); t++) {
            std::memcpy(score, args.logits + size_t(t) * x, size_t(x) * 4);
            if (args.softmax) {
                const float top = score[best(score, x)];
                float sum = 0;
                for (int i = 0; i < x; i += LANES) store(score + i, exp(load(score + i) - top));
                for (int i = 0; i < x; i++) sum += score[i];
                for (int i = 0; i < x; i++) score[i] /= sum;
            } else {
                for (int i = 0; i < x; i += LANES) store(score + i, all(1.f) / (all(1.f) + exp(-load(score + i))));
            }
            bool ordered = true;
            for (int i = 0; i < x; i++) {
                choice[i] = args.bias ? score[i] + args.bias[i] : score[i];
                ordered &= choice[i] == choice[i];
            }
            if (!ordered) { // there is no best one
                for (int i = 0; i < args.per_token; i++) {
                    args.expert[size_t(t) * args.per_token + i] = i;
                    args.weight[size_t(t) * args.per_token + i] = NAN;
                }
                continue;
            }
            if (args.groups > 1) {
                for (int g = 0; g < args.groups; g++) {
                    const float* of = choice + g * per_group;
                    const int first = best(of, per_group);
                    group[g] = of[first];
                    if (args.group_by_best) continue;
                    float second = -INFINITY;
                    for (int i = 0; i < per_group; i++)
                        if (i != first) second = std::max(second, of[i]);
                    group[g] += second;
                }
                for (int kept = 0; kept < args.groups_kept; kept++) group[best(group, args.groups)] = -INFINITY;
                for (int g = 0; g < args.groups; g++) // the chosen ones are marked by now
                    if (group[g] != -INFINITY)
                        std::fill(choice + g * per_group, choice + (g + 1) * per_group, -INFINITY);
            }
            float sum = 0;
            for (int i = 0; i < args.per_token; i++) {
                const int chosen = best(choice, x);
                choice[chosen] = -INFINITY;
                args.expert[size_t(t) * args.per_token + i] = chosen;
                sum += args.weight[size_t(t) * args.per_token + i] = score[chosen];
            }
            const float divisor = args.normalise ? sum + 1e-20f : 1.f;
            for (int i = 0; i < args.per_token; i++) {
                float& weight = args.weight[size_t(t) * args.per_token + i];
                weight = weight / divisor * args.factor;
            }
        }
    });
}
#endif // TILES
