"""The committed teacher: the published format, the numbers of `transformers`, a draft layer worth its bytes."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.backends import Completed, Job, SamplingParams
from distill.backends.local import LocalBackend
from distill.models import Model
from distill.prompts import Prompt
from distill.prompts.arithmetic import Problem, problems, story
from distill.recipe import LocalEngine

ROOT = Path(__file__).resolve().parents[2]
TEACHER, STUDENT = ROOT / "teachers" / "tiny-r1", ROOT / "students" / "tiny-qwen"
GREEDY = SamplingParams(temperature=0, top_p=1, max_new_tokens=160)
sys.path.insert(0, str(ROOT / "tools"))


def size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(TEACHER / "model.safetensors")


@pytest.fixture(scope="module")
def dequantised(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights as plain float32, by the definition: each 128×128 block of codes times its scale."""
    plain = {}
    for name, value in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        weight = value.float()
        if (scale := tensors.get(f"{name}_scale_inv")) is not None:
            for i in range(scale.shape[0]):
                for j in range(scale.shape[1]):
                    weight[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[i, j]
        plain[name] = weight
    return plain


@pytest.fixture(scope="module")
def backend() -> LocalBackend:
    return LocalBackend.load(Model("teacher", TEACHER), LocalEngine(dtype="float32"))


@pytest.fixture(scope="module")
def asked() -> list[Prompt]:
    return [Prompt.from_question(p.question, p.answer) for p in problems("heldout", 1, 20)]


def test_the_pair_fits_into_the_repository() -> None:
    assert size(TEACHER) <= 8_000_000
    assert size(STUDENT) <= 6_000_000


def test_the_checkpoint_has_the_published_form(tensors: dict[str, Tensor]) -> None:
    config = json.loads((TEACHER / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "deepseek_v3"
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    quantised = {name for name, value in tensors.items() if value.dtype == torch.float8_e4m3fn}
    assert len(quantised) > 100
    for name in quantised:
        rows, columns = tensors[name].shape
        assert tensors[f"{name}_scale_inv"].shape == (-(-rows // 128), -(-columns // 128))
    assert tensors["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"].shape[0] % 128, "no partial block is exercised"
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].abs().max() > 0, "the router was never balanced"
    mtp = f"model.layers.{config['num_hidden_layers']}."
    assert {
        mtp + part for part in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    } <= set(tensors)


@pytest.fixture(scope="module")
def reference(dequantised: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same weights in `transformers`, float32."""
    from safetensors.torch import save_file
    from transformers import DeepseekV3ForCausalLM

    directory = tmp_path_factory.mktemp("reference")
    config = json.loads((TEACHER / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    config |= {"torch_dtype": "float32", "num_nextn_predict_layers": 0}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    mtp = f"model.layers.{config['num_hidden_layers']}."
    main = {name: value.contiguous() for name, value in dequantised.items() if not name.startswith(mtp)}
    save_file(main, directory / "model.safetensors", metadata={"format": "pt"})
    model, info = DeepseekV3ForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


@pytest.fixture(scope="module")
def answers(backend: LocalBackend, asked: list[Prompt]) -> list[Completed]:
    return list(backend.complete([Job(p, (0,)) for p in asked], GREEDY, seed=0))


@pytest.fixture(scope="module")
def deviation(reference: Any, backend: LocalBackend, answers: list[Completed]) -> tuple[float, float]:
    """(largest difference of a log-probability, largest logit) over every position of prompts and answers."""
    sequences = [[*done.prompt_token_ids, *done.completion_token_ids] for done in answers]
    difference = largest = 0.0
    scored = backend.engine.score(sequences, top_k=backend.engine.spec.vocab_size)
    for tokens, scores in zip(sequences, scored, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([tokens])).logits[0, :-1]
        expected = logits.log_softmax(-1)
        assert scores.top_logprobs is not None
        actual = torch.empty_like(expected)
        for position, top in enumerate(scores.top_logprobs):
            index, value = zip(*top, strict=True)
            actual[position, list(index)] = torch.tensor(value)
        difference = max(difference, float((actual - expected).abs().max()))
        largest = max(largest, float(logits.abs().max()))
    print(f"max difference {difference:.2e}, largest logit {largest:.1f}")
    return difference, largest


@pytest.mark.slow
def test_transformers_gives_the_same_text(reference: Any, answers: list[Completed]) -> None:
    assert len(answers) == 20
    for done in answers:
        ids = torch.tensor([done.prompt_token_ids])
        out = reference.generate(ids, do_sample=False, max_new_tokens=160, pad_token_id=1, use_cache=True)
        assert tuple(out[0, ids.shape[1] :].tolist()) == done.completion_token_ids, done.prompt.messages[-1]["content"]


def test_transformers_gives_the_same_logits(deviation: tuple[float, float]) -> None:
    difference, largest = deviation
    assert largest > 1
    assert difference <= 1e-4 * largest


def test_transformers_gives_the_same_logits_to_a_thousandth(deviation: tuple[float, float]) -> None:
    assert deviation[0] <= 1e-3


def test_the_first_draft_of_the_mtp_layer_is_accepted_most_of_the_time(
    dequantised: dict[str, Tensor], backend: LocalBackend, asked: list[Prompt]
) -> None:
    """Greedy drafts against what the main model goes on to write, on held-out problems."""
    from tiny_teacher_model import Config, Teacher

    model = Teacher(Config(vocab=backend.engine.spec.vocab_size))
    model.load_published(dequantised)
    model.eval()
    accepted = drafted = 0
    for done in backend.complete([Job(p, (0,)) for p in asked], GREEDY, seed=0):
        ids = torch.tensor([[*done.prompt_token_ids, *done.completion_token_ids]])
        start = len(done.prompt_token_ids)
        with torch.inference_mode():
            draft = model(ids)[1][0, :-1].argmax(-1)  # draft[i] is of token i + 2
        accepted += int((draft == ids[0, 2:])[start - 1 :].sum())
        drafted += len(done.completion_token_ids) - 1
    print(f"first drafts accepted: {accepted} of {drafted} = {accepted / drafted:.1%}")
    assert drafted > 500
    assert accepted / drafted >= 0.70


@pytest.mark.slow
def test_no_held_out_problem_is_in_the_training_texts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The proof's first thousands of documents; `python tools/prove_heldout.py` does all of them in minutes."""
    import prove_heldout

    monkeypatch.setattr(sys, "argv", ["prove_heldout.py", "--documents", "5000"])
    prove_heldout.main()
    assert capsys.readouterr().out.count("none of 5,000 held-out problems") == 3


def test_the_proof_finds_a_held_out_problem_in_every_form() -> None:
    import prove_heldout

    chain = (23, 45, -12, 9)
    told = Problem(chain, story(chain, random.Random(0)))
    heldout = {tuple(sorted(chain)): told}
    working = "7 + 1 = 8\n" + "\n".join(told.steps) + "\n9 - 3 = 6"
    read = "Start 23.\nOn Monday + 45\nOn Tuesday - 12\nOn Wednesday + 9"
    for text in (told.question, "x 23 + 45 - 12 + 9 y", "1 + 23 + 9 + 45 - 12", working, read):
        assert prove_heldout.search([text], heldout).found is told, text
    assert prove_heldout.search(["23 + 45 - 12 = 56", "23 + 45 = 68\n68 - 12 = 56"], heldout).found is None
