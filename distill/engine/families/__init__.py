"""The table of model families, and the way from a model directory to its `ModelSpec`.

A family is one file with a `FAMILY`, named as its `model_type`, and one line in `FAMILIES`, which is the only list of
them: cards validate their `family` against it, training, `distill doctor` and planning take their facts from it.
Options of a config that would change the numbers and that the engine does not implement (other activations,
other routers) are refused by name rather than ignored: an ignored option is a silently different model.

Neither torch nor transformers is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

from distill.engine.config import WIDEST, Config, Json, read_json, shown
from distill.engine.families.family import Family
from distill.engine.families.quantization import scale_format
from distill.engine.spec import ModelSpec


def _family(name: str) -> Family:
    family: Family = import_module(f"{__name__}.{name}").FAMILY
    assert family.name == name, f"{name}.py holds the family {family.name}"
    return family


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        name: _family(name)
        for name in (
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "deepseek_v4",
            "gemma4",
            "gemma4_text",
            "glm_moe_dsa",
            "kimi_k2",
            "kimi_k25",
            "llama",
            "qwen2",
            "qwen3",
            "qwen3_5",
            "qwen3_5_text",
            "smollm3",
        )
    }
)


def read_spec(model_dir: Path | str) -> ModelSpec:
    """Read `model_dir/config.json`. Errors: ValueError, one line with file, key and remedy, when it is missing, broken
    or describes a model that is not supported."""
    path = Path(model_dir) / "config.json"
    return spec_of(read_json(path), str(path))


def spec_of(raw: dict[str, Json], where: str = "config") -> ModelSpec:
    """The spec of a parsed config; `where` names it in errors. Errors: as `read_spec`."""
    config = Config(raw, where)
    name = raw.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ValueError(f"{where}: model_type is {shown(name)}; supported are {', '.join(FAMILIES)}")
    config = _language_model(config, family)
    _check_common(config)
    return replace(family.read(config), ue8m0=scale_format(config) == "ue8m0")


def _language_model(config: Config, family: Family) -> Config:
    """The part of a config that describes the language model. What is said once for all parts counts for it, too."""
    if family.part is None:
        return config
    part = config.section(family.part.section)
    if part is None:
        raise ValueError(f"{config.where}: '{family.part.section}' is missing; it describes the language model")
    if config.has(key := "tie_word_embeddings") and part.has(key) and config.raw[key] != part.raw[key]:
        raise ValueError(
            f"{config.where}: {key!r} is {shown(config.raw[key])}, and {shown(part.raw[key])} in "
            f"'{family.part.section}'; correct the one that is wrong"
        )
    shared = {key: config.raw[key] for key in ("quantization_config", "tie_word_embeddings") if config.has(key)}
    return Config(shared | {key: value for key, value in part.raw.items() if value is not None}, part.where)


def _check_common(config: Config) -> None:
    """What every config may say. Some keys decide nothing here, but transformers reads them (for tokenizers and in
    training), and fails on another type with a traceback."""
    if (act := config.text("hidden_act", "silu")) != "silu":
        raise ValueError(f"{config.where}: hidden_act is {act!r}; only 'silu' is supported")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config.token_ids(key)
    config.bool("use_cache", True)
    config.int_or("num_key_value_heads", None, most=WIDEST)
    for key in ("torch_dtype", "dtype", "transformers_version"):
        config.text(key, "")
    config.texts("architectures")
    layers = config.texts("layer_types")
    if layers and len(layers) != config.int("num_hidden_layers"):
        raise ValueError(f"{config.where}: 'layer_types' has {len(layers)} entries, not one for each layer")
    for key in ("initializer_range", "attention_dropout"):
        config.float(key, 0.0, least=0)
