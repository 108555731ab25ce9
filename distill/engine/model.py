"""One forward pass over a flat batch of tokens, for every family.

There is one model, not one class per architecture: layers differ in two places, attention (GQA, MLA or a gated delta
rule) and feed-forward (dense or experts), and the weights of a layer say which. Tokens are flat, [t, hidden], so that
decoding sequences and prefill chunks of any length share every matrix product; only attention looks at sequence
boundaries.

Plain functions over frozen dataclasses of tensors rather than nn.Module: nothing here is trained, and a weight that is
streamed, quantised or shared is then just another field.

Only the last token's hidden state of a prompt is needed: for its other rows the last layer computes keys and values and
nothing else (one layer less for most of a prompt).

Legend: t tokens, r requested rows of hidden states or logits, c hidden, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.engine import attention, moe
from distill.engine.attention import Batch, Chosen, DecodeRows, Wanted
from distill.engine.cache import PagedCache
from distill.engine.delta import delta
from distill.engine.kernels import Ops
from distill.engine.kernels.ops import DecodePlan
from distill.engine.offload import ExpertStream
from distill.engine.spec import ModelSpec
from distill.engine.weights import DeltaWeights, GqaWeights, LayerWeights, ModelWeights, MoeWeights


@dataclass(frozen=True)
class Model:
    """A spec, its weights and the ops to run them with. stream: where experts come from that are not in memory.
    decode_plan, draft_plan: compute all layers, and the one that drafts, at once for rows that decode (fused.py)."""

    spec: ModelSpec
    weights: ModelWeights
    ops: Ops
    stream: ExpertStream | None = None
    decode_plan: DecodePlan | None = None
    draft_plan: DecodePlan | None = None

    def forward(self, batch: Batch, cache: PagedCache, wanted: Wanted | None = None) -> Tensor:
        """Hidden states after the final norm, of all rows or the wanted ones, [r, c]; writes the keys and values of all
        t tokens to `cache`."""
        x_rc = self._run(self.weights.layers, 0, self.decode_plan, self._embed(batch), batch, cache, wanted)
        return self.ops.rms_norm(x_rc, self.weights.norm_c, self.spec.norm_eps) if len(x_rc) else x_rc

    def draft(self, hidden_tc: Tensor, batch: Batch, cache: PagedCache) -> Tensor:
        """The layer that drafts: hidden states of positions i and the tokens of positions i+1 → the hidden states that
        position i+1 is expected to have, [t, c]; `logits` of them predict position i+2. DeepSeek-V3, arXiv:2412.19437,
        section 2.2."""
        w, spec, ops = self.weights.draft, self.spec, self.ops
        assert w is not None
        embedding_tc = ops.rms_norm(self._embed(batch), w.embedding_norm_c, spec.norm_eps)
        both_t2c = torch.cat((embedding_tc, ops.rms_norm(hidden_tc, w.hidden_norm_c, spec.norm_eps)), dim=-1)
        x_tc = ops.linear(both_t2c, w.project.weight)
        x_tc = self._run((w.layer,), spec.num_layers, self.draft_plan, x_tc, batch, cache)
        return ops.rms_norm(x_tc, w.norm_c, spec.norm_eps)

    def logits(self, hidden_rc: Tensor) -> Tensor:
        """[r, c] → [r, v], float32."""
        return self.ops.linear(hidden_rc, self.weights.head).float()

    def _run(
        self,
        layers: Sequence[LayerWeights],
        first: int,
        plan: DecodePlan | None,
        x_tc: Tensor,
        batch: Batch,
        cache: PagedCache,
        wanted: Wanted | None = None,
    ) -> Tensor:
        """Layers number `first` and on: at once, if there is a plan and every row decodes, or op by op."""
        rows = batch.segments[0]
        if plan is None or len(batch.segments) > 1 or not isinstance(rows, DecodeRows):
            chosen: Chosen | None = None
            for index, layer in enumerate(layers, start=first):
                rows_of = wanted if layer is layers[-1] else None
                x_tc, chosen = self._layer(index, layer, x_tc, batch, cache, rows_of, chosen)
            return x_tc
        pools = cache.pools[first : first + len(layers)]
        where = batch.cos_tr, batch.sin_tr, batch.page_t, batch.offset_t, rows.table_bp, rows.length_b
        return plan(x_tc, pools, *where)

    def _embed(self, batch: Batch) -> Tensor:
        embed_vc = self.weights.embed_vc
        return embed_vc.index_select(0, batch.ids_t).to(self.ops.activation_dtype(embed_vc.dtype))

    def _layer(
        self,
        index: int,
        w: LayerWeights,
        x_tc: Tensor,
        batch: Batch,
        cache: PagedCache,
        wanted: Wanted | None,
        chosen: Chosen | None,
    ) -> tuple[Tensor, Chosen | None]:
        """x plus what the layer adds to it, of all rows or the wanted ones, [r, c]; x itself is overwritten. chosen and
        the second result: as in `attention.mla`."""
        spec, ops = self.spec, self.ops
        normed_tc = ops.rms_norm(x_tc, w.attention_norm_c, spec.norm_eps, w.attention.reader)
        x_rc = x_tc if wanted is None else x_tc.index_select(0, wanted.row_r)
        if isinstance(w.attention, GqaWeights):
            x_rc = attention.gqa(spec, ops, w.attention, index, normed_tc, batch, cache, x_rc, wanted)
        elif isinstance(w.attention, DeltaWeights):
            assert batch.turns is not None
            row_r = None if wanted is None else wanted.row_r
            x_rc = delta(spec, ops, w.attention, normed_tc, batch.turns, cache.states[index], x_rc, row_r)
        else:
            x_rc, chosen = attention.mla(spec, ops, w.attention, index, normed_tc, batch, cache, x_rc, wanted, chosen)
        if not len(x_rc):
            return x_rc, chosen
        normed_rc = ops.rms_norm(x_rc, w.mlp_norm_c, spec.norm_eps, w.mlp.reader)
        if isinstance(w.mlp, MoeWeights):
            assert spec.moe is not None
            stream = self.stream if index < spec.num_layers else None  # the draft layer's experts are in memory
            return moe.moe(spec.moe, ops, w.mlp, normed_rc, stream, x_rc), chosen
        return moe.mlp(ops, w.mlp, normed_rc, x_rc), chosen
