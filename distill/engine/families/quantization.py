"""The `quantization_config` of a config.json: which forms of weights are read, and which are refused by name.

Which matrices are quantised is read from the tensors themselves (`engine/packed.py`), not from the lists here: what
counts is that nothing is said that would change the numbers and that is not computed, such as zero points, columns in
another order, or rotations. Activations stay as they are computed, also where a checkpoint was made for quantised ones.
"""

from __future__ import annotations

from distill.engine.config import Config, shown

FORMATS = ("pack-quantized", "nvfp4-pack-quantized", "mxfp4-pack-quantized")
SUPPORTED = (
    "supported are 'fp8' (DeepSeek's 128x128 blocks), 'compressed-tensors' (4 bits: INT4, NVFP4, MXFP4) and 'modelopt' "
    "(NVFP4)"
)


def scale_format(config: Config) -> str | None:
    """How the scales of FP8 weights are given; None for weights without such scales.

    Errors: ValueError naming file and key for a quantisation that is not read.
    """
    quantised = config.section("quantization_config")
    if quantised is None:
        return None
    method = quantised.raw.get("quant_method")
    if method == "fp8":
        quantised.only("scale_fmt", ("ue8m0", "float"))
        return quantised.text("scale_fmt", "float")
    if method == "compressed-tensors":
        _check_compressed_tensors(quantised)
    elif method == "modelopt":
        quantised.only("quant_algo", ("NVFP4",))
    else:
        raise ValueError(
            f"{quantised.where}: weights are quantised by {shown(method)}; {SUPPORTED}, so use the unquantised "
            "checkpoint or one of those"
        )
    return None


def _check_compressed_tensors(quantised: Config) -> None:
    quantised.only("format", FORMATS)
    for key in ("sparsity_config", "transform_config"):
        if quantised.section(key) is not None:
            raise ValueError(f"{quantised.where}: '{key}' is given; sparse or transformed weights are not supported")
    groups = quantised.section("config_groups")
    for name in groups.raw if groups else ():
        group = groups.section(name) if groups else None
        weights = group.section("weights") if group else None
        if group is None or weights is None:
            continue  # a group that quantises activations alone
        group.only("format", FORMATS)
        weights.only("num_bits", (4,))
        weights.only("type", ("int", "float"))
        weights.only("symmetric", (True,))
        weights.only("strategy", ("group", "tensor_group", "channel"))
        weights.only("dynamic", (False,))
        weights.only("actorder", ("static", "weight"))
