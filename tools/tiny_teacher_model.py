"""DeepSeek-V3 in plain torch, for training: no cache, no pages, every parameter under its published name.

transformers' own DeepseekV3 would train it too, a few times slower, and without the MTP layer's loss. The exported
checkpoint is compared with transformers and with our engine by the tests, so this file needs no trust.

Shapes: B rows, L tokens, D hidden, H heads, E experts, T = B·L flat tokens.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 128
FP8_MAX = 448.0


@dataclass(frozen=True)
class Config:
    vocab: int
    hidden: int = 128
    layers: int = 4
    dense_layers: int = 1
    heads: int = 4
    q_lora: int = 128
    kv_lora: int = 128
    rope: int = 32
    nope: int = 32
    value: int = 32
    dense_intermediate: int = 384
    expert_intermediate: int = 128
    experts: int = 8
    top_k: int = 2
    groups: int = 4
    kept_groups: int = 2
    shared: int = 1
    routed_scale: float = 2.5
    eps: float = 1e-6
    rope_theta: float = 10000.0
    yarn_factor: float = 4.0
    yarn_original: int = 1024

    def to_hf(self) -> dict[str, object]:
        """config.json in the published (older) spelling."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.dense_intermediate,
            "moe_intermediate_size": self.expert_intermediate,
            "num_hidden_layers": self.layers,
            "num_nextn_predict_layers": 1,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "n_shared_experts": self.shared,
            "n_routed_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "n_group": self.groups,
            "topk_group": self.kept_groups,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": self.routed_scale,
            "moe_layer_freq": 1,
            "first_k_dense_replace": self.dense_layers,
            "q_lora_rank": self.q_lora,
            "kv_lora_rank": self.kv_lora,
            "qk_nope_head_dim": self.nope,
            "qk_rope_head_dim": self.rope,
            "v_head_dim": self.value,
            "hidden_act": "silu",
            "rms_norm_eps": self.eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": {
                "type": "yarn",
                "factor": self.yarn_factor,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": self.yarn_original,
            },
            "max_position_embeddings": int(self.yarn_original * self.yarn_factor),
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [BLOCK, BLOCK],
            },
        }


