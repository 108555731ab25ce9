"""Rotary embeddings of published configs, as numbers.

Two spellings are in use and both are read as they are: the published one (`rope_theta`, `rope_scaling {type: …}`) and
that of transformers 5 (`rope_parameters {rope_type, rope_theta, …}`). A scaling rule that is not implemented is
refused by name: another rule gives a subtly different model.
"""

from __future__ import annotations

import math

from distill.engine.config import Config
from distill.engine.spec import Rope

KINDS = ("default", "linear", "llama3", "yarn")
THETA = 10000.0  # the base of most families where the config does not say


class RopeConfig:
    """The RoPE settings of a config, under one spelling. theta: the base where it does not say. partial: the share of a
    head that is rotated, where it does not say; None: of a family that rotates whole heads only.

    Errors: ValueError for an unsupported rule or value.
    """

    def __init__(self, config: Config, theta: float = THETA, partial: float | None = None) -> None:
        section = config.section("rope_scaling") or config.section("rope_parameters")
        self._values = section or Config({}, config.where)
        self.kind = self._values.text("rope_type", self._values.text("type", "default"))
        if self.kind not in KINDS:
            raise ValueError(f"{self._values.where}: RoPE type {self.kind!r}; supported are {', '.join(KINDS)}")
        key, self.share = "partial_rotary_factor", 1.0
        for where in (config, self._values):  # the latter counts, where both have one
            if partial is None:
                where.only(key, (1.0, 1))
            elif where.has(key) or where is config:
                self.share = where.float(key, partial, above=0, most=1)
        # A base of 1 or less would turn every dimension by the same angle.
        self.theta = self._values.float("rope_theta", config.float("rope_theta", theta, above=1.0), above=1.0)
        self._original = self._values.int("original_max_position_embeddings", config.int("max_position_embeddings"))

    def rope(self, dim: int, interleaved: bool) -> Rope:
        """The rotation of heads whose last `dim` dimensions are rotated."""
        if dim % 2 or dim < 2:
            raise ValueError(
                f"{self._values.where}: {dim} dimensions of a head are rotated (head_dim); they must be even, and at "
                "least 2"
            )
        plain = [self.theta ** (-2 * i / dim) for i in range(dim // 2)]
        if self.kind == "default":
            return Rope(dim, tuple(plain), 1.0, interleaved)
        factor = self._factor
        if self.kind == "linear":
            return Rope(dim, tuple(f / factor for f in plain), 1.0, interleaved)
        if self.kind == "llama3":
            return Rope(dim, tuple(self._llama3(plain)), 1.0, interleaved)
        return Rope(dim, tuple(self._yarn(plain, dim)), self._yarn_magnitude, interleaved)

    @property
    def softmax_factor(self) -> float:
        """DeepSeek's m² on the softmax scale, over all dimensions of a head."""
        all_dim = self._mscale("mscale_all_dim")
        return 1.0 if self.kind == "default" or not all_dim else _yarn_mscale(self._factor, all_dim) ** 2

    @property
    def _factor(self) -> float:
        if not self._values.has("factor"):
            raise ValueError(f"{self._values.where}: RoPE type {self.kind!r} needs 'factor', which is missing")
        return self._values.float("factor", above=0)

    def _mscale(self, key: str) -> float:
        return self._values.float(key, 0.0, least=0)

    def _llama3(self, plain: list[float]) -> list[float]:
        """Llama 3.1's rule: long waves are slowed by `factor`, short ones kept, those between blended."""
        low, factor = self._values.float("low_freq_factor", above=0), self._factor
        high = self._values.float("high_freq_factor", above=low)
        scaled = []
        for freq in plain:
            keep = min(max((self._original * freq / (2 * math.pi) - low) / (high - low), 0.0), 1.0)
            scaled.append((1 - keep) * freq / factor + keep * freq)
        return scaled

    def _yarn(self, plain: list[float], dim: int) -> list[float]:
        """YaRN (arXiv:2309.00071, section 3.2): a ramp over dimensions from extrapolation to interpolation."""

        def dim_of(turns: float) -> float:
            return dim * math.log(self._original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low = dim_of(self._values.float("beta_fast", 32.0, above=0))
        high = dim_of(self._values.float("beta_slow", 1.0, above=0))
        if self._values.bool("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low or 0.001  # a ramp of no width would divide by zero
        factor, scaled = self._factor, []
        for i, freq in enumerate(plain):
            interpolate = min(max((i - low) / width, 0.0), 1.0)
            scaled.append(freq / factor * interpolate + freq * (1 - interpolate))
        return scaled

    @property
    def _yarn_magnitude(self) -> float:
        """Factor on cos and sin. DeepSeek gives mscale and mscale_all_dim, equal in V3, so that it is 1 there."""
        if self._values.has("attention_factor"):
            return self._values.float("attention_factor", above=0)
        mscale, all_dim = self._mscale("mscale"), self._mscale("mscale_all_dim")
        if mscale and all_dim:
            return _yarn_mscale(self._factor, mscale) / _yarn_mscale(self._factor, all_dim)
        return _yarn_mscale(self._factor, 1.0)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
