"""`distill plan` for training: machines by name, the catalog's shapes, and what a table has to say of R1's recipes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_support as support

from distill import catalog
from distill.config import parse as parse_model
from distill.errors import UserError
from distill.plan import hardware, training
from distill.plan.hardware import parse
from distill.recipe import Recipe
from distill.train.ranks import model_size

RECIPES = ["qwen-1.5b", "qwen-7b", "qwen-14b", "qwen-32b", "llama-8b", "llama-70b"]


@pytest.mark.parametrize(
    "name, devices, gpu, gigabytes",
    [
        ("8xH100", 8, "H100", 80),
        ("1x24GB", 1, "RTX4090", 24),
        ("4x8x80GB", 32, "A100", 80),
        ("4 × 8 × h200", 32, "H200", 141),
        ("2x8xa100", 16, "A100", 80),
    ],
)
def test_a_machine_by_its_name(name, devices, gpu, gigabytes):
    found = parse(name)
    assert (found.devices, found.gpu, found.memory) == (devices, gpu, gigabytes * 1e9)
    assert found.rate == hardware.GPUS[gpu][1]


@pytest.mark.parametrize(
    "name, message",
    [
        ("H100", "expected a name like 8xH100"),
        ("8xH10", "unknown GPU H10; did you mean H100"),
        ("1x33GB", "name the GPU, or one of 24, 40, 48, 80, 141 GB"),
        ("0.5x", "expected a name like"),
        ("0xH100", "expected a name like"),
        ("0x8xH100", "expected a name like"),
    ],
)
def test_a_machine_that_is_none_is_one_line(name, message):
    with pytest.raises(UserError, match=message):
        parse(name)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [name for name in catalog.entries("student") if name != "tiny-qwen"])
def test_the_shape_of_a_card_has_the_parameters_that_the_card_says(name):
    card = catalog.load_student(name)
    recipe = catalog.load_recipe("r1-distill-qwen-7b", [f"student={name}"])
    counted = model_size.shape(training.configuration(recipe, card)).total
    assert counted / 1e9 == pytest.approx(card.parameters, rel=0.02)


def test_the_embedded_student_is_counted_to_the_last_parameter():
    recipe = catalog.load_recipe("tiny")
    config = training.configuration(recipe, catalog.load_student("tiny-qwen"))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(catalog.resolve_weights("student", "tiny-qwen"))
    norms = 0  # the shape counts matrices, biases and the gains inside layers; what is left is the last norm
    assert model_size.shape(config).total == sum(p.numel() for p in model.parameters()) + norms


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    nowhere = tmp_path_factory.mktemp("nowhere")
    machines = ("1x24GB", "1x80GB", "8x80GB", "4x8x80GB")
    return {
        name: training.plan_training(catalog.load_recipe(f"r1-distill-{name}"), nowhere, machines, 800_000, 6000)[0]
        for name in ("qwen-1.5b", "llama-70b")
    }


@pytest.mark.slow
def test_small_students_fit_where_large_ones_do_not(tables):
    def fitting(name):
        return {(way.hardware.name, way.method) for way in tables[name] if way.fits}

    assert ("1x80GB", "full") in fitting("qwen-1.5b") and ("1x24GB", "lora") in fitting("qwen-1.5b")
    assert ("1x80GB", "full") not in fitting("llama-70b") and ("4x8x80GB", "full") in fitting("llama-70b")
    assert all(len(ways) == 12 for ways in tables.values())


@pytest.mark.slow
def test_sharding_divides_what_it_shards(tables):
    one = next(way for way in tables["llama-70b"] if way.hardware.name == "1x80GB" and way.method == "full")
    many = next(way for way in tables["llama-70b"] if way.hardware.name == "4x8x80GB" and way.method == "full")
    assert many.layout == "fsdp"
    for part in ("weights", "optimizer"):
        assert getattr(one.memory, part) == pytest.approx(32 * getattr(many.memory, part))


def test_fp8_takes_no_hours_on_a_gpu_without_it(tmp_path):
    recipe = catalog.load_recipe("tiny", ["train.dtype=float8", "engine.device=auto"])
    data = training.Data(100, 10_000, 200, "given")
    ways, _ = training.plan_training(recipe, tmp_path, ["8xA100", "8xH100"], expected=data)
    without, with_fp8 = (next(way for way in ways if way.own and way.hardware.gpu == gpu) for gpu in ("A100", "H100"))
    assert without.fits and not without.runs and training._hours(without) == "no FP8"
    assert with_fp8.runs


def test_time_by_hand():
    """70.55 B parameters less the embedding, 8 passes with checkpointing: about 5.6e11 operations a token, and the
    attention's on top; times 4.8 B tokens, twice, over 32 × 312 TFLOP/s at two fifths."""
    recipe = catalog.load_recipe("r1-distill-llama-70b")
    data = training.Data(800_000, 4_800_000_000, 32768, "given")
    config = training.configuration(recipe, catalog.load_student("llama-3.3-70b-instruct"))
    operations = training.operations(config, recipe.train, data)
    products = 8 * (70.55e9 - 128_256 * 8192) * 9.6e9
    assert products < operations < 1.1 * products


