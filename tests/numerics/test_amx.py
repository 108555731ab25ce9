"""Products on AMX: an emulation of the instruction against its definition, the kernels on it against a plain
computation in the order of sums that they promise, and, where a processor has AMX, the instruction against the
emulation.

The definition is that of TDPBF16PS in Intel's "Architectures Software Developer's Manual", volume 2 (see
native/isa/tile_registers.h). It is computed here in another way than in C++: a fused multiply-add in float64, whose sum
is rounded to odd, so that rounding it again to float32 is as good as rounding once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from instruction_sets import EMULATIONS, use
from numpy.typing import NDArray
from torch import Tensor

from distill.engine.kernels import cpu, cpu_library
from distill.engine.kernels.stored import Fp8, Plain, Stored
from distill.errors import UserError

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
SMALLEST = 2.0**-126  # normal float32
TINY = SMALLEST - 2.0**-151  # what is below rounds, with 24 bits, to less than the smallest normal float32


@pytest.fixture(params=["amx", *EMULATIONS])
def tiles(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set with tiles that runs here, in use while the test runs."""
    yield from use(request.param)


@pytest.fixture
def amx() -> Iterator[str]:
    """The processor's own AMX."""
    yield from use("amx")


# ---- the definition


def flushed(x: Floats) -> Floats:
    """Denormals as zeros of their sign."""
    return np.where(np.abs(x) < np.float32(SMALLEST), np.copysign(np.float32(0), x), x).astype(np.float32)


