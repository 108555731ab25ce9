"""A model directory or a run directory in place of a card."""

import json
import shutil

import pytest
import train_support as support

from distill import catalog, model_cards
from distill.errors import UserError
from distill.models import Models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = support.make_student(tmp_path_factory.mktemp("models") / "small")
    (directory / "card.yaml").unlink()
    return directory


def run_of(path, model):
    path.mkdir()
    (path / "run.json").write_text("{}")
    shutil.copytree(model, path / "student")
    (path / "student" / "README.md").write_text("---\nbase_model: b\nlicense: apache-2.0\n---\n\n# x\n")
    return path


def test_the_card_says_what_the_files_say(model):
    card = catalog.load_student(str(model))
    config = json.loads((model / "config.json").read_text())
    assert (card.name, card.family, card.context, card.license) == ("small", "qwen2", 512, "unknown")
    assert card.architecture.hidden_size == config["hidden_size"] == 32
    assert card.parameters * 1e9 == pytest.approx(272 * 32 + sum(_layer(config) for _ in range(2)) + 32)
    assert catalog.check("student", str(model)) == []
    assert catalog.resolve_weights("student", str(model)) == model == catalog.local_weights("student", str(model))


def _layer(config):
    width, inner, head = 32, 96, config["hidden_size"] // 4
    attention = width * (width + 2 * 2 * head) + (width + 2 * 2 * head) + width * width  # q, k, v with biases; o
    return attention + 3 * width * inner + 2 * width


def test_a_run_stands_for_its_student(model, tmp_path):
    run = run_of(tmp_path / "first", model)
    for name in (run, run / "student"):
        card = catalog.load_teacher(str(name))
        assert (card.name, card.license, card.server) == ("first", "apache-2.0", None)
        assert card.parameters == card.active_parameters == catalog.load_student(str(name)).parameters
        assert catalog.resolve_weights("teacher", str(name)) == run / "student"


def test_a_token_uses_its_experts_alone():
    shapes = {"model.layers.0.mlp.experts.0.up_proj.weight": 80, "model.layers.0.mlp.experts.1.up_proj.weight": 80}
    config = {"num_experts": 8, "num_experts_per_tok": 2}
    assert model_cards._active(shapes | {"model.embed_tokens.weight": 40}, config) == 40 + 160 / 4


def test_the_embedded_student_may_teach():
    weights = catalog.resolve_weights("student", "tiny-qwen")  # its card.yaml is a student's
    card = catalog.load_teacher(str(weights))
    assert (card.name, card.family, card.context) == ("tiny-qwen", "qwen2", 4096)
    assert catalog.load_student(str(weights)) == catalog.load_student("tiny-qwen")


def test_a_changed_model_has_another_card(model, tmp_path):
    copy = shutil.copytree(model, tmp_path / "copy")
    assert catalog.load_student(str(copy)).context == 512
    config = json.loads((copy / "config.json").read_text()) | {"max_position_embeddings": 1024}
    (copy / "config.json").write_text(json.dumps(config))
    assert catalog.load_student(str(copy)).context == 1024


def test_a_model_that_teaches_itself_answers_with_the_training_template(model):
    recipe = support.make_recipe(model, {"chat_template": "chatml"})
    recipe = recipe.model_copy(update={"teacher": str(model), "student": str(model)})
    models = Models(recipe, model)
    assert (models.teacher.name, models.teacher.template, models.teacher.place) == ("teacher", "chatml", model)


def _nothing(directory):
    shutil.rmtree(directory)
    directory.mkdir()


def _untrained(directory):
    _nothing(directory)
    (directory / "run.json").write_text("{}")


def _config(**changes):
    def change(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_nothing, "a directory; a student is a YAML file, a model, or a directory with a card.yaml in it"),
        (_untrained, "is a run without a student: finish its training"),
        (lambda d: (d / "config.json").unlink(), "config.json is missing"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda d: (d / "model.safetensors").write_bytes(b"damaged"), "the header of a .safetensors file"),
        (lambda d: (d / "config.json").write_text("{"), "config.json: not JSON"),
        (_config(model_type="unheard_of"), "models of type 'unheard_of' are not trained; expected one of"),
        (_config(max_position_embeddings=None), "config.json: max_position_embeddings"),
    ],
)
def test_a_wrong_directory_is_refused_in_one_line(model, tmp_path, spoil, message):
    directory = shutil.copytree(model, tmp_path / "model")
    spoil(directory)
    with pytest.raises(UserError, match=message) as caught:
        catalog.load_student(str(directory))
    assert "\n" not in str(caught.value)
