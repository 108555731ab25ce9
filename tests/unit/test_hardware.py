"""What this machine can do: read from the processor's flags, not from what a library accepts."""

import platform

import pytest
import torch

from distill.hardware import multiplies_bfloat16


@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "expected"), [(False, False, False), (True, False, True), (False, True, True)]
)
def test_a_processor_multiplies_bfloat16_only_with_instructions_for_it(avx512_bf16, amx, expected, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert multiplies_bfloat16() is expected


def test_other_architectures_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: pytest.fail("asked about x86"))
    assert multiplies_bfloat16() is bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
