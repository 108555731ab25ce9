"""The engine part of perf/gpu.py: decoding and prompts of a random model with 16 B parameters, beside the limits.

V2-Lite's shapes with V3's router, FP8 as published: made on the device and written as a sharded checkpoint, because
loading one is part of what has to work. transformers runs the same shapes in bfloat16, from random weights of its own.
"""

import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import checkpoint
import torch
from checkpoint import FP8, is_fp8, shapes
from safetensors.torch import save_file

from distill.engine import Engine, EngineOptions, Request, SamplingParams
from distill.engine.kernels import gpu

CONFIG: dict[str, Any] = checkpoint.CONFIG | {
    **{"vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408},
    **{"num_hidden_layers": 27, "n_shared_experts": 2, "q_lora_rank": None, "kv_lora_rank": 512},
    **{"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "max_position_embeddings": 16384},
}
TINY = CONFIG | {
    **{"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128},
    **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "n_group": 4},
    **{"topk_group": 2, "num_experts_per_tok": 2, "kv_lora_rank": 128, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32},
    **{"v_head_dim": 32, "max_position_embeddings": 512},
}
PROMPT, NEW = 128, 64
BATCHES = (1, 32, 128, 256)
COMPARED = (1, 128)  # batches that transformers decodes, too


def write(directory: Path, config: dict[str, Any]) -> Path:
    """The checkpoint, a file a layer; kept if it is there."""
    if (directory / "config.json").is_file():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    device, weight_map = gpu.device(), {}
    by_file: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes(config):
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        by_file.setdefault(f"model-{layer}.safetensors", []).append((name, shape))
    for file, tensors in by_file.items():
        stored = {}
        for name, shape in tensors:
            if len(shape) == 1:
                bias = name.endswith("bias")
                stored[name] = torch.zeros(shape) if bias else torch.ones(shape, dtype=torch.bfloat16)
                continue
            noise = torch.randn(shape, device=device)
            if is_fp8(name):
                scale = torch.full((-(-shape[0] // 128), -(-shape[1] // 128)), shape[1] ** -0.5 / 100)
                stored[name + "_scale_inv"] = scale
                stored[name] = (noise * 100).clamp_(-448, 448).to(torch.float8_e4m3fn).cpu()
            else:
                stored[name] = (noise * (0.02 if "gate" in name else shape[1] ** -0.5)).bfloat16().cpu()
        save_file(stored, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    return directory


def sizes(config: dict[str, Any]) -> tuple[int, int, int]:
    """(bytes of what every token reads, bytes of the routed experts, parameters that one token multiplies by)."""
    rest = routed = active = 0
    for name, shape in shapes(config):
        count = torch.Size(shape).numel()
        if ".mlp.experts." in name:
            routed += count
        elif name != "model.embed_tokens.weight":
            rest += count * (1 if is_fp8(name) else 2)
            active += count
    return rest, routed, active + routed * config["num_experts_per_tok"] // config["n_routed_experts"]


def step_seconds(config: dict[str, Any], batch: int, context: int, limits: dict[str, float]) -> float:
    """The least that decoding one token of each sequence can take."""
    rest, routed, active = sizes(config)
    hit = 1 - (1 - config["num_experts_per_tok"] / config["n_routed_experts"]) ** batch
    cache = 2 * (config["kv_lora_rank"] + config["qk_rope_head_dim"]) * config["num_hidden_layers"] * context * batch
    read = rest + routed * hit + cache
    return max(read / limits["copy, B/s"], 2 * active * batch / (2 * limits["bfloat16, FLOP/s"]))


def prompt(number: int, length: int, vocab: int) -> tuple[int, ...]:
    return tuple(random.Random(number).choices(range(2, vocab), k=length))


class Ours:
    """The engine and a way to time it."""

    def __init__(self, directory: Path, config: dict[str, Any], batch: int, new: int, prompts: int) -> None:
        begun = time.perf_counter()
        self.engine = Engine.load(
            directory,
            EngineOptions(
                dtype="bfloat16",
                max_batch=batch,
                max_step_tokens=8192,
                max_context=max(prompts, PROMPT) + new + 64,
                kernels="cuda",
            ),
        )
        self.seconds_to_load = time.perf_counter() - begun
        self._vocab, self._number, self._new = config["vocab_size"], 0, new

    def _add(self, count: int, length: int, new: int) -> None:
        for _ in range(count):
            self._number += 1
            sampling = SamplingParams(temperature=0.6, top_p=0.95, max_new_tokens=new)
            tokens = prompt(self._number, length, self._vocab)
            self.engine.add(Request(str(self._number), tokens, sampling, 0, self._number, (0,)))

    def prompts(self, count: int, length: int) -> float:
        """Tokens of prompts a second."""
        self._add(count, length, 1)
        begun = time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        return count * length / (time.perf_counter() - begun)

    def decode(self, batch: int, length: int) -> float:
        """Tokens a second once all prompts are computed."""
        self._add(batch, length, self._new)
        while self.engine._scheduler.waiting or any(s.sample is None for s in self.engine._scheduler.running):
            self.engine.step()
        done, begun = self.engine.usage.completion_tokens, time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        return (self.engine.usage.completion_tokens - done) / (time.perf_counter() - begun)


def transformers_decode(config: dict[str, Any], batches: tuple[int, ...], length: int, new: int) -> dict[int, float]:
    """Tokens a second of `generate` in bfloat16, the prompts' time taken off."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in config.items() if key not in ("model_type", "torch_dtype")}
    with torch.device(gpu.device()):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **settings), dtype=torch.bfloat16)
    model.eval()
    model.generation_config.eos_token_id = None
    rates = {}
    for batch in batches:
        ids = torch.tensor([prompt(i, length, config["vocab_size"]) for i in range(batch)], device=gpu.device())

        def took(tokens: int, ids: torch.Tensor = ids) -> float:
            begun = time.perf_counter()
            model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=1)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter() - begun

        took(2)
        rates[batch] = batch * new / max(took(new + 1) - took(1), 1e-9)
    return rates


def measure(work: Path, limits: dict[str, float], rehearsal: bool) -> list[dict[str, Any]]:
    config, name = (TINY, "gpu-tiny") if rehearsal else (CONFIG, "gpu-16b")
    tiny, real = ((1, 3), (1,), 8, 3, 16), (BATCHES, COMPARED, PROMPT, NEW, 2048)
    batches, compared, length, new, many = tiny if rehearsal else real
    ours = Ours(write(work / name, config), config, max(batches), new, many)
    rows: list[dict[str, Any]] = []
    for batch in batches:
        ours.decode(batch, length)  # captures the graph
        rate = ours.decode(batch, length)
        least = step_seconds(config, batch, length + new // 2, limits)
        rows.append({"what": f"decode × {batch}", "tokens/s": rate, "of its limit": rate * least / batch})
    ours.prompts(1, many)
    rate = ours.prompts(2 if rehearsal else 8, many)
    least = 2 * sizes(config)[2] / (2 * limits["bfloat16, FLOP/s"])
    rows.append({"what": f"prompts of {many}", "tokens/s": rate, "of its limit": rate * least})
    loaded = {"what": "seconds to load", "seconds": ours.seconds_to_load}
    del ours
    gc.collect()
    if not rehearsal:
        torch.cuda.empty_cache()
    for batch, rate in transformers_decode(config, compared, length, max(new // 2, 1)).items():
        row = next(row for row in rows if row["what"] == f"decode × {batch}")
        row["transformers, tokens/s"], row["× transformers"] = rate, row["tokens/s"] / rate
    for row in rows:
        figures = {key: round(value, 3) for key, value in row.items() if key != "what"}
        print(row["what"], "" if rehearsal else figures)
    print(f"loaded in {loaded['seconds']:.1f} s")
    return rows
