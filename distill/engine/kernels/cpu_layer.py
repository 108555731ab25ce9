"""Layers with latent attention, for rows that decode, in one call each.

Few rows make small products: with a call for each of a layer's twenty ops, a third of a step would be spent on calls.
The kernels called, and so the bits, are those of the single ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distill.engine.kernels.cpu_library import call, threads
from distill.engine.kernels.cpu_packing import ExpertBank, Packed
from distill.engine.kernels.cpu_structs import LayerArgs, StepArgs, address


class DecodePlan:
    """All layers, with their arguments laid out as native/isa/layer.h reads them."""

    def __init__(self, layers: Sequence[dict[str, Any]]) -> None:
        self._held = layers  # the memory that the arguments point to
        self._layers = [_arguments(layer) for layer in layers]

    def __call__(
        self,
        x_bc: Tensor,
        pools: Sequence[Tensor],
        cos_br: Tensor,
        sin_br: Tensor,
        page_b: Tensor,
        offset_b: Tensor,
        table_bp: Tensor,
        length_b: Tensor,
    ) -> Tensor:
        x_bc = x_bc.clone()
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
            pages=len(pools[0]),
            rows=len(x_bc),
            page_size=pools[0].shape[2],
            wide=pools[0].dtype == torch.float32,
            threads=threads(),
        )
        for layer, pool in zip(self._layers, pools, strict=True):
            call("decode_layer", layer, step, pool=pool.data_ptr())
        return x_bc


def decode_plan(layers: Sequence[dict[str, Any]]) -> DecodePlan | None:
    for layer in layers:
        shared, experts = layer.get("shared_gate"), layer.get("experts")
        if not layer["kv_a"].reads_like(layer["q_a"] or layer["q"]):
            return None
        if shared and experts and not experts.goes_with(shared):
            return None
    return DecodePlan(layers)


def _arguments(layer: dict[str, Any]) -> Any:
    parts = layer["o"].parts
    fields = {name: _pointer(value) for name, value in layer.items() if name not in ("experts", "scoring", "group_by")}
    if experts := layer.get("experts"):
        gate, up, down = experts.addresses
        fields |= {"gate": gate, "up": up, "down": down, "experts": experts.count}
        fields |= {"softmax": layer["scoring"] == "softmax", "group_by_best": layer["group_by"] == "best"}
    return LayerArgs(**dict.fromkeys(LayerArgs.names, 0) | {"parts": parts} | fields)


def _pointer(value: Any) -> Any:
    if isinstance(value, Packed):
        return value.address
    assert not isinstance(value, ExpertBank)
    return value.data_ptr() if isinstance(value, Tensor) else value
