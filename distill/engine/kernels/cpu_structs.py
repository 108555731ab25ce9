"""The argument structures of the C++ kernels, as ctypes.

Each mirrors the struct of the same name in native/arguments.h: the same fields in the same order. The library describes
its own structs (`distill_layouts`), and `cpu_library` compares the two descriptions before it calls anything, so that a
library compiled from other sources is refused instead of reading a length as an address. Generating one side from the
other was rejected: a table of names with types is short enough to be written twice, and is checked.

A structure is created from keyword arguments, one for every field: a field that is forgotten is an error, not a zero.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import ClassVar

from torch import Tensor

_TYPES = {"int": c_int32, "long": c_int64, "float": c_float, "pointer": c_void_p}
_CODES = {c_int32: "i4", c_int64: "i8", c_float: "f4", c_void_p: "p8"}


class Arguments(ctypes.Structure):
    """A C struct whose fields are all given by name. `names`: its fields."""

    names: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, **values: float | None) -> None:
        assert values.keys() == self.names, f"{type(self).__name__}: {sorted(values.keys() ^ self.names)}"
        super().__init__(**values)

    @classmethod
    def layout(cls) -> str:
        """Name, size and fields ("name:code@offset"), as the library describes its own."""
        fields = (f"{name}:{_CODES[kind]}@{getattr(cls, name).offset}" for name, kind in cls._fields_)  # type: ignore[misc]  # no field here is a bit field
        return " ".join((cls.__name__, str(ctypes.sizeof(cls)), *fields))


def _struct(name: str, fields: str) -> type[Arguments]:
    """A structure from "type: name name; …", in the order of native/arguments.h."""
    listed = [
        (field, _TYPES[kind.strip()])
        for kind, names in (part.split(":") for part in fields.split(";"))
        for field in names.split()
    ]
    return type(name, (Arguments,), {"_fields_": listed, "names": frozenset(field for field, _ in listed)})


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; None (a null pointer) for no tensor."""
    return None if tensor is None else tensor.data_ptr()


PackedMatrix = _struct("PackedMatrix", "int: kind n k groups; pointer: data scale")
PackJob = _struct("PackJob", "pointer: source; long: row_stride offset; pointer: out; int: fd stored kind n k")
LinearArgs = _struct(
    "LinearArgs",
    "pointer: x; long: x_stride x_group; pointer: w bias out; long: out_stride out_group; int: rows parts add threads",
)
ExpertsArgs = _struct(
    "ExpertsArgs",
    "pointer: x expert weight gate up down shared_gate shared_up shared_down out; "
    "int: tokens per_token experts parts add threads",
)
DecodeArgs = _struct(
    "DecodeArgs",
    "pointer: q k v table length out; long: table_stride; "
    "int: table_width pages rows heads kv_heads d e k_width v_width page_size wide threads; float: scale",
)
PrefillArgs = _struct(
    "PrefillArgs",
    "pointer: q k v table uk uv out; "
    "int: table_width pages rows length heads kv_heads d e k_width v_width page_size wide threads; float: scale",
)
IndexArgs = _struct(
    "IndexArgs",
    "pointer: q weight keys table out; int: table_width pages rows length heads d page_size wide threads unused",
)
RouteArgs = _struct(
    "RouteArgs",
    "pointer: logits bias expert weight; "
    "int: tokens experts groups groups_kept per_token softmax group_by_best normalise; float: factor; int: threads",
)
RopeArgs = _struct(
    "RopeArgs",
    "pointer: x; long: x_row x_head; pointer: cos sin out; long: out_row out_head; "
    "int: rows heads r interleaved threads unused",
)
WriteArgs = _struct(
    "WriteArgs", "pointer: pool page offset x; long: x_row x_head; int: pages rows heads width page_size wide"
)
NormArgs = _struct(
    "NormArgs",
    "pointer: x; long: x_stride; pointer: weight out; long: out_stride; int: rows c; float: eps; int: threads",
)
DrawArgs = _struct(
    "DrawArgs",
    "pointer: logits row uniform temperature top_k top_p token logprob; int: rows draws vocabulary threads",
)
LikeliestArgs = _struct(
    "LikeliestArgs",
    "pointer: logits normaliser given id logprob; int: rows vocabulary k given_count threads unused",
)
LayerArgs = _struct(
    "LayerArgs",
    "pointer: attention_norm q_norm kv_norm mlp_norm correction q_a q kv_a absorb expand_v o q_a_bias kv_a_bias o_bias "
    "router gate up down shared_gate shared_up shared_down; "
    "int: c heads nope rope interleaved experts groups groups_kept per_token softmax group_by_best normalise parts; "
    "float: eps latent_eps scale factor; int: unused",
)
DenseLayerArgs = _struct(
    "DenseLayerArgs",
    "pointer: attention_norm q_norm k_norm mlp_norm q k v o gate up down q_bias k_bias v_bias o_bias; "
    "int: c heads kv_heads head_dim rotated interleaved parts; float: eps scale; int: unused",
)
StepArgs = _struct(
    "StepArgs",
    "pointer: x cos sin page offset table length; long: table_stride; "
    "int: table_width pages rows page_size wide threads",
)
DeltaArgs = _struct(
    "DeltaArgs",
    "pointer: qkv write decay gate conv rate rate_bias norm conv_state state row first slot fresh out; "
    "int: rows sequences slots channels key_heads value_heads key_dim value_dim taps threads; float: eps; int: unused",
)
SigmoidGateArgs = _struct("SigmoidGateArgs", "pointer: x gate out; long: count; int: threads unused")
TrainNormArgs = _struct(
    "TrainNormArgs",
    "pointer: x weight factor out residual x_gradient weight_gradient; int: rows c x_half out_half backward threads; "
    "float: eps; int: unused",
)
TrainGateArgs = _struct("TrainGateArgs", "pointer: both out gradient; int: rows n half backward threads unused")
TrainRopeArgs = _struct(
    "TrainRopeArgs",
    "pointer: x; long: x_row x_head; pointer: cos sin out; long: out_row out_head; "
    "int: rows heads r half backward threads",
)
TrainSoftmaxArgs = _struct(
    "TrainSoftmaxArgs",
    "pointer: scores gradient; int: rows width heads queries first half backward threads; float: scale",
)

STRUCTURES = (
    PackedMatrix,
    PackJob,
    LinearArgs,
    ExpertsArgs,
    DecodeArgs,
    PrefillArgs,
    IndexArgs,
    RouteArgs,
    RopeArgs,
    WriteArgs,
    NormArgs,
    DrawArgs,
    LikeliestArgs,
    LayerArgs,
    DenseLayerArgs,
    StepArgs,
    DeltaArgs,
    SigmoidGateArgs,
    TrainNormArgs,
    TrainGateArgs,
    TrainRopeArgs,
    TrainSoftmaxArgs,
)


def layouts() -> str:
    """The layout of every structure, one a line: what a matching library's `distill_layouts` returns."""
    return "\n".join(structure.layout() for structure in STRUCTURES)
