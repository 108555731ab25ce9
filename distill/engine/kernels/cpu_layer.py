"""Layers with latent attention, for rows that decode, in one call each.

Few rows make small products: with a call for each of a layer's twenty ops, a third of a step would be spent on calls.
The kernels called, and so the bits, are those of the single ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_void_p
from typing import Any

import torch
from torch import Tensor

from distill.engine.kernels.cpu_library import LayerArgs, StepArgs, library, threads
from distill.engine.kernels.cpu_packing import ExpertBank, Packed


class DecodePlan:
    """All layers, with their arguments laid out as cpu.cpp reads them."""

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
            x_bc.data_ptr(),
            cos_br.data_ptr(),
            sin_br.data_ptr(),
            page_b.data_ptr(),
            offset_b.data_ptr(),
            table_bp.data_ptr(),
            length_b.data_ptr(),
            table_bp.stride(0),
            len(x_bc),
            pools[0].shape[2],
            pools[0].dtype == torch.float32,
            threads(),
        )
        call = library().distill_decode_layer
        for layer, pool in zip(self._layers, pools, strict=True):
            call(byref(layer), byref(step), c_void_p(pool.data_ptr()))
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
    return LayerArgs(parts=parts, **fields)


def _pointer(value: Any) -> Any:
    if isinstance(value, Packed):
        return value.address
    assert not isinstance(value, ExpertBank)
    return value.data_ptr() if isinstance(value, Tensor) else value
