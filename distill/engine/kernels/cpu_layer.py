"""Layers for rows that decode, all in one call: with latent attention, or dense with grouped-query attention.

Few rows make small products: with a call for each of a layer's twenty ops, a third of a step would be spent on calls.
The kernels called, and so the bits, are those of the single ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_void_p

import torch
from torch import Tensor

from distill.engine.kernels.cpu_four_bit import FourBitBank
from distill.engine.kernels.cpu_library import call, threads
from distill.engine.kernels.cpu_packing import ExpertBank, Packed
from distill.engine.kernels.cpu_structs import Arguments, DenseLayerArgs, LayerArgs, StepArgs, address
from distill.engine.kernels.ops import DecodeLayer as _DecodeLayer
from distill.engine.kernels.ops import DenseLayer as _DenseLayer

DecodeLayer = _DecodeLayer[Packed, Packed, ExpertBank | FourBitBank]
DenseLayer = _DenseLayer[Packed]


class DecodePlan:
    """All layers, with their arguments laid out as native/isa/layer.h reads them. They are of one kind."""

    def __init__(self, layers: Sequence[DecodeLayer | DenseLayer]) -> None:
        self._held = layers  # the memory that the arguments point to
        dense = [_dense_arguments(layer) for layer in layers if isinstance(layer, _DenseLayer)]
        latent = [_arguments(layer) for layer in layers if isinstance(layer, _DecodeLayer)]
        assert not (dense and latent)
        self._op = "decode_dense_layers" if dense else "decode_layers"
        self._layers = (type((dense or latent)[0]) * len(layers))(*(dense or latent))

    def __call__(
        self,
        x_bc: Tensor,
        pools: Sequence[tuple[Tensor, ...]],
        cos_br: Tensor,
        sin_br: Tensor,
        page_b: Tensor,
        offset_b: Tensor,
        table_bp: Tensor,
        length_b: Tensor,
    ) -> Tensor:
        """Hidden states [b, c] after the layers; writes their pools."""
        assert len(pools) == len(self._layers)
        x_bc, pool = x_bc.clone(), pools[0][0]
        step = StepArgs(
            x=address(x_bc),
            cos=address(cos_br),
            sin=address(sin_br),
            page=address(page_b),
            offset=address(offset_b),
            table=address(table_bp),
            length=address(length_b),
            table_stride=table_bp.stride(0),
            table_width=table_bp.shape[1],
            pages=len(pool),
            rows=len(x_bc),
            page_size=pool.shape[2],
            wide=pool.dtype == torch.float32,
            threads=threads(),
        )
        addresses = [pool.data_ptr() for own in pools for pool in own]
        call(self._op, self._layers, step, (c_void_p * len(addresses))(*addresses), len(pools))
        return x_bc


def decode_plan(layers: Sequence[DecodeLayer | DenseLayer]) -> DecodePlan | None:
    """As reference.decode_plan; None where two products that share their activations read them in different forms, and
    for experts that are decoded when they are used."""
    for layer in layers:
        if isinstance(layer, _DenseLayer):
            continue  # its products take their activations in both forms
        if not layer.kv_a.reads_like(layer.q_a or layer.q):
            return None
        experts = layer.moe.experts if layer.moe else None
        if isinstance(experts, FourBitBank) or (experts and layer.mlp and not experts.goes_with(layer.mlp)):
            return None
    return DecodePlan(layers)


def _arguments(layer: DecodeLayer) -> Arguments:
    fields: dict[str, float | None] = dict.fromkeys(LayerArgs.names, 0)
    for name in ("attention_norm", "q_norm", "kv_norm", "mlp_norm", "q_a_bias", "kv_a_bias", "o_bias"):
        fields[name] = address(getattr(layer, name))
    for name in ("q_a", "q", "kv_a", "absorb", "expand_v", "o"):
        packed: Packed | None = getattr(layer, name)
        fields[name] = None if packed is None else packed.address
    for name in ("c", "heads", "nope", "rope", "interleaved", "eps", "latent_eps", "scale"):
        fields[name] = getattr(layer, name)
    fields["parts"] = layer.o.parts
    if layer.mlp is not None:
        prefix = "shared_" if layer.moe else ""
        fields |= {
            prefix + name: packed.address for name, packed in zip(("gate", "up", "down"), layer.mlp, strict=True)
        }
    if (moe := layer.moe) is not None:
        assert isinstance(moe.experts, ExpertBank)
        fields |= dict(zip(("gate", "up", "down"), moe.experts.addresses, strict=True))
        fields |= {"router": moe.router.address, "correction": address(moe.correction), "experts": moe.experts.count}
        fields |= {"softmax": moe.scoring == "softmax", "group_by_best": moe.group_by == "best"}
        for name in ("groups", "groups_kept", "per_token", "normalise", "factor"):
            fields[name] = getattr(moe, name)
    return LayerArgs(**fields)


def _dense_arguments(layer: DenseLayer) -> Arguments:
    fields: dict[str, float | None] = {}
    for name in ("attention_norm", "q_norm", "k_norm", "mlp_norm", "q_bias", "k_bias", "v_bias", "o_bias"):
        fields[name] = address(getattr(layer, name))
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        fields[name] = getattr(layer, name).address
    for name in ("c", "heads", "kv_heads", "head_dim", "rotated", "interleaved", "eps", "scale"):
        fields[name] = getattr(layer, name)
    return DenseLayerArgs(**fields, parts=layer.o.parts, unused=0)
