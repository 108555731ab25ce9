"""One forward pass over a flat batch of tokens, for every family.

There is one model, not one class per architecture: layers differ in two places, attention (GQA, MLA, compressed
attention or a gated delta rule) and feed-forward (dense or experts), and the weights of a layer say which. Tokens are
flat, [t, hidden], so that decoding sequences and prefill chunks of any length share every matrix product; only
attention looks at sequence boundaries.

Plain functions over frozen dataclasses of tensors rather than nn.Module: nothing here is trained, and a weight that is
streamed, quantised or shared is then just another field.

Only the last token's hidden state of a prompt is needed: for its other rows the last layer computes keys and values and
nothing else (one layer less for most of a prompt), and layers that attend to another layer's keys compute nothing.

Legend: t tokens, r requested rows of hidden states or logits, c hidden, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.engine import attention, moe, residual, streams
from distill.engine.attention import Chosen
from distill.engine.batch import Batch, DecodeRows, Wanted
from distill.engine.cache import PagedCache
from distill.engine.delta import delta
from distill.engine.kernels import Ops
from distill.engine.kernels.ops import DecodePlan
from distill.engine.offload import ExpertStream
from distill.engine.spec import ModelSpec
from distill.engine.weights import DeltaWeights, GqaWeights, LayerWeights, MlaWeights, ModelWeights, MoeWeights


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
        x_tc, inputs_tlp = self._embed(batch), None
        if (w := self.weights.inputs) is not None:
            inputs_tlp = residual.layer_inputs(self.spec, self.ops, w, batch.ids_t, x_tc)
        x_tc = streams.spread(self.spec, x_tc)
        x_rc = self._run(self.weights.layers, 0, self.decode_plan, x_tc, batch, cache, wanted, inputs_tlp)
        if self.weights.mixer is not None:
            x_rc = streams.collapse(self.spec, self.ops, self.weights.mixer, x_rc)
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
        return residual.capped(self.ops.linear(hidden_rc, self.weights.head).float(), self.spec.logit_cap)

    def _run(
        self,
        layers: Sequence[LayerWeights],
        first: int,
        plan: DecodePlan | None,
        x_tc: Tensor,
        batch: Batch,
        cache: PagedCache,
        wanted: Wanted | None = None,
        inputs_tlp: Tensor | None = None,
    ) -> Tensor:
        """Layers number `first` and on: at once, if there is a plan and every row decodes, or op by op. inputs: the
        layers' own embeddings of the tokens, in models that have them."""
        rows = batch.segments[0]
        if plan is None or len(batch.segments) > 1 or not isinstance(rows, DecodeRows):
            chosen: Chosen | None = None
            for index, layer in enumerate(layers, start=first):
                if wanted is not None and index == self.spec.num_layers - self.spec.shared_kv_layers:
                    # None of the layers that are left writes to the cache, so none needs the other rows.
                    x_tc, batch = x_tc.index_select(0, wanted.row_r), wanted.batch
                    inputs_tlp = None if inputs_tlp is None else inputs_tlp.index_select(0, wanted.row_r)
                    wanted = None
                    if not len(x_tc):
                        return x_tc
                rows_of = wanted if layer is layers[-1] else None
                input_tp = None if inputs_tlp is None else inputs_tlp[:, index]
                x_tc, chosen = self._layer(index, layer, x_tc, batch, cache, rows_of, chosen, input_tp)
            return x_tc
        pools = cache.pools[first : first + len(layers)]
        where = batch.cos_tr, batch.sin_tr, batch.page_t, batch.offset_t, rows.table_bp, rows.length_b
        return plan(x_tc, pools, *where)

    def _embed(self, batch: Batch) -> Tensor:
        embed_vc, factor = self.weights.embed_vc, self.spec.embedding_scale
        x_tc = embed_vc.index_select(0, batch.ids_t).to(self.ops.activation_dtype(embed_vc.dtype))
        return x_tc if factor == 1 else residual.scaled(x_tc, factor, embed_vc.dtype)

    def _layer(
        self,
        index: int,
        w: LayerWeights,
        x_tc: Tensor,
        batch: Batch,
        cache: PagedCache,
        wanted: Wanted | None,
        chosen: Chosen | None,
        input_tp: Tensor | None,
    ) -> tuple[Tensor, Chosen | None]:
        """x plus what the layer adds to it, of all rows or the wanted ones, [r, c]; x itself is overwritten. chosen and
        the second result: as in `attention.mla`. input: the layer's own embedding of the tokens, where it has one."""
        spec, ops = self.spec, self.ops
        if w.mixers is not None:
            return streams.layer(spec, ops, index, w, x_tc, batch, cache, wanted, self.stream), None
        normed_tc = ops.rms_norm(x_tc, w.attention_norm_c, spec.norm_eps, w.attention.reader)
        x_rc = x_tc if wanted is None else x_tc.index_select(0, wanted.row_r)
        if isinstance(w.attention, GqaWeights):
            post_norm_c = w.attention_post_norm_c
            x_rc = attention.gqa(spec, ops, w.attention, index, normed_tc, batch, cache, x_rc, wanted, post_norm_c)
        elif isinstance(w.attention, DeltaWeights):
            assert batch.turns is not None
            row_r = None if wanted is None else wanted.row_r
            x_rc = delta(spec, ops, w.attention, normed_tc, batch.turns, cache.states[index], x_rc, row_r)
        else:
            assert isinstance(w.attention, MlaWeights)
            x_rc, chosen = attention.mla(spec, ops, w.attention, index, normed_tc, batch, cache, x_rc, wanted, chosen)
        if not len(x_rc):
            return x_rc, chosen
        normed_rc = ops.rms_norm(x_rc, w.mlp_norm_c, spec.norm_eps, w.mlp.reader)
        if isinstance(w.mlp, MoeWeights):
            assert spec.moe is not None
            stream = self.stream if index < spec.num_layers else None  # the draft layer's experts are in memory
            return moe.moe(spec.moe, ops, w.mlp, normed_rc, stream, x_rc), chosen
        x_rc = moe.mlp(ops, w.mlp, normed_rc, x_rc, spec.activation, w.mlp_post_norm_c, spec.norm_eps)
        if w.inputs is not None and input_tp is not None:
            input_rp = input_tp if wanted is None else input_tp.index_select(0, wanted.row_r)
            x_rc = residual.add_input(ops, w.inputs, input_rp, x_rc, spec.norm_eps)
        return (x_rc if w.scalar_1 is None else x_rc.mul_(w.scalar_1)), chosen