def quantise_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[N, K] → (float8_e4m3fn [N, K], float32 scale_inv [⌈N/128⌉, ⌈K/128⌉]); dequantise by multiplying."""
    n, k = weight.shape
    rows, columns = math.ceil(n / BLOCK), math.ceil(k / BLOCK)
    padded = F.pad(weight.float(), (0, columns * BLOCK - k, 0, rows * BLOCK - n))
    blocks = padded.view(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-12) / FP8_MAX
    codes = (blocks / scale[:, None, :, None]).view_as(padded)[:n, :k].to(torch.float8_e4m3fn)
    return codes.contiguous(), scale


def dequantise_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    n, k = codes.shape
    return codes.float() * scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]


class Linear(nn.Module):
    """A matrix that is stored as FP8; while `fake_quant` it computes with the rounded weights (straight through)."""

    fake_quant = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / math.sqrt(inputs))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if Linear.fake_quant:
            with torch.no_grad():
                rounded = dequantise_blocks(*quantise_blocks(weight))
            weight = weight + (rounded - weight).detach()
        return F.linear(x, weight)


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MLP(nn.Module):
    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = Linear(hidden, intermediate), Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def yarn_rotation(c: Config, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [length, rope/2] of YaRN (arXiv 2309.00071, section 3): high frequencies kept, low ones stretched.

    mscale equals mscale_all_dim, so the rotation itself is not scaled; the softmax scale is (`MLA.scale`).
    """
    half = c.rope // 2
    frequency = c.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)

    def dimension(rotations: float) -> float:
        return half * math.log(c.yarn_original / (rotations * 2 * math.pi)) / math.log(c.rope_theta)

    low, high = max(math.floor(dimension(32)), 0), min(math.ceil(dimension(1)), c.rope - 1)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    frequency = frequency * (1 - ramp) + frequency / c.yarn_factor * ramp
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x_blhr: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved RoPE: pairs (x0, x1), (x2, x3)…; cos and sin are [L, r/2]."""
    even, odd = x_blhr[..., 0::2], x_blhr[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


class MLA(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.q_a_proj = Linear(c.hidden, c.q_lora)
        self.q_a_layernorm = Norm(c.q_lora, c.eps)
        self.q_b_proj = Linear(c.q_lora, c.heads * (c.nope + c.rope))
        self.kv_a_proj_with_mqa = Linear(c.hidden, c.kv_lora + c.rope)
        self.kv_a_layernorm = Norm(c.kv_lora, c.eps)
        self.kv_b_proj = Linear(c.kv_lora, c.heads * (c.nope + c.value))
        self.o_proj = Linear(c.heads * c.value, c.hidden)
        self.scale = (c.nope + c.rope) ** -0.5 * (0.1 * math.log(c.yarn_factor) + 1) ** 2

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, (b, length, _) = self.c, x.shape
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(b, length, c.heads, c.nope + c.rope)
        q_nope, q_rope = q.split([c.nope, c.rope], -1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([c.kv_lora, c.rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).view(b, length, c.heads, c.nope + c.value)
        k_nope, v = kv.split([c.nope, c.value], -1)
        k_rope = rotate(k_rope[:, :, None], cos, sin).expand(-1, -1, c.heads, -1)
        q = torch.cat((q_nope, rotate(q_rope, cos, sin)), -1).transpose(1, 2)
        k = torch.cat((k_nope, k_rope), -1).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, scale=self.scale)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class Gate(nn.Module):
    """Sigmoid router; `e_score_correction_bias` chooses only, and is moved towards balance instead of a loss."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.randn(c.experts, c.hidden) / math.sqrt(c.hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(c.experts))
        self.load = torch.zeros(c.experts)

    def forward(self, x_td: Tensor) -> tuple[Tensor, Tensor]:
        c = self.c
        score_te = F.linear(x_td, self.weight).sigmoid()
        with torch.no_grad():
            choice_tgs = (score_te + self.e_score_correction_bias).view(-1, c.groups, c.experts // c.groups)
            group_tg = choice_tgs.topk(2, -1).values.sum(-1)
            kept = torch.zeros_like(group_tg).scatter(1, group_tg.topk(c.kept_groups, -1).indices, 1).bool()
            choice_te = choice_tgs.masked_fill(~kept[..., None], -math.inf).flatten(1)
            chosen_tk = choice_te.topk(c.top_k, -1).indices
            if self.training:
                self.load += torch.bincount(chosen_tk.flatten(), minlength=c.experts)
        weight_tk = score_te.gather(1, chosen_tk)
        return chosen_tk, weight_tk / (weight_tk.sum(-1, keepdim=True) + 1e-20) * c.routed_scale

    @torch.no_grad()
    def balance(self, speed: float) -> None:
        """DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): overloaded experts down, underloaded ones up, by `speed`."""
        self.e_score_correction_bias += speed * torch.sign(self.load.mean() - self.load)
        self.load.zero_()


class MoE(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate = Gate(c)
        self.experts = nn.ModuleList(MLP(c.hidden, c.expert_intermediate) for _ in range(c.experts))
        self.shared_experts = MLP(c.hidden, c.expert_intermediate * c.shared)

    def forward(self, x: Tensor) -> Tensor:
        x_td = x.flatten(0, 1)
        chosen_tk, weight_tk = self.gate(x_td)
        order = chosen_tk.flatten().argsort()
        token = order // chosen_tk.shape[1]
        counts = torch.bincount(chosen_tk.flatten(), minlength=len(self.experts)).tolist()
        parts = x_td[token].split(counts)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        y = y * weight_tk.flatten()[order, None]
        return (self.shared_experts(x_td).index_add(0, token, y)).view_as(x)


class Block(nn.Module):
    def __init__(self, c: Config, dense: bool) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(c.hidden, c.eps), Norm(c.hidden, c.eps)
        self.self_attn = MLA(c)
        self.mlp = MLP(c.hidden, c.dense_intermediate) if dense else MoE(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class MTP(nn.Module):
    """One more block that predicts the token after next from h_i and the embedding of t_{i+1}."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.enorm, self.hnorm = Norm(c.hidden, c.eps), Norm(c.hidden, c.eps)
        self.eh_proj = Linear(2 * c.hidden, c.hidden)
        self.block = Block(c, dense=False)
        self.norm = Norm(c.hidden, c.eps)

    def forward(self, embedded: Tensor, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(h)), -1))
        return self.norm(self.block(x, cos, sin))


class Teacher(nn.Module):
    """forward: ids [B, L] → logits [B, L, V] of the next token and [B, L-1, V] of the one after (the MTP layer's).

    Without `draft` the MTP layer is left out and its logits are None.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Embedding(c.vocab, c.hidden)
        nn.init.normal_(self.embed_tokens.weight, std=0.5)
        self.layers = nn.ModuleList(Block(c, dense=i < c.dense_layers) for i in range(c.layers))
        self.norm = Norm(c.hidden, c.eps)
        self.mtp = MTP(c)
        self.lm_head = nn.Linear(c.hidden, c.vocab, bias=False)
        for block in [*self.layers, self.mtp.block]:  # residual branches start small
            projections = [block.self_attn.o_proj]
            mlps = [block.mlp] if isinstance(block.mlp, MLP) else [*block.mlp.experts, block.mlp.shared_experts]
            for projection in projections + [mlp.down_proj for mlp in mlps]:
                projection.weight.data.mul_((2 * c.layers) ** -0.5)

    def forward(self, ids: Tensor, draft: bool = True) -> tuple[Tensor, Tensor | None]:
        cos, sin = yarn_rotation(self.c, ids.shape[1])
        x = embedded = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        h = self.norm(x)
        if not draft:
            return self.lm_head(h), None
        after = self.mtp(embedded[:, 1:], h[:, :-1], cos[:-1], sin[:-1])
        return self.lm_head(h), self.lm_head(after)

    def balance(self, speed: float) -> list[float]:
        """Move the bias of every router that was used; returns each one's largest load over its mean."""
        gates = [m for m in self.modules() if isinstance(m, Gate) and m.load.any()]
        worst = [float(gate.load.max() / gate.load.mean()) for gate in gates]
        for gate in gates:
            gate.balance(speed)
        return worst

    def published(self) -> dict[str, Tensor]:
        """The checkpoint's tensors under DeepSeek-V3's names: FP8 matrices with scales, the rest bf16, biases fp32."""
        tensors: dict[str, Tensor] = {}
        for ours, value in self.state_dict().items():
            name = self._published_name(ours)
            if name.endswith("e_score_correction_bias"):
                tensors[name] = value.clone()
            elif name.endswith(("_proj.weight", "_with_mqa.weight")) and "eh_proj" not in name:
                tensors[name], tensors[name + "_scale_inv"] = quantise_blocks(value)
            else:  # embedding, head, norms, routers; the published MTP projection is not quantised either
                tensors[name] = value.to(torch.bfloat16)
        mtp = f"model.layers.{self.c.layers}."
        tensors[mtp + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[mtp + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        return tensors

    def load_published(self, plain: dict[str, Tensor]) -> None:
        """Take the weights from dequantised tensors under their published names."""
        self.load_state_dict({ours: plain[self._published_name(ours)] for ours in self.state_dict()})

    def _published_name(self, name: str) -> str:
        mtp = f"model.layers.{self.c.layers}."
        if name == "mtp.norm.weight":
            return mtp + "shared_head.norm.weight"
        if name.startswith("mtp."):
            return mtp + name.removeprefix("mtp.").removeprefix("block.")
        return name if name == "lm_head.weight" else "model." + name
