"""Whole layers in one call, where the kernels have one.

A step in which every row decodes consists of many small ops, and the cost of calling them adds up. `decode_plan` gives
the kernels all layers at once, as tensors and numbers; they may decline, and then the model runs op by op, which is the
definition.
"""

from __future__ import annotations

from collections.abc import Sequence

from distill.engine.kernels import Ops
from distill.engine.kernels.ops import DecodeLayer, DecodePlan, DenseLayer, ExpertBank, Packed, RoutedExperts
from distill.engine.spec import LATENT_NORM_EPS, Mla, ModelSpec, Moe
from distill.engine.weights import GqaWeights, LayerWeights, MlaWeights, MlpWeights, MoeWeights


def decode_plan(spec: ModelSpec, layers: Sequence[LayerWeights], ops: Ops) -> DecodePlan | None:
    """What runs these layers, one after the other, over rows that decode; None: op by op."""
    if spec.indexer or spec.sliding or spec.compressed or spec.delta or spec.output_gate or not layers:
        return None
    if spec.mla is not None:
        return ops.decode_plan([_layer(spec, spec.mla, layer) for layer in layers])
    dense = [_dense_layer(spec, layer) for layer in layers]
    return None if None in dense else ops.decode_plan([layer for layer in dense if layer])


def _layer(spec: ModelSpec, dims: Mla, w: LayerWeights) -> DecodeLayer[Packed, Packed, ExpertBank[object]]:
    a = w.attention
    assert isinstance(a, MlaWeights)
    mlp: MlpWeights | None
    moe = None
    if isinstance(w.mlp, MoeWeights):
        assert spec.moe is not None
        mlp, moe = w.mlp.shared, _experts(spec.moe, w.mlp)
    else:
        mlp = w.mlp
    return DecodeLayer(
        attention_norm=w.attention_norm_c,
        q_a=a.q_a.weight if a.q_a else None,
        q_a_bias=a.q_a.bias if a.q_a else None,
        q_norm=a.q_norm,
        q=a.q.weight,
        kv_a=a.kv_a.weight,
        kv_a_bias=a.kv_a.bias,
        kv_norm=a.kv_norm,
        absorb=a.absorb_q,
        expand_v=a.expand_v,
        o=a.o.weight,
        o_bias=a.o.bias,
        mlp_norm=w.mlp_norm_c,
        mlp=(mlp.gate.weight, mlp.up.weight, mlp.down.weight) if mlp else None,
        moe=moe,
        c=spec.hidden_size,
        heads=spec.num_heads,
        nope=dims.nope_dim,
        rope=dims.rope_dim,
        interleaved=spec.rope.interleaved,
        eps=spec.norm_eps,
        latent_eps=LATENT_NORM_EPS,
        scale=spec.softmax_scale,
    )


def _dense_layer(spec: ModelSpec, w: LayerWeights) -> DenseLayer[Packed] | None:
    """None for a layer that has experts, an MLP with biases or another activation, norms of what it adds, an embedding
    of its own, a factor, or values or keys that are not its own."""
    a, mlp = w.attention, w.mlp
    assert isinstance(a, GqaWeights)
    if isinstance(mlp, MoeWeights) or any(linear.bias is not None for linear in (mlp.gate, mlp.up, mlp.down)):
        return None
    more = (w.attention_post_norm_c, w.mlp_post_norm_c, w.inputs, w.scalar_1, a.v_norm)
    if a.k is None or a.v is None or spec.activation != "silu" or any(part is not None for part in more):
        return None
    return DenseLayer(
        attention_norm=w.attention_norm_c,
        q=a.q.weight,
        q_bias=a.q.bias,
        q_norm=a.q_norm,
        k=a.k.weight,
        k_bias=a.k.bias,
        k_norm=a.k_norm,
        v=a.v.weight,
        v_bias=a.v.bias,
        o=a.o.weight,
        o_bias=a.o.bias,
        mlp_norm=w.mlp_norm_c,
        gate=mlp.gate.weight,
        up=mlp.up.weight,
        down=mlp.down.weight,
        c=spec.hidden_size,
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        rotated=a.rotated,
        interleaved=spec.rope.interleaved,
        eps=spec.norm_eps,
        scale=spec.softmax_scale,
    )


def _experts(dims: Moe, w: MoeWeights) -> RoutedExperts[Packed, ExpertBank[object]]:
    return RoutedExperts(
        router=w.router,
        correction=w.correction_bias,
        experts=w.experts,
        scoring=dims.scoring,
        group_by=dims.group_by,
        groups=dims.groups,
        groups_kept=dims.groups_kept,
        per_token=dims.per_token,
        normalise=dims.normalise,
        factor=dims.routed_scale,
    )
