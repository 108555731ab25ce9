"""The ops that a column of kernels implements, as types.

`Column` lists every op with its signature; reference.py says what each computes. A column is a set of functions, and a
module is one: `kernels/__init__` has the modules checked against this protocol by mypy. Each column chooses the types
that no other code looks into, hence the type variables:

    P  a packed matrix                       H  packed matrices, one a head
    B  the experts of a layer                A_co  memory for experts that are not resident
    X  activations that a product reads (in some columns quantised already)

The engine sees `Ops`, a column whose types are opaque. Classes with abstract methods were rejected: the ops of a column
are written as functions in several modules, and the table picks them one by one.

Legend: as in reference.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from distill.engine.kernels.stored import Place, Stored

Scoring = Literal["sigmoid", "softmax", "sqrtsoftplus"]
GroupBy = Literal["best", "best two"]

P = TypeVar("P")
H = TypeVar("H")
B = TypeVar("B")
A_co = TypeVar("A_co", covariant=True)
X = TypeVar("X")
A_contra = TypeVar("A_contra", contravariant=True)


class Packed(Protocol):
    """A matrix, or one a head, in the form that the kernels of a column read."""

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""


class ExpertBank(Protocol[A_contra]):
    """The experts of a layer; see reference.Bank. `count` of them, the first `resident` in memory for good."""

    count: int
    resident: int

    @property
    def queued(self) -> bool:
        """Whether `fill` returns at once, its work being in order with that of ops called later."""

    @property
    def bytes_each(self) -> int:
        """Bytes of one packed expert."""

    def lend(self, expert: tuple[Stored, Stored, Stored], places: tuple[Place, ...] | None = None, /) -> None:
        """Add the next expert (gate, up, down), whose memory must not change."""

    def settle(self, resident: int | None = None, /) -> None:
        """Pack the first `resident` experts (None: all), and check the numbers of all. Raises Damaged."""

    def fill(self, arena: A_contra, chosen: Sequence[int] | None = None, background: bool = False, /) -> None:
        """Pack the experts that are not resident into `arena`; chosen: only these."""

    def install(self, arena: A_contra, /) -> None:
        """Read the experts that `fill` packed from `arena` from now on."""


@dataclass(frozen=True)
class RoutedExperts(Generic[P, B]):
    """The router of a layer and its experts; the numbers are those of `Column.route`. factor: of the weights."""

    router: P
    correction: Tensor | None
    experts: B
    scoring: Scoring
    group_by: GroupBy
    groups: int
    groups_kept: int
    per_token: int
    normalise: bool
    factor: float


@dataclass(frozen=True)
class DecodeLayer(Generic[P, H, B]):
    """A layer with latent attention, for `Column.decode_plan`.

    q_a: None where q reads the hidden state. absorb, expand_v: one matrix a head. mlp: gate, up and down of a plain
    MLP, or of the shared experts beside the routed ones. c, heads, nope, rope: the widths of the hidden state and of a
    head's two parts. scale: of the attention scores.
    """

    attention_norm: Tensor
    q_a: P | None
    q_a_bias: Tensor | None
    q_norm: Tensor | None
    q: P
    kv_a: P
    kv_a_bias: Tensor | None
    kv_norm: Tensor
    absorb: H
    expand_v: H
    o: P
    o_bias: Tensor | None
    mlp_norm: Tensor
    mlp: tuple[P, P, P] | None
    moe: RoutedExperts[P, B] | None
    c: int
    heads: int
    nope: int
    rope: int
    interleaved: bool
    eps: float
    latent_eps: float
    scale: float


@dataclass(frozen=True)
class DenseLayer(Generic[P]):
    """A dense layer with grouped-query attention, for `Column.decode_plan`.

    q_norm, k_norm: over each head, in families that have them. gate, up, down: of the MLP, which has no biases. c: the
    width of the hidden state. rotated: whether queries and keys are. scale: of the attention scores.
    """

    attention_norm: Tensor
    q: P
    q_bias: Tensor | None
    q_norm: Tensor | None
    k: P
    k_bias: Tensor | None
    k_norm: Tensor | None
    v: P
    v_bias: Tensor | None
    o: P
    o_bias: Tensor | None
    mlp_norm: Tensor
    gate: P
    up: P
    down: P
    c: int
    heads: int
    kv_heads: int
    head_dim: int
    rotated: bool
    interleaved: bool
    eps: float
    scale: float


class DecodePlan(Protocol):
    """All layers, for rows that decode, at once."""

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
        /,
    ) -> Tensor:
        """Hidden states [b, c] after the layers; writes their pools."""


class Column(Protocol[P, H, B, A_co, X]):
    """One implementation of each op. The model calls ops through this and never names a kernel."""

    def device(self) -> torch.device:
        """The device on which the ops expect their tensors."""

    def session(self) -> AbstractContextManager[None]:
        """The context in which every step runs."""

    def activation_dtype(self, dtype: torch.dtype, /) -> torch.dtype:
        """The dtype of activations between ops when the compute dtype is `dtype`."""

    def check(self, weight: Stored, /) -> None:
        """Raises Damaged for numbers that no healthy checkpoint holds."""

    def pack(self, weight: Stored, dtype: torch.dtype, place: Place | None = None, /) -> P:
        """The form in which products take a weight. Raises Damaged."""

    def repack(self, packed: P, numbers_nc: Tensor, /) -> None:
        """Other numbers for a packed matrix that is not FP8, in place, from any device. Raises Damaged."""

    def pack_heads(self, weights: Sequence[Stored], dtype: torch.dtype, /) -> H:
        """One matrix a head, in the form in which `per_head` and `prefill_mla` take them."""

    def side_by_side(self, weights: Sequence[P], /) -> Sequence[P]:
        """Packed matrices that read the same activations, arranged so that `linears` may compute one product."""

    def expert_bank(self, count: int, dtype: torch.dtype, like: Sequence[Stored] = (), /) -> B:
        """An empty bank for `count` experts (`ExpertBank`), stored in the form of `like`: gate, up, down of one."""

    def arena(self, size: int, /) -> A_co:
        """Memory of `size` bytes in which a bank packs the experts that are not resident."""

    def rms_norm(self, x_tc: Tensor, weight_c: Tensor, eps: float, to: object = None, /) -> Tensor:
        """x / rms(x) · weight. to: the matrix or bank that reads the result."""

    def rope(self, x_thd: Tensor, cos_tr: Tensor, sin_tr: Tensor, interleaved: bool) -> None:
        """Rotate x's last dimension, in place."""

    def linear(self, x: X, weight: P, bias_n: Tensor | None = None, onto_tn: Tensor | None = None, /) -> Tensor:
        """x · weightᵀ + bias → [t, n]; added to `onto`, in place, if that is given."""

    def linears(self, x_tc: Tensor, weights: Sequence[P], biases: Sequence[Tensor | None], /) -> Sequence[Tensor]:
        """The products of one x with several matrices."""

    def swiglu_linear(
        self,
        x_tc: Tensor,
        gate: P,
        up: P,
        gate_bias_f: Tensor | None = None,
        up_bias_f: Tensor | None = None,
        to: P | None = None,
        /,
    ) -> X:
        """silu(x · gateᵀ) · (x · upᵀ) → [t, f]. to: the matrix that reads the result."""

    def per_head(self, x_thc: Tensor, weight: H, behind_thr: Tensor | None = None, /) -> Tensor:
        """Each head's x times its own weightᵀ → [t, h, n], or [t, h, n + r] with `behind` appended."""

    def experts(
        self,
        x_tc: Tensor,
        experts_tk: Tensor,
        weights_tk: Tensor,
        bank: B,
        shared: tuple[P, P, P] | None,
        onto_tc: Tensor,
        limit: float | None = None,
        /,
    ) -> Tensor:
        """The weighted sum of each token's experts and the shared one, added to `onto`, in place. limit: of gate
        (above) and of up (in size)."""

    def route(
        self,
        logits_tx: Tensor,
        bias_x: Tensor | None,
        scoring: Scoring,
        group_by: GroupBy,
        groups: int,
        groups_kept: int,
        per_token: int,
        normalise: bool,
        scale: float,
        given_tk: Tensor | None = None,
        /,
    ) -> tuple[Tensor, Tensor]:
        """Experts [t, per_token] and their weights, float32. given: the experts, where they are not chosen here."""

    def paged_write(self, pool: Tensor, page_t: Tensor, offset_t: Tensor, x_tkd: Tensor, /) -> None:
        """Store each token's x in its page, in place."""

    def write_latents(
        self,
        pool: Tensor,
        page_t: Tensor,
        offset_t: Tensor,
        x_td: Tensor,
        norm_c: Tensor,
        eps: float,
        cos_tr: Tensor,
        sin_tr: Tensor,
        interleaved: bool,
        /,
    ) -> None:
        """Store each token's normalised latent and rotated key part, in place; x is overwritten."""

    def decode_gqa(
        self, q_bhd: Tensor, k_pool: Tensor, v_pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, /
    ) -> Tensor:
        """One query per row over its cached tokens → [b, h, e]."""

    def decode_mla(
        self, q_bhd: Tensor, pool: Tensor, table_bp: Tensor, length_b: Tensor, scale: float, e: int, /
    ) -> Tensor:
        """Absorbed latent attention of one query per row → [b, h, e]."""

    def prefill_gqa(
        self, q_thd: Tensor, k_pool: Tensor, v_pool: Tensor, table_p: Tensor, length: int, scale: float, /
    ) -> Tensor:
        """Causal attention of the last t of `length` cached tokens → [t, h, e]."""

    def prefill_mla(
        self, q_thd: Tensor, pool: Tensor, table_p: Tensor, length: int, expand_k: H, expand_v: H, scale: float, /
    ) -> Tensor:
        """The same over cached latents."""

    def index_scores(self, q_thd: Tensor, weight_th: Tensor, pool: Tensor, table_p: Tensor, length: int, /) -> Tensor:
        """Scores of sparse attention → [t, l] float32."""

    def pool_windows(self, x_nwd: Tensor, gate_nwd: Tensor, /) -> Tensor:
        """Compressed entries of windows → [n, d]."""

    def attend_rows(self, q_thd: Tensor, rows_nd: Tensor, row_tl: Tensor, sink_h: Tensor, scale: float, /) -> Tensor:
        """Attention to named rows, which are keys and values, with a sink per head → [t, h, d]."""

    def stream_weights(
        self, mix_tm: Tensor, scale_m: Tensor, base_m: Tensor, streams: int, iterations: int, eps: float, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What hyper-connections weigh streams by → [t, s], [t, s], [t, s, s]."""

    def delta_rule(
        self,
        qkv_tn: Tensor,
        write_th: Tensor,
        decay_th: Tensor,
        gate_te: Tensor,
        conv_kn: Tensor,
        rate_h: Tensor,
        rate_bias_h: Tensor,
        norm_e: Tensor,
        eps: float,
        conv_pool: Tensor,
        state_pool: Tensor,
        row_t: Tensor,
        first_s: Tensor,
        slot_s: Tensor,
        fresh_s: Tensor,
        /,
    ) -> Tensor:
        """A short convolution and the gated delta rule over each sequence's tokens → [t, h·e]; updates the pools."""

    def sigmoid_gate(self, x_tn: Tensor, gate_tn: Tensor, /) -> Tensor:
        """x · sigmoid(gate)."""

    def draw(
        self,
        logits_rv: Tensor,
        row_b: Tensor,
        uniform_b: Tensor,
        temperature_b: Tensor,
        top_k_b: Tensor,
        top_p_b: Tensor,
        /,
    ) -> tuple[Tensor, Tensor]:
        """A token for each draw, int64, and its raw log-probability, NaN where the logits have no distribution."""

    def likeliest(
        self, logits_rv: Tensor, normaliser_r1: Tensor, top_k: int, given_rm: Tensor | None, /
    ) -> tuple[Tensor, Tensor]:
        """The likeliest tokens of each row and the given ones → ids, int32, and log-probabilities."""

    def decode_plan(self, layers: Sequence[DecodeLayer[P, H, B] | DenseLayer[P]], /) -> DecodePlan | None:
        """A function that computes these layers in one call; None: they are computed op by op."""


Ops = Column[Packed, Packed, ExpertBank[object], object, Tensor]
OP_NAMES = tuple(name for name in vars(Column) if not name.startswith("_"))
