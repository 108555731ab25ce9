// The layouts of the structs that cross the C interface, as text that Python compares with its own.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "arguments.h"

namespace {
struct Field {
    const char* name;
    char code; // p: pointer, f: floating point, i: integer
    size_t size, offset;
};
template <class T> constexpr char code_of() {
    return std::is_pointer_v<T> ? 'p' : std::is_floating_point_v<T> ? 'f' : 'i';
}

std::string describe(const char* name, size_t size, std::initializer_list<Field> fields) {
    std::string text = name + (' ' + std::to_string(size));
    for (const Field& f : fields)
        ((((text += ' ') += f.name) += ':') += f.code) += std::to_string(f.size) + '@' + std::to_string(f.offset);
    return text;
}

// LAYOUT(name, S, a, b, …): the line of struct S with the members a, b, …, under the name that Python gives it.
#define PARENS ()
#define EXPAND(...) EXPAND_3(EXPAND_3(EXPAND_3(EXPAND_3(__VA_ARGS__))))
#define EXPAND_3(...) EXPAND_2(EXPAND_2(EXPAND_2(EXPAND_2(__VA_ARGS__))))
#define EXPAND_2(...) EXPAND_1(EXPAND_1(EXPAND_1(EXPAND_1(__VA_ARGS__))))
#define EXPAND_1(...) __VA_ARGS__
#define FIELD_OF(S, member, ...)                                                       \
    {#member, code_of<decltype(S::member)>(), sizeof(S::member), offsetof(S, member)}, \
        __VA_OPT__(FIELD_AGAIN PARENS(S, __VA_ARGS__))
#define FIELD_AGAIN() FIELD_OF
#define LAYOUT(name, S, ...) describe(name, sizeof(S), {EXPAND(FIELD_OF(S, __VA_ARGS__))})

// Every struct that crosses the C interface, one a line. A member that is missing here is missed by the comparison in
// cpu_library.py, which then refuses the library.
std::string all_layouts() {
    const std::string lines[] = {
        LAYOUT("PackedMatrix", Packed, kind, n, k, groups, data, scale),
        LAYOUT("PackJob", PackJob, source, row_stride, offset, out, fd, stored, kind, n, k),
        LAYOUT("LinearArgs", LinearArgs, x, x_stride, x_group, w, bias, out, out_stride, out_group, rows, parts, add,
               threads),
        LAYOUT("ExpertsArgs", ExpertsArgs, x, expert, weight, gate, up, down, shared_gate, shared_up, shared_down, out,
               tokens, per_token, experts, parts, add, threads),
        LAYOUT("DecodeArgs", DecodeArgs, q, k, v, table, length, out, table_stride, table_width, pages, rows, heads,
               kv_heads, d, e, k_width, v_width, page_size, wide, threads, scale),
        LAYOUT("PrefillArgs", PrefillArgs, q, k, v, table, uk, uv, out, table_width, pages, rows, length, heads,
               kv_heads, d, e, k_width, v_width, page_size, wide, threads, scale),
        LAYOUT("IndexArgs", IndexArgs, q, weight, keys, table, out, table_width, pages, rows, length, heads, d,
               page_size, wide, threads, unused),
        LAYOUT("RouteArgs", RouteArgs, logits, bias, expert, weight, tokens, experts, groups, groups_kept, per_token,
               softmax, group_by_best, normalise, factor, threads),
        LAYOUT("RopeArgs", RopeArgs, x, x_row, x_head, cos, sin, out, out_row, out_head, rows, heads, r, interleaved,
               threads, unused),
        LAYOUT("WriteArgs", WriteArgs, pool, page, offset, x, x_row, x_head, pages, rows, heads, width, page_size,
               wide),
        LAYOUT("NormArgs", NormArgs, x, x_stride, weight, out, out_stride, rows, c, eps, threads),
        LAYOUT("DrawArgs", DrawArgs, logits, row, uniform, temperature, top_k, top_p, token, logprob, rows, draws,
               vocabulary, threads),
        LAYOUT("LikeliestArgs", LikeliestArgs, logits, normaliser, given, id, logprob, rows, vocabulary, k, given_count,
               threads, unused),
        LAYOUT("LayerArgs", LayerArgs, attention_norm, q_norm, kv_norm, mlp_norm, correction, q_a, q, kv_a, absorb,
               expand_v, o, q_a_bias, kv_a_bias, o_bias, router, gate, up, down, shared_gate, shared_up, shared_down, c,
               heads, nope, rope, interleaved, experts, groups, groups_kept, per_token, softmax, group_by_best,
               normalise, parts, eps, latent_eps, scale, factor, unused),
        LAYOUT("DenseLayerArgs", DenseLayerArgs, attention_norm, q_norm, k_norm, mlp_norm, q, k, v, o, gate, up, down,
               q_bias, k_bias, v_bias, o_bias, c, heads, kv_heads, head_dim, rotated, interleaved, parts, eps, scale,
               unused),
        LAYOUT("StepArgs", StepArgs, x, cos, sin, page, offset, table, length, table_stride, table_width, pages, rows,
               page_size, wide, threads),
        LAYOUT("DeltaArgs", DeltaArgs, qkv, write, decay, gate, conv, rate, rate_bias, norm, conv_state, state, row,
               first, slot, fresh, out, rows, sequences, slots, channels, key_heads, value_heads, key_dim, value_dim,
               taps, threads, eps, unused),
        LAYOUT("SigmoidGateArgs", SigmoidGateArgs, x, gate, out, count, threads, unused),
        LAYOUT("TrainNormArgs", TrainNormArgs, x, weight, factor, out, residual, x_gradient, weight_gradient, rows, c,
               x_half, out_half, backward, threads, eps, unused),
        LAYOUT("TrainGateArgs", TrainGateArgs, both, out, gradient, rows, n, half, backward, threads, unused),
        LAYOUT("TrainRopeArgs", TrainRopeArgs, x, x_row, x_head, cos, sin, out, out_row, out_head, rows, heads, r, half,
               backward, threads),
        LAYOUT("TrainSoftmaxArgs", TrainSoftmaxArgs, scores, gradient, rows, width, heads, queries, first, half,
               backward, threads, scale),
    };
    std::string text;
    for (const std::string& line : lines) {
        if (!text.empty()) text += '\n';
        text += line;
    }
    return text;
}
#undef PARENS
#undef EXPAND
#undef EXPAND_1
#undef EXPAND_2
#undef EXPAND_3
#undef FIELD_OF
#undef FIELD_AGAIN
#undef LAYOUT
} // namespace