def multiply_add(a: Floats, b: Floats, c: Floats) -> Floats:
    """a · b + c, rounded once, where a and b have the 8 bits of bfloat16 and no number is denormal."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)  # exact
    total = product + addend
    other = total - product
    rest = (product - (total - other)) + (addend - other)  # of the sum, what its rounding left out
    bits = total.view(np.int64)
    outward = (rest > 0) == (total > 0)  # the exact sum is larger than `total` in magnitude
    odd = np.where(outward, bits | 1, np.nextafter(total, 0).view(np.int64)).view(np.float64)
    inexact = np.isfinite(total) & (rest != 0)
    exact = np.where(inexact & (bits & 1 == 0), odd, total)
    single = exact.astype(np.float32)
    return np.where(np.abs(exact) < TINY, np.copysign(np.float32(0), single), single).astype(np.float32)


def dot(sums: Floats, rows: Floats, columns: Floats) -> Floats:
    """sums [m, n] + rows [m, 32] · columns [n, 32], as the instruction computes it."""
    rows, columns = flushed(rows), flushed(columns)
    even, odd = np.zeros_like(sums), np.zeros_like(sums)
    for k in range(0, rows.shape[1], 2):
        even = multiply_add(rows[:, k, None], columns[None, :, k], even)
        odd = multiply_add(rows[:, k + 1, None], columns[None, :, k + 1], odd)
    return flushed(flushed(sums) + flushed(even + odd))


def same(ours: Floats, expected: Floats) -> bool:
    """Bit for bit, but for which NaN a NaN is."""
    return bool(np.all((ours.view(np.int32) == expected.view(np.int32)) | (np.isnan(ours) & np.isnan(expected))))


# ---- the instruction


def from_bits(bits: NDArray[np.uint32]) -> Floats:
    return bits.astype(np.uint32).view(np.float32)


def numbers(generator: np.random.Generator, kind: str, *shape: int) -> NDArray[np.uint32]:
    """The 32 bits of random float32 whose upper 16 are a bfloat16 of the same kind."""
    bits = generator.integers(0, 1 << 32, shape, dtype=np.uint32)
    exponent = bits >> 23 & 0xFF
    chosen = {
        "any": exponent % 255,
        "near one": 120 + exponent % 16,
        "products about the smallest": 56 + exponent % 16,
        "denormal": exponent % 3,
        "not finite": 250 + exponent % 6,
    }[kind]
    return (bits & 0x807FFFFF | chosen << 23).astype(np.uint32)


KINDS = ("any", "near one", "products about the smallest", "denormal", "not finite")


def probe(sums: Floats, rows: NDArray[np.uint32], columns: NDArray[np.uint32]) -> Floats:
    """The instruction in use on sums [16, 16], rows [16, 32] and columns [16, 32], both as upper halves of float32."""
    halves = (rows >> 16).astype(np.uint16).view(np.int16)
    pairs = (columns >> 16).astype(np.uint16).view(np.int16).reshape(16, 16, 2).transpose(1, 0, 2)
    out = torch.from_numpy(sums.copy())
    assert cpu_library.tile_probe(
        out, torch.from_numpy(halves.copy()), torch.from_numpy(np.ascontiguousarray(pairs).reshape(16, 32))
    )
    return out.numpy()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflow and NaN are wanted
@pytest.mark.parametrize("kind", KINDS)
def test_one_instruction_is_as_defined(tiles: str, kind: str) -> None:
    generator = np.random.default_rng(len(kind))
    for _ in range(12):
        sums, rows, columns = (numbers(generator, kind, 16, width) for width in (16, 32, 32))
        expected = dot(from_bits(sums), from_bits(rows & 0xFFFF0000), from_bits(columns & 0xFFFF0000))
        assert same(probe(from_bits(sums), rows, columns), expected)


def test_the_order_of_sums_by_hand(tiles: str) -> None:
    """2^24 + 1 - 2^24 depends on the order: even k alone give 0, as 1 is lost beside 2^24; odd k do not see them."""
    rows, columns = np.ones((16, 32), np.float32), np.zeros((16, 32), np.float32)
    columns[:, :6] = [2.0**24, 1, 1, 1, -(2.0**24), 1]
    sums = probe(np.full((16, 16), 0.5, np.float32), rows.view(np.uint32), columns.view(np.uint32))
    assert (sums == 3.5).all()  # (2^24 + 1 - 2^24 = 0) + (1 + 1 + 1) + 0.5; one chain would lose three of the ones


@pytest.mark.parametrize(("subtracted", "left"), [(2.0**-76, SMALLEST), (2.0**-75, 0.0)])
def test_what_rounds_to_the_smallest_normal_number(tiles: str, subtracted: float, left: float) -> None:
    """2^-126 less 2^-152 rounds to it with 24 bits; less 2^-150 is a number of 24 bits, thus a denormal, which is zero,
    although it rounds to 2^-126 as a denormal."""
    rows, columns = np.zeros((16, 32), np.float32), np.zeros((16, 32), np.float32)
    rows[:, 0] = columns[:, 0] = 2.0**-63
    rows[:, 2], columns[:, 2] = subtracted, -subtracted
    sums = probe(np.zeros((16, 16), np.float32), rows.view(np.uint32), columns.view(np.uint32))
    assert (sums == left).all()


# ---- products


def bfloat16(x: Tensor, parts: int) -> list[Floats]:
    """x as the kernels' bfloat16 parts."""
    rest, made = x.clone(), []
    for _ in range(parts):
        made.append(rest.bfloat16().float())
        rest = rest - made[-1]
    return [part.numpy() for part in made]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def product(x: Tensor, weight: Stored, parts: int) -> Floats:
    """x · weightᵀ [rows, n] in the order of sums of native/isa/tile_products.h."""
    n, k = weight.shape
    steps = -(-k // 32)
    columns = np.zeros((n, steps * 32), np.float32)
    columns[:, :k] = weight.values.float().numpy()
    rows = [np.zeros((len(x), steps * 32), np.float32) for _ in range(parts)]
    for padded, part in zip(rows, bfloat16(x, parts), strict=True):
        padded[:, :k] = part
    total, block = np.zeros((len(x), n), np.float32), np.zeros((len(x), n), np.float32)
    for step in range(steps):
        at = slice(step * 32, step * 32 + 32)
        for part in rows:
            block = dot(block, part[:, at], columns[:, at])
        if weight.scale is None or ((step + 1) % 4 and step + 1 < steps):
            continue
        scale = flushed(weight.scale.float().numpy()[:, step // 4].repeat(128)[:n])
        total = flushed(total + flushed(block * scale))
        block = np.zeros_like(block)
    return total if weight.scale is not None else block


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fp8(n: int, k: int, seed: int = 0) -> Fp8:
    """Random codes of every value, with scales of any size."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0x38  # no NaN
    blocks = (-(-n // 128), -(-k // 128))
    scale = torch.rand(blocks, generator=generator) * 2.0 ** torch.randint(-40, 8, blocks, generator=generator)
    return Fp8(codes.view(torch.float8_e4m3fn), scale)


def of_kind(kind: str, n: int, k: int) -> Stored:
    return fp8(n, k) if kind == "fp8" else Plain(random(n, k, seed=n + k).bfloat16())


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
@pytest.mark.parametrize("k", [1, 5, 31, 32, 33, 100, 128, 130, 257, 600])
def test_products_in_the_promised_order(tiles: str, kind: str, k: int) -> None:
    """Ends of k and of columns; three parts of activations, and one."""
    weight = of_kind(kind, 70, k)
    for dtype, parts in ((torch.bfloat16, 1), (torch.float32, 3)):
        x = random(19, k, seed=k)
        ours = cpu.linear(x, cpu.pack(weight, dtype)).numpy()
        assert same(ours, product(x, weight, parts))


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_every_number_of_rows_gives_a_rows_bits(tiles: str, kind: str) -> None:
    """1 to 70 rows, and some more; by vectors and by tiles where few rows have both."""
    weight, x = of_kind(kind, 66, 100), random(300, 100, seed=3)
    packed = cpu.pack(weight, torch.bfloat16)
    expected = product(x, weight, 1)
    for used in (True, False):
        assert cpu_library.tile_vectors(used)
        for rows in [*range(1, 71), 95, 96, 97, 128, 129, 193, 300]:
            assert same(cpu.linear(x[:rows], packed).numpy(), expected[:rows]), rows


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_vectors_give_the_bits_of_tiles(tiles: str, kind: str, parts: int) -> None:
    """Denormal products, sums that lose all their digits, infinities and NaN among them."""
    generator = np.random.default_rng(parts)
    weight = of_kind(kind, 64, 172)
    for activations in KINDS:
        x = torch.from_numpy(from_bits(numbers(generator, activations, 4, 172)).copy())
        packed = cpu.pack(weight, torch.bfloat16 if parts == 1 else torch.float32)
        for rows in range(1, 5):
            results = []
            for used in (True, False):
                assert cpu_library.tile_vectors(used)
                results.append(cpu.linear(x[:rows], packed).numpy())
            assert same(*results), (activations, rows)


def test_every_code(tiles: str) -> None:
    """Each finite code by each scale's exponent, exactly."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    weight = codes.view(torch.float8_e4m3fn)[:, None].expand(-1, 5).contiguous()
    for exponent in range(-60, 61, 12):
        scale = torch.full((2, 1), 2.0**exponent)
        for rows in (1, 3, 17):
            x = torch.zeros(rows, 5)
            x[:, 4] = 1.5
            out = cpu.linear(x, cpu.pack(Fp8(weight, scale), torch.bfloat16))
            assert torch.equal(out, (weight[:, 4].float() * 1.5 * 2.0**exponent).expand(rows, -1))


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_experts_of_uneven_rows(tiles: str, kind: str) -> None:
    """Experts with every number of rows from none to 40, a shared one among them: each token as if it were alone."""
    count, f, c, tokens = 12, 72, 100, 60
    matrices = [tuple(of_kind(kind, n, k) for n, k in ((f, c), (f, c), (c, f))) for _ in range(count)]
    bank = cpu.expert_bank(count, torch.bfloat16)
    for gate, up, down in matrices:
        bank.lend((gate, up, down))
    bank.settle()
    packed = [cpu.pack(of_kind(kind, n, k), torch.bfloat16) for n, k in ((f, c), (f, c), (c, f))]
    shared = (packed[0], packed[1], packed[2])
    generator = torch.Generator().manual_seed(1)
    popular = torch.arange(count).float().neg().mul(0.5).exp()
    chosen = torch.multinomial(popular.expand(tokens, -1), 3, generator=generator)
    x, weights = random(tokens, c, seed=2), random(tokens, 3, seed=3)
    together = cpu.experts(x, chosen, weights, bank, shared, torch.zeros(tokens, c))
    for used in (True, False):
        assert cpu_library.tile_vectors(used)
        for t in range(tokens):
            one = slice(t, t + 1)
            alone = cpu.experts(x[one], chosen[one], weights[one], bank, shared, torch.zeros(1, c))
            assert torch.equal(alone, together[one])


def test_it_is_another_instruction_set_of_the_numerics(tiles: str) -> None:
    from distill.engine.numerics import Numerics

    assert Numerics.of("cpu", "bfloat16", "float32", "float32").to_json()["instruction_set"] == tiles


class Library:
    """A compiled library on a machine without AMX, or whose AMX is wrong."""

    def __init__(self, reason: str) -> None:
        self.reason, self.used = reason, "avx512"

    def distill_isa(self, name: bytes) -> bytes | None:
        if name not in (b"avx512", b"portable"):
            return None
        self.used = name.decode()
        return name

    def distill_amx_missing(self) -> bytes:
        return self.reason.encode()


def test_a_set_that_is_named_and_cannot_be_used_is_refused() -> None:
    choose: Any = cpu_library._choose
    for name, reason in (("amx", "the processor has no AMX"), ("avx2", "this machine does not have it")):
        with pytest.raises(UserError, match=f"DISTILL_INSTRUCTION_SET is '{name}': {reason}; .* portable, avx512$"):
            choose(name, Library("the processor has no AMX"))
    library = Library("")
    choose("portable", library)
    assert library.used == "portable"


def test_amx_by_default_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    choose: Any = cpu_library._choose
    assert not cpu_library.AMX_BY_DEFAULT, "see perf/README.md for what has to pass on a machine with AMX before"
    monkeypatch.setattr(cpu_library, "AMX_BY_DEFAULT", True)
    for reason, warned in (("the processor has no AMX", ""), (reason_of_wrong_bits(), "AVX-512 are used")):
        library = Library(reason)
        choose(None, library)
        assert library.used == "avx512"
        printed = capsys.readouterr().err
        assert warned in printed and printed.count("\n") == bool(warned)


def reason_of_wrong_bits() -> str:
    """As native/amx.h gives it."""
    source = (Path(cpu_library.__file__).parent / "native" / "amx.h").read_text(encoding="utf-8")
    [reason] = re.findall(r'definition\(\)\) return "(.*)";', source)
    return str(reason)


# ---- on a processor with AMX


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_processor_gives_the_emulations_bits(amx: str, kind: str) -> None:
    """Two thousand instructions of each kind of numbers: half a million sums of 32 products."""
    generator = np.random.default_rng(99)
    for _ in range(2000):
        sums, rows, columns = (numbers(generator, kind, 16, width) for width in (16, 32, 32))
        cpu.instruction_set("amx")
        real = probe(from_bits(sums), rows, columns)
        cpu.instruction_set("amx_emulated")
        assert same(real, probe(from_bits(sums), rows, columns))


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_the_processors_products_are_the_emulations(amx: str, kind: str) -> None:
    """Whole products at sizes of real models, on all threads, at numbers of rows about every bound."""
    for n, k in ((576, 576), (1536, 576), (576, 1536), (512, 2048), (200, 7168)):
        packed = cpu.pack(of_kind(kind, n, k), torch.bfloat16)
        for rows in (1, 4, 5, 6, 15, 16, 17, 33, 96, 130):
            x = random(rows, k, seed=rows)
            cpu.instruction_set("amx")
            real = cpu.linear(x, packed)
            cpu.instruction_set("amx_emulated")
            assert torch.equal(real, cpu.linear(x, packed)), (n, k, rows)