def test_routed_experts_cost_time_where_a_token_is_sent_to_them(tmp_path):
    """Of four experts, each of three matrices of 32 × 64, in two layers, a token is sent to two."""
    settings = {"num_local_experts": 4, "head_dim": 8}
    student = support.make_other(tmp_path / "student", "mixtral", **settings)
    recipe = catalog.load_recipe("tiny", [f"student={student}"])
    card = catalog.load_student(recipe.student)
    config = training.configuration(recipe, card)
    experts = 2 * 4 * 3 * 32 * 64
    assert model_size.idle(config) == experts // 2
    active, size = training.student_sizes(recipe)
    assert (active, size) == (pytest.approx(card.parameters - experts / 2e9), card.parameters)
    data = training.Data(100, 10_000, 200, "given")
    shape = model_size.shape(config)
    products = shape.layers * shape.layer + shape.vocabulary * shape.width - experts // 2
    attention = shape.layers * shape.width * 100
    passes = 8 if recipe.train.gradient_checkpointing else 6
    tokens = training.trained_tokens(recipe.train, data)
    assert training.operations(config, recipe.train, data) == pytest.approx(passes * (products + attention) * tokens)


def test_a_student_that_nobody_has_seen_is_one_line(tmp_path):
    card = tmp_path / "card.yaml"
    card.write_text("name: x\nfamily: llama\nweights: some/where\nparameters: 1\ncontext: 10\nlicense: mit\n")
    recipe = catalog.load_recipe("r1-distill-qwen-7b", [f"student={card}"])
    with pytest.raises(UserError, match="its card has no `architecture`: download the weights, or add"):
        training.plan_training(recipe, tmp_path)


def test_batches_say_one_thing_only():
    fields = catalog.load_recipe("tiny").model_dump()
    for train, message in (
        ({"train_batch_size": 8, "gradient_accumulation_steps": 2}, "both set the rows of a step"),
        ({"train_batch_size": 9, "per_device_train_batch_size": 2}, "not a multiple of per_device_train_batch_size 2"),
        ({"activation_offloading": True}, "requires gradient_checkpointing"),
        ({"rope_theta": 1e6}, "rope_theta requires max_position_embeddings"),
    ):
        with pytest.raises(UserError, match=message):
            parse_model(Recipe, fields | {"train": train}, "x.yaml")


@pytest.mark.parametrize("changed, tokens", [({}, 16_500), ({"max_steps": 5}, 8_000)])
def test_tokens_of_a_training(changed, tokens):
    """55 rows of 100 tokens in 3 epochs; 5 steps of 16 rows."""
    settings = catalog.load_recipe("tiny").train.model_copy(update=changed)
    assert training.trained_tokens(settings, training.Data(55, 5_500, 512, "given")) == tokens


def test_methods_that_training_refuses_are_not_planned() -> None:
    train = catalog.load_recipe("tiny").train
    methods = [training.method(train.model_copy(update={"adapter": each})) for each in training._adapters(train)]
    assert methods == ["full", "lora", "qlora"]
    assert training._adapters(train.model_copy(update={"dtype": "float8"})) == [None]
