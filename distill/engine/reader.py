"""From the tensors of a checkpoint to parameters.

Names are data (`families/names.py`). Every tensor's shape is checked against the config, and a tensor that the config
does not account for is an error: a bias or norm that is left out gives a model that is subtly wrong rather than one
that fails.

FP8 and four bits (packed.py) are decided tensor by tensor, from dtypes and names, never from a list or from the config.
A matrix goes from the mapped file straight to the kernels' `pack`, which keeps it in the form that they read. Experts
come last, when it is known how much memory is left for them.

Deliberately not read: the layer past `num_layers` unless drafts are asked for (multi-token prediction; it does not
change what the model says), its copies of the embedding and the head, which it shares with the model (DeepSeek-V3,
arXiv:2412.19437, section 2.2), `rotary_emb.inv_freq` in old Llama files (computed from the config), and the head of
tied models, which must then equal the embedding, keys and values of layers that attend to another layer's, and other
models in the same files (`WeightNames.beside`).

Legend: n outputs, c inputs or hidden, f expert width, d head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.engine import reader_parts as parts
from distill.engine.checkpoint import Checkpoint
from distill.engine.families import FAMILIES
from distill.engine.families.names import WeightNames
from distill.engine.kernels import Ops
from distill.engine.kernels.four_bit import FourBit
from distill.engine.kernels.ops import ExpertBank, Packed
from distill.engine.kernels.stored import FP8_BLOCK, Damaged, Fp8, Place, Plain, Stored, all_finite
from distill.engine.packed import OF_CACHE, read_four_bit, scale_of
from distill.engine.spec import Indexer, Mla, ModelSpec, Moe
from distill.engine.weights import (
    AttentionWeights,
    DraftWeights,
    Form,
    GqaWeights,
    Held,
    IndexerWeights,
    LayerWeights,
    Linear,
    MlaWeights,
    MlpWeights,
    ModelWeights,
    MoeWeights,
)


def load_weights(
    model_dir: Path | str,
    spec: ModelSpec,
    ops: Ops,
    dtype: torch.dtype,
    *,
    drafts: bool = False,
    place: Callable[[ModelWeights, list[ExpertBank[object]]], int | None] | None = None,
) -> ModelWeights:
    """Read the weights of a model directory.

    drafts: read the draft layer, too. place: how many experts of each layer to keep in memory (None: all), given
    everything else and the layers' banks of experts; those of the draft layer are always kept. Without `place` all are
    kept, and each layer is packed while the next ones are being read.
    Errors: ValueError, one line with file, tensor and remedy, where the directory is not what the config says.
    """
    checkpoint = Checkpoint(Path(model_dir))
    names = FAMILIES[spec.family].names_in(checkpoint.__contains__)
    reader = _Reader(checkpoint, names, ops, dtype, spec.ue8m0, spec.centred_norms, settles_at_once=place is None)
    head_name = names.embed if spec.tied_embeddings else names.head
    layers_read = range(spec.num_layers + drafts)
    with reader.checkpoint.read_ahead([names.embed, *map(names.layer.format, layers_read), names.norm, head_name]):
        embed_vc = reader.checked(names.embed, spec.vocab_size, spec.hidden_size).dense(dtype).to(ops.device())
        reader.hold(names.embed, embed_vc.shape).tensors.append(embed_vc)
        layers = tuple(_layer(reader, spec, index) for index in range(spec.num_layers))
        reader.checkpoint.forget(names.embed)  # a step reads a few rows of it
        norm_c = reader.norm(names.norm, spec.hidden_size)
        last_mixer = parts.mixer(reader, spec, spec.streams, names.mixer.head, last=True) if spec.streams else None
        head = reader.pack(reader.matrix(head_name, spec.vocab_size, spec.hidden_size), head_name)
        streamed = list(reader.banks)
        draft = _draft(reader, spec) if drafts else None
        inputs = parts.inputs(reader, spec, dtype) if spec.layer_input_dim else None
        reader.refuse_unread(spec)
        reader.refuse_second_head(spec)
        weights = ModelWeights(
            embed_vc, layers, norm_c, head, draft, reader.stored, reader.held, inputs=inputs, mixer=last_mixer
        )
        resident = place(weights, [bank for _, bank in streamed]) if place else None
        for at, bank in reader.banks:
            reader.settle(at, bank, resident if (at, bank) in streamed else None)
    return weights


def _layer(reader: _Reader, spec: ModelSpec, index: int) -> LayerWeights:
    names, at, c = reader.names, reader.names.layer.format(index), spec.hidden_size
    mixers = None
    if spec.streams:
        before_attention, before_mlp = (at + name for name in (names.mixer.attention, names.mixer.mlp))
        mixers = (
            parts.mixer(reader, spec, spec.streams, before_attention),
            parts.mixer(reader, spec, spec.streams, before_mlp),
        )
    return LayerWeights(
        attention_norm_c=reader.norm(at + names.attention_norm, c),
        attention=_attention(reader, spec, at, index),
        mlp_norm_c=reader.norm(at + names.mlp_norm, c),
        mlp=(
            _moe(reader, spec, spec.moe, at, index)
            if spec.moe and spec.is_moe_layer(index)
            else _mlp(reader, at + names.dense, c, spec.mlp_width(index), spec.mlp_bias)
        ),
        attention_post_norm_c=reader.tensor(at + names.attention_post_norm, (c,)) if spec.post_norms else None,
        mlp_post_norm_c=reader.tensor(at + names.mlp_post_norm, (c,)) if spec.post_norms else None,
        inputs=parts.layer_inputs(reader, c, spec.layer_input_dim, at) if spec.layer_input_dim else None,
        scalar_1=reader.tensor(at + names.scalar, (1,)) if spec.layer_scalars else None,
        mixers=mixers,
    )


def _attention(reader: _Reader, spec: ModelSpec, at: str, index: int) -> AttentionWeights:
    if spec.delta and spec.is_delta_layer(index):
        return parts.delta(reader, spec, spec.delta, at)
    if spec.compressed:
        return parts.compressed(reader, spec, spec.compressed, at, index)
    return _mla(reader, spec, spec.mla, at, index) if spec.mla else _gqa(reader, spec, at, index)


def _draft(reader: _Reader, spec: ModelSpec) -> DraftWeights:
    names, c = reader.names.draft, spec.hidden_size
    at = reader.names.layer.format(spec.num_layers)
    return DraftWeights(
        embedding_norm_c=reader.tensor(at + names.embedding_norm, (c,)),
        hidden_norm_c=reader.tensor(at + names.hidden_norm, (c,)),
        project=reader.linear(at + names.project, c, 2 * c),
        layer=_layer(reader, spec, spec.num_layers),
        norm_c=reader.tensor(at + names.norm, (c,)),
    )


def _gqa(reader: _Reader, spec: ModelSpec, at: str, index: int) -> GqaWeights:
    names, heads, c = reader.names.gqa, spec.heads(index), spec.hidden_size
    d, bias = heads.head_dim, spec.qkv_bias
    q_width, kv_width, own = spec.num_heads * d, heads.num_kv_heads * d, spec.cached_by(index) == index
    has_values = own and not (spec.keys_as_values and spec.window(index) is None)
    return GqaWeights(
        q=reader.linear(at + names.q, q_width * (1 + spec.output_gate), c, bias),
        k=reader.linear(at + names.k, kv_width, c, bias) if own else None,
        v=reader.linear(at + names.v, kv_width, c, bias) if has_values else None,
        o=reader.linear(at + names.o, c, q_width, spec.o_bias),
        q_norm=reader.norm(at + names.q_norm, d) if spec.qk_norm else None,
        k_norm=reader.norm(at + names.k_norm, d) if spec.qk_norm and own else None,
        rotated=index not in spec.nope_layers,
        v_norm=reader.ones(d) if spec.value_norm and own else None,
    )


def _mla(reader: _Reader, spec: ModelSpec, dims: Mla, at: str, index: int) -> MlaWeights:
    names = reader.names.mla
    c, heads, q_width = spec.hidden_size, spec.num_heads, spec.num_heads * spec.head_dim
    per_head = dims.nope_dim + dims.v_dim
    kv_a = reader.linear(at + names.kv_a, dims.kv_lora_rank + dims.rope_dim, c, spec.qkv_bias)
    if dims.q_lora_rank is None:
        q_a, q_norm = None, None
        q, kv_a = reader.beside(reader.linear(at + names.q, q_width, c), kv_a)
    else:
        q_a = reader.linear(at + names.q_a, dims.q_lora_rank, c, spec.qkv_bias)
        q_a, kv_a = reader.beside(q_a, kv_a)
        q_norm = reader.tensor(at + names.q_norm, (dims.q_lora_rank,))
        q = reader.linear(at + names.q_b, q_width, dims.q_lora_rank)
    to_keys: list[Stored] = []
    to_values: list[Stored] = []
    kv_b = reader.checked(at + names.kv_b + ".weight", heads * per_head, dims.kv_lora_rank)
    for begin in range(0, heads * per_head, per_head):
        to_keys.append(kv_b.rows(begin, begin + dims.nope_dim))
        to_values.append(kv_b.rows(begin + dims.nope_dim, begin + per_head))
    # Codes stay codes where the cache is bfloat16, which products with them can read.
    if not all(part.for_fp8_products(reader.dtype) for part in (*to_keys, *to_values)):
        to_keys = [Plain(part.dense(reader.dtype)) for part in to_keys]
        to_values = [Plain(part.dense(reader.dtype)) for part in to_values]
    return MlaWeights(
        q_a=q_a,
        q_norm=q_norm,
        q=q,
        kv_a=kv_a,
        kv_norm=reader.tensor(at + names.kv_norm, (dims.kv_lora_rank,)),
        absorb_q=reader.ops.pack_heads([part.transposed() for part in to_keys], reader.dtype),
        expand_k=reader.ops.pack_heads(to_keys, reader.dtype),
        expand_v=reader.ops.pack_heads(to_values, reader.dtype),
        o=reader.linear(at + names.o, c, heads * dims.v_dim, spec.o_bias),
        indexer=_indexer(reader, spec, spec.indexer, dims, at) if spec.indexer and spec.has_indexer(index) else None,
    )


def _indexer(reader: _Reader, spec: ModelSpec, index: Indexer, dims: Mla, at: str) -> IndexerWeights:
    assert dims.q_lora_rank is not None
    names, c, d = reader.names.indexer, spec.hidden_size, index.head_dim
    return IndexerWeights(
        q=reader.linear(at + names.q, index.heads * d, dims.q_lora_rank),
        k=reader.linear(at + names.k, d, c),
        k_norm=reader.tensor(at + names.k_norm, (d,)),
        k_norm_bias=reader.tensor(at + names.k_norm_bias, (d,)),
        head_weights=reader.linear(at + names.head_weights, index.heads, c),
    )


def _mlp(reader: _Reader, at: str, c: int, f: int, bias: bool = False) -> MlpWeights:
    names = reader.names.mlp
    gate, up = reader.beside(reader.linear(at + names.gate, f, c, bias), reader.linear(at + names.up, f, c, bias))
    return MlpWeights(gate, up, down=reader.linear(at + names.down, c, f, bias))


def _moe(reader: _Reader, spec: ModelSpec, dims: Moe, at: str, layer: int) -> MoeWeights:
    names, c, f = reader.names.moe, spec.hidden_size, dims.intermediate_size
    first = reader.expert(at, 0, f, c)
    bank = reader.ops.expert_bank(dims.num_experts, reader.dtype, first)
    for index in range(dims.num_experts):
        names_of, expert = reader.expert_names(at, index), reader.expert(at, index, f, c)
        reader.refuse_mixed(names_of, expert, first)
        bank.lend(expert, tuple(map(reader.place, names_of)))
    if reader.settles_at_once:
        reader.settle(at, bank, None)
    else:
        reader.banks.append((at, bank))
    router = reader.unquantised(at + names.router, (dims.num_experts, c))
    return MoeWeights(
        router=reader.ops.pack(Plain(router), torch.float32),
        correction_bias=(
            reader.tensor(at + names.correction_bias, (dims.num_experts,), torch.float32)
            if dims.correction_bias and layer not in dims.by_token
            else None
        ),
        experts=bank,
        shared=_mlp(reader, at + names.shared, c, f * dims.shared_experts) if dims.shared_experts else None,
        by_token_vk=parts.by_token(reader, spec, dims, at + names.by_token) if layer in dims.by_token else None,
    )


class _Reader:
    """Parameters from the tensors of a model directory. `dtype` is the compute dtype; ue8m0, centred: the spec's. Banks
    of experts are settled as they come, or collected in `banks`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: WeightNames,
        ops: Ops,
        dtype: torch.dtype,
        ue8m0: bool,
        centred: bool,
        settles_at_once: bool,
    ) -> None:
        self.checkpoint, self.names, self.ops = checkpoint, names, ops
        self.dtype, self.ue8m0, self.centred, self.settles_at_once = dtype, ue8m0, centred, settles_at_once
        self._plain = ""  # the dtype of the first matrix that is not quantised
        self.forms: dict[str, None] = {}  # of those that are
        self.banks: list[tuple[str, ExpertBank[object]]] = []  # by layer, with how its tensors' names begin
        self.held: dict[str, Held] = {}

    @property
    def stored(self) -> str:
        """See ModelWeights."""
        return ", ".join(sorted(self.forms)) or self._plain

    def hold(self, name: str, shape: tuple[int, ...], form: Form | None = None) -> Held:
        """The entry in `held` of a published tensor."""
        return self.held.setdefault(name, Held(tuple(shape), form=form))

    def expert_names(self, at: str, index: int) -> tuple[str, str, str]:
        """The names of an expert's gate, up and down matrices."""
        begin, names = at + self.names.moe.expert.format(index), self.names.mlp
        return begin + names.gate + ".weight", begin + names.up + ".weight", begin + names.down + ".weight"

    def expert(self, at: str, index: int, f: int, c: int) -> tuple[Stored, Stored, Stored]:
        """An expert's gate, up and down matrices."""
        gate, up, down = self.expert_names(at, index)
        return self.matrix(gate, f, c), self.matrix(up, f, c), self.matrix(down, c, f)

    def linear(self, name: str, n: int, c: int, bias: bool = False) -> Linear:
        """`name.weight` and, where the layer has a bias, `name.bias`."""
        weight = self.pack(self.matrix(name + ".weight", n, c), name + ".weight")
        return Linear(weight, self.tensor(name + ".bias", (n,)) if bias else None)

    def beside(self, *linears: Linear) -> list[Linear]:
        """Layers that read the same activations, packed side by side where the ops prefer that."""
        weights = self.ops.side_by_side([linear.weight for linear in linears])
        return [Linear(weight, linear.bias) for weight, linear in zip(weights, linears, strict=True)]

    def pack(self, matrix: Stored, name: str) -> Packed:
        """The matrix as the kernels read it. Errors: ValueError where its numbers are damaged."""
        try:
            packed = self.ops.pack(matrix, self.dtype, self.place(name))
        except Damaged as damage:
            raise self._damaged(name, damage) from None
        if not matrix.quantised:  # codes are arranged again by `beside`, and must not be kept twice
            self.hold(name, matrix.shape).matrices.append(packed)
        return packed

    def place(self, name: str) -> Place:
        """Where the numbers or codes of a matrix are in their file."""
        packed = name + "_packed"
        return self.checkpoint.place(packed if packed in self.checkpoint else name)

    def refuse_mixed(self, names: Sequence[str], expert: Sequence[Stored], first: Sequence[Stored]) -> None:
        """Errors: ValueError for a matrix that is kept in another form than in the first expert of the layer, or in
        four bits or float32 where the gate is not: a bank has one size for all experts, and a kernel one form of
        activations."""

        def read_as(matrix: Stored) -> tuple[bool, bool]:
            return isinstance(matrix, FourBit), matrix.kept_dtype(self.dtype) == torch.float32

        for name, matrix, like in zip(names, expert, first, strict=True):
            if matrix.form(self.dtype) != like.form(self.dtype) or read_as(matrix) != read_as(expert[0]):
                raise ValueError(
                    f"{self.checkpoint.model_dir}: tensor {name} is stored in another form than the other experts of "
                    "its layer, which is not supported; use a checkpoint that stores all of them alike"
                )

    def matrix(self, name: str, n: int, c: int) -> Stored:
        """[n, c] as stored, codes with their scales. Its numbers are checked when it is packed."""
        if four_bit := read_four_bit(self.checkpoint, name, n, c):
            self.forms.setdefault(four_bit.name)
            return four_bit
        weight_nc = self.checkpoint.tensor(name, (n, c))
        if weight_nc.dtype != torch.float8_e4m3fn:
            self._plain = self._plain or _name(weight_nc.dtype)
            return Plain(weight_nc)
        self.forms.setdefault(f"fp8-e4m3 block {FP8_BLOCK}")
        scale = scale_of(self.checkpoint, name)
        if scale not in self.checkpoint:
            raise ValueError(
                f"{self.checkpoint.where(name)} is FP8 but {scale} is missing; download the checkpoint again"
            )
        blocks = -(-n // FP8_BLOCK), -(-c // FP8_BLOCK)
        return Fp8(weight_nc, self.checkpoint.tensor(scale, blocks).float(), self.ue8m0)

    def checked(self, name: str, n: int, c: int) -> Stored:
        """As `matrix`, with its numbers checked: for callers that do not pack it as it is."""
        matrix = self.matrix(name, n, c)
        try:
            self.ops.check(matrix)
        except Damaged as damage:
            raise self._damaged(name, damage) from None
        return matrix

    def settle(self, at: str, bank: ExpertBank[object], resident: int | None) -> None:
        """Pack a layer's first `resident` experts for good (None: all), and check the numbers of all."""
        try:
            bank.settle(resident)
        except Damaged as damage:
            raise self._damaged(self.expert_names(at, damage.expert)[damage.part], damage) from None

    def _damaged(self, name: str, damage: Damaged) -> ValueError:
        if damage.what == "codes":
            return ValueError(
                f"{self.checkpoint.where(name)} holds FP8 NaN codes; the file is damaged, download it again"
            )
        if damage.what == "values":
            return ValueError(
                f"{self.checkpoint.where(name)} holds numbers that are not finite (NaN or infinity); the file is "
                "damaged, or its training diverged: download it again or use another checkpoint"
            )
        where = self.checkpoint.where(scale_of(self.checkpoint, name))
        return ValueError(f"{where} is not finite and positive; the file is damaged, download it again")

    def norm(self, name: str, width: int) -> Tensor:
        """The weight of an RMS norm, [width]."""
        return self.tensor(name, (width,), form=_from_one if self.centred else None)

    def tensor(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None, form: Form | None = None
    ) -> Tensor:
        """A copy of a tensor that is never quantised, in `dtype` (default: that of activations). form: as in `Held`, of
        float32 numbers."""
        stored = self.unquantised(name, shape)
        if form is not None:
            stored = form(stored.float())
        tensor = stored.to(self.ops.device(), dtype or self.ops.activation_dtype(self.dtype), copy=True)
        self.hold(name, shape, form).tensors.append(tensor)
        return tensor

    def ones(self, width: int) -> Tensor:
        """The weight of a norm that has none."""
        return torch.ones(width, dtype=self.ops.activation_dtype(self.dtype), device=self.ops.device())

    def unquantised(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor as stored. Errors: ValueError for FP8."""
        stored = self.checkpoint.tensor(name, shape)
        if stored.dtype == torch.float8_e4m3fn:
            raise ValueError(
                f"{self.checkpoint.where(name)} is FP8; norms, biases and routers are expected unquantised"
            )
        if not all_finite(stored):
            raise self._damaged(name, Damaged("values"))
        return stored

    def refuse_unread(self, spec: ModelSpec) -> None:
        """Errors: ValueError when the checkpoint holds a tensor that the config gives no place to."""
        before, _, after = map(re.escape, self.names.layer.partition("{}"))
        layer_of = re.compile(f"{before}(\\d{{1,6}}){after}")
        drafts = range(spec.num_layers, spec.num_layers + spec.num_nextn_predict_layers)
        gqa, shared = self.names.gqa, [i for i in range(spec.num_layers) if spec.cached_by(i) != i]
        unused = tuple(self.names.layer.format(i) + own for i in shared for own in (gqa.k, gqa.v, gqa.k_norm))
        for name in self.checkpoint.unread():
            layer = layer_of.match(name)
            draft = layer is not None and int(layer[1]) in drafts
            tied_head = spec.tied_embeddings and name == self.names.head
            others = name.startswith((*self.names.beside, *unused))
            if not (draft or tied_head or others or name.endswith((*self.names.computed, *OF_CACHE))):
                raise ValueError(
                    f"{self.checkpoint.where(name)} has no place in the model that config.json describes; "
                    "use the config.json that was published with these weights"
                )

    def refuse_second_head(self, spec: ModelSpec) -> None:
        """Errors: ValueError when the config ties head and embedding and the files hold two different ones.

        Which of them is meant cannot be known: transformers 5 keeps both, transformers 4 and FSDP drop the head.
        """
        head, embed = self.names.head, self.names.embed
        if not spec.tied_embeddings or head not in self.checkpoint:
            return
        shape = (spec.vocab_size, spec.hidden_size)
        ours, theirs = self.checkpoint.tensor(embed, shape), self.checkpoint.tensor(head, shape)
        if ours.dtype != theirs.dtype or not torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)):
            raise ValueError(
                f"{self.checkpoint.where(head)} differs from {embed}, and config.json ties them; set "
                "tie_word_embeddings to false there if the model was trained with both, else remove this tensor"
            )


def _from_one(weight: Tensor) -> Tensor:
    return 1 + weight


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
