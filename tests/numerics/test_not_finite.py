"""Numbers that are not finite, or that make others so: defined results in every op, and one line from the engine.

The definition is the reference op's. What is compared is where the results are NaN or infinite; a compiled kernel must
neither read outside its tensors nor make a NaN disappear.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from random_models import CONFIGS, Checkpoint, build
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.backends import Job
from distill.backends import open as open_model
from distill.engine import Engine, EngineOptions, Request, SamplingParams
from distill.engine.kernels import cpu, ops_for, reference
from distill.engine.kernels.stored import Plain
from distill.engine.sampler import Draw, NonFiniteLogits, logprobs_of, sample
from distill.errors import UserError
from distill.models import Model
from distill.prompts.prompt import Prompt
from distill.recipe import LocalEngine

# The interpreter computes on what a GPU would compute on, and warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
NAN, INF = float("nan"), float("inf")
ROOT = Path(__file__).resolve().parents[2]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def same_kinds(ours: Tensor, theirs: Tensor) -> None:
    """The same elements are finite, and those are close."""
    finite = theirs.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    torch.testing.assert_close(ours[finite], theirs[finite], atol=1e-4, rtol=1e-4)


# ---- draw

DRAWS = [  # temperature, top k, top p
    *((temperature, k, p) for temperature in (0.0, 1.0, 3.0) for k in (0, 1, 40, 5000) for p in (1.0, 0.9, 1e-9)),
    *((1.0, k, p) for k in (0, 7) for p in (0.0, -1.0, NAN)),  # settings that nobody should pass
    *((1.0, -3, p) for p in (1.0, 0.5)),
]


def drawn(draw: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Every setting on every row."""
    rows, count = len(logits), len(DRAWS)
    temperature, top_k, top_p = (torch.tensor(numbers).repeat(rows) for numbers in zip(*DRAWS, strict=True))
    uniform = torch.rand(rows * count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row = torch.arange(rows).repeat_interleave(count)
    token, logprob = draw(logits, row, uniform, temperature.float(), top_k.long(), top_p.double())
    return token.view(rows, count), logprob.view(rows, count)


def damaged_rows(vocabulary: int) -> dict[str, Tensor]:
    """Rows of logits with a NaN or an infinity somewhere, by name."""
    healthy = random(vocabulary, seed=vocabulary)
    rows = {"healthy": healthy, "all NaN": torch.full_like(healthy, NAN), "all -inf": torch.full_like(healthy, -INF)}
    for name, value in (("NaN", NAN), ("inf", INF)):
        for place in (0, vocabulary // 2, vocabulary - 1):
            row = healthy.clone()
            row[place] = value
            rows[f"{name} at {place}"] = row
    return rows


@pytest.mark.parametrize("vocabulary", [1, 15, 300, 5000])
@pytest.mark.parametrize("column", ["reference", "cpu"])
def test_rows_without_a_distribution(column: str, vocabulary: int, isa: str) -> None:
    rows = damaged_rows(vocabulary)
    token, logprob = drawn(ops_for(column).draw, torch.stack(list(rows.values())))
    assert token.min() >= 0 and token.max() < vocabulary
    for index, name in enumerate(rows):
        if name == "healthy":
            alone = drawn(ops_for(column).draw, rows[name][None])
            assert torch.equal(token[index], alone[0][0]) and logprob[index].isfinite().all()
        else:
            assert logprob[index].isnan().all() and not token[index].any(), name


@pytest.mark.parametrize("column", ["reference", "cpu"])
def test_logits_of_any_size_have_a_distribution(column: str, isa: str) -> None:
    """±1e30 and -inf: the largest logit is drawn, with log-probability 0."""
    logits = torch.tensor([[1.0, 1e30, -1e30, -INF, 5.0] * 40])
    logits[0, 1:10] = -1e30
    logits[0, 20:] = -INF
    logits[0, 11] = 3e38
    for token, logprob in zip(*drawn(ops_for(column).draw, logits), strict=True):
        assert set(token.tolist()) == {11} and not logprob.any()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("vocabulary", [15, 300])
def test_rows_without_a_distribution_in_triton(vocabulary: int) -> None:
    gpu = pytest.importorskip("distill.engine.kernels.gpu", reason="triton is not installed: pip install triton")
    rows = damaged_rows(vocabulary)
    settings = DRAWS[:36]  # the possible ones
    logits = torch.stack(list(rows.values())).to(gpu.device())
    for temperature, top_k, top_p in settings[::5]:
        numbers = [torch.full((len(rows),), value) for value in (0.5, temperature, top_k, top_p)]
        uniform, temperatures, ks, ps = (
            number.to(gpu.device(), dtype)
            for number, dtype in zip(numbers, (torch.float64, torch.float32, torch.int64, torch.float64), strict=True)
        )
        token, logprob = gpu.draw(logits, torch.arange(len(rows), device=gpu.device()), uniform, temperatures, ks, ps)
        assert logprob[0].isfinite() and logprob[1:].isnan().all() and not token[1:].any()


def test_a_row_outside_the_logits_is_refused(isa: str) -> None:
    for row in (-1, 2, 1 << 40):
        number = torch.ones(1)
        with pytest.raises(IndexError, match="draw: the number of a row is outside the logits"):
            cpu.draw(random(2, 9), torch.tensor([row]), number.double(), number, number.long(), number.double())


def test_the_sampler_names_the_position() -> None:
    logits = torch.tensor([[0.0, 1.0], [NAN, 1.0]])
    draws = [Draw(0, 1, 5, SamplingParams()), Draw(1, 1, 17, SamplingParams())]
    for column in ("reference", "cpu"):
        assert len(sample(ops_for(column), logits, draws[:1])) == 1
        with pytest.raises(NonFiniteLogits, match="token at position 17 are not finite"):
            sample(ops_for(column), logits, draws)
    with pytest.raises(NonFiniteLogits, match="the logits are not finite"):
        logprobs_of(torch.tensor([[INF, 1.0]]), torch.tensor([1]))


# ---- router and experts

ROUTES: list[tuple[str, str, int, int, int, bool, float]] = [
    ("sigmoid", "best two", 4, 2, 4, True, 2.5),
    ("sigmoid", "best two", 1, 1, 4, False, 1.0),
    ("softmax", "best", 4, 2, 3, False, 16.0),
    ("softmax", "best", 1, 1, 3, True, 1.0),
]


def damaged_router_logits() -> Tensor:
    logits = random(9, 16)
    logits[1, 0] = logits[2, 7] = logits[3, 15] = NAN
    logits[4] = NAN
    logits[5, 3], logits[6, 3], logits[7] = INF, -INF, -INF
    return logits


@pytest.mark.parametrize("options", ROUTES)
@pytest.mark.parametrize("bias", [None, 0.0, NAN])
def test_routing(isa: str, options: tuple[str, str, int, int, int, bool, float], bias: float | None) -> None:
    logits = damaged_router_logits()
    bias_x = None if bias is None else random(16, seed=3)
    if bias_x is not None and bias:
        bias_x[5] = bias
    (ours, ours_weight), (theirs, theirs_weight) = (
        column.route(logits, bias_x, *options) for column in (cpu, reference)
    )
    assert ours.min() >= 0 and ours.max() < 16
    same_kinds(ours_weight, theirs_weight)
    undefined = theirs_weight.isnan().any(-1)
    assert undefined[1:5].all() and theirs_weight[undefined].isnan().all()
    assert torch.equal(ours[undefined], theirs[undefined])
    assert not undefined[0] or bias


@pytest.mark.parametrize("options", ROUTES)
def test_routing_in_triton(options: tuple[str, str, int, int, int, bool, float]) -> None:
    gpu = pytest.importorskip("distill.engine.kernels.gpu", reason="triton is not installed: pip install triton")
    logits = damaged_router_logits()
    theirs, theirs_weight = reference.route(logits, None, *options)
    ours, ours_weight = (result.cpu() for result in gpu.route(logits.to(gpu.device()), None, *options))
    assert ours.min() >= 0 and ours.max() < 16
    undefined = theirs_weight.isnan().any(-1)
    assert torch.equal(ours_weight.isnan(), theirs_weight.isnan())
    assert torch.equal(ours[undefined].long(), theirs[undefined])


def test_experts_outside_the_bank_are_refused(isa: str) -> None:
    bank = cpu.expert_bank(3, torch.float32)
    for i in range(3):
        bank.lend((Plain(random(8, 4, seed=i)), Plain(random(8, 4, seed=i)), Plain(random(4, 8, seed=i))))
    bank.settle()
    for expert in (-1, 3, 1 << 40):
        onto = torch.zeros(1, 4)
        with pytest.raises(IndexError, match="experts: the number of an expert is outside the bank"):
            cpu.experts(random(1, 4), torch.tensor([[0, expert]]), torch.ones(1, 2), bank, None, onto)
        assert not onto.any(), "nothing is computed"


# ---- attention


def poisoned(shape: Sequence[int], value: float, token: int, seed: int) -> Tensor:
    """A pool [pages, heads, 16, width] whose token number `token` holds `value` in every head."""
    pool = random(*shape, seed=seed)
    pool[token // 16, :, token % 16] = value
    return pool


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
@pytest.mark.parametrize("token", [0, 37, 99])
def test_attention_to_a_token_that_is_not_finite(isa: str, value: float, token: int) -> None:
    """In the keys, the values, or a query; rows before the token see nothing of it."""
    length, table = 100, torch.arange(7)
    healthy = random(7, 2, 16, 24, seed=1)
    bad = poisoned((7, 2, 16, 24), value, token, 2)
    q = random(length, 4, 24)
    bad_q = q.clone()
    bad_q[token] = value
    for queries, keys, values in ((q, bad, healthy), (q, healthy, bad), (bad_q, healthy, healthy)):
        ours, theirs = (c.prefill_gqa(queries, keys, values, table, length, 0.2) for c in (cpu, reference))
        if values is healthy:  # the reference multiplies values yet to come by zero, which NaN survives, in blocks
            same_kinds(ours, theirs)
        last = queries[-1:], keys, values, table[None], torch.tensor([length]), 0.2
        same_kinds(cpu.decode_gqa(*last), reference.decode_gqa(*last))
    pool = poisoned((7, 1, 16, 24), value, token, 3)
    absorbed = q[-1:], pool, table[None], torch.tensor([length]), 0.2, 16
    same_kinds(cpu.decode_mla(*absorbed), reference.decode_mla(*absorbed))


@pytest.mark.parametrize("value", [NAN, INF])
def test_index_scores_keep_what_is_not_finite(isa: str, value: float) -> None:
    table, q, weight = torch.arange(7), random(4, 5, 24), random(4, 5, seed=1)
    pool = poisoned((7, 1, 16, 24), value, 40, 2)
    ours, theirs = (c.index_scores(q, weight, pool, table, 100) for c in (cpu, reference))
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours[:, 40].isfinite().sum() == 0
    q[1, 3, 2] = value
    ours, theirs = (c.index_scores(q, weight, random(7, 1, 16, 24), table, 100) for c in (cpu, reference))
    assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("page", [-1, 7, 1 << 40])
def test_pages_outside_the_pool_are_refused(isa: str, page: int) -> None:
    pool, table = random(7, 2, 16, 24), torch.arange(7)
    table[3] = page
    lengths, q = torch.tensor([100]), random(1, 4, 24)
    outside = "a page number is outside the pool"
    with pytest.raises(IndexError, match=f"decode: {outside}"):
        cpu.decode_gqa(q, pool, pool, table[None], lengths, 0.2)
    with pytest.raises(IndexError, match=f"prefill: {outside}"):
        cpu.prefill_gqa(q, pool, pool, table, 100, 0.2)
    with pytest.raises(IndexError, match=f"index_scores: {outside}"):
        cpu.index_scores(q, torch.ones(1, 4), pool[:, :1].contiguous(), table, 100)
    with pytest.raises(IndexError, match=f"paged_write: {outside}"):
        cpu.paged_write(pool, torch.tensor([page]), torch.tensor([0]), random(1, 2, 24))
    cpu.decode_gqa(q, pool, pool, table[None], torch.tensor([48]), 0.2)  # the page is past the end


@pytest.mark.parametrize("length", [0, -5, 113, 1 << 40])
def test_lengths_outside_the_table_are_refused(isa: str, length: int) -> None:
    pool, table = random(7, 2, 16, 24), torch.arange(7)
    with pytest.raises(IndexError, match="decode: a length is not covered by the page table"):
        cpu.decode_gqa(random(1, 4, 24), pool, pool, table[None], torch.tensor([length]), 0.2)


def test_offsets_outside_a_page_are_refused(isa: str) -> None:
    for offset in (-1, 16):
        with pytest.raises(IndexError, match="paged_write: an offset is outside the page"):
            cpu.paged_write(random(7, 2, 16, 24), torch.tensor([0]), torch.tensor([offset]), random(1, 2, 24))


# ---- weights

STORED = ("model.norm.weight", "model.layers.1.self_attn.o_proj.weight", "lm_head.weight", "model.embed_tokens.weight")
MOE = (
    "model.layers.1.mlp.experts.3.down_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.1.mlp.gate.e_score_correction_bias",
    "model.layers.1.self_attn.kv_b_proj.weight",
    "model.layers.1.self_attn.kv_a_layernorm.weight",
)


def with_tensor(source: Path, to: Path, name: str, change: Callable[[Tensor], Tensor]) -> Path:
    """A copy of a model directory with one tensor changed."""
    shutil.copytree(source, to)
    tensors = load_file(to / "model.safetensors")
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, to / "model.safetensors")
    return to


def last_number(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    return change


@pytest.mark.parametrize("column", ["reference", "cpu"])
@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("name", [*STORED, *MOE])
def test_weights_that_are_not_finite_are_refused_by_name(
    name: str, value: float, column: str, checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    path = with_tensor(checkpoint("v3").path, tmp_path / "model", name, last_number(value))
    for resident in (None, 2):
        with pytest.raises(ValueError, match=f"{name}.* not finite") as caught:
            Engine.load(path, EngineOptions(cache_tokens=64, kernels=column, resident_experts=resident))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["reference", "cpu"])
@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF])
@pytest.mark.parametrize("part", ["self_attn.o_proj", "self_attn.kv_b_proj", "mlp.experts.3.down_proj"])
def test_scales_that_are_not_positive_are_refused_by_name(
    part: str, scale: float, column: str, fp8_model: Path, tmp_path: Path
) -> None:
    name = f"model.layers.1.{part}.weight_scale_inv"
    path = with_tensor(fp8_model, tmp_path / "model", name, lambda tensor: torch.full_like(tensor, scale))
    with pytest.raises(ValueError, match=f"{name} is not finite and positive"):
        Engine.load(path, EngineOptions(cache_tokens=64, kernels=column))


@pytest.fixture(scope="module")
def fp8_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8") / "model"
    path.mkdir()
    build(path, CONFIGS["v3"], fp8=True)
    return path


def outcome(path: Path, column: str) -> str:
    """ "refused", "not finite" or the tokens of a greedy completion."""
    try:
        engine = Engine.load(path, EngineOptions(cache_tokens=256, kernels=column))
        params = SamplingParams(temperature=0.0, max_new_tokens=3)
        (done,) = engine.generate([Request("a", tuple(range(30)), params, 0, 0, (0,))])
    except NonFiniteLogits:
        return "not finite"
    except ValueError as error:
        return f"refused: {error}"
    assert all(abs(logprob) < INF for logprob in done.logprobs)
    return str(done.token_ids)


@pytest.mark.parametrize("model", ["v3", "v32", "qwen3"])
def test_enormous_weights_give_one_error_or_the_reference_s_tokens(
    model: str, checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """Each tensor of one layer in turn, multiplied by 1e30."""
    source = checkpoint(model).path
    names = [
        name for name in load_file(source / "model.safetensors") if name.startswith(("model.layers.1.", "model.n"))
    ]
    not_finite = 0
    for number, name in enumerate(name for name in names if "experts." not in name or "experts.3." in name):
        path = with_tensor(source, tmp_path / str(number), name, lambda tensor: tensor * 1e30)
        ours, theirs = (outcome(path, column) for column in ("cpu", "reference"))
        assert ours == theirs, name
        not_finite += ours == "not finite"
        shutil.rmtree(path)
    assert not_finite > 0


def test_a_student_that_overflows_is_the_user_s_error(tmp_path: Path) -> None:
    path = with_tensor(
        ROOT / "students" / "tiny-qwen", tmp_path / "model", "model.norm.weight", lambda t: torch.full_like(t, 1e38)
    )
    prompt = Prompt.from_question("1 + 1 = ?", "2")
    with (
        open_model(Model("student", path), LocalEngine()) as backend,
        pytest.raises(UserError, match=f"{path}: the logits of the token at position .* not finite"),
    ):
        list(backend.complete([Job(prompt, (0,))], SamplingParams(temperature=0.6, max_new_tokens=4), 0))
