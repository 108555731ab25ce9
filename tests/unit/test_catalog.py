"""Names and paths to cards, the weights they point at, and what is shipped."""

import json
import math
import shutil
import tomllib
from pathlib import Path

import pytest
import safetensors
import yaml
from httpx2 import ConnectError
from huggingface_hub.errors import LocalEntryNotFoundError

from distill import catalog, model_files
from distill.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
POINTER = b"version https://git-lfs.github.com/spec/v1\n"
KINDS = list(catalog.MODELS)
SHIPPED = [(kind, name) for kind in KINDS for name in catalog.entries(kind)]


@pytest.fixture
def card(tmp_path):
    """Writes a teacher card beside a directory of (empty) weights, and returns its file."""
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"")

    def write(**changes):
        fields = {"name": "mine", "family": "deepseek_v3", "weights": "weights", "parameters": 1, "context": 512}
        fields |= {"active_parameters": 1, "license": "mit"} | changes
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(fields))
        return file

    return write


# ---- what is shipped


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_every_shipped_entry_parses_and_bears_its_file_name(kind, name):
    assert catalog.load(kind, name).name == name
    assert catalog.load(kind, name).description


@pytest.mark.parametrize("name", catalog.entries("recipe"))
def test_what_a_shipped_recipe_names_exists(name):
    catalog.check("recipe", name)


@pytest.mark.parametrize(("kind", "name"), [s for s in SHIPPED if s[0] in ("teacher", "student")])
def test_the_weights_of_shipped_cards_are_there_or_on_the_hub(kind, name):
    catalog.check(kind, name)


@pytest.mark.parametrize(("kind", "name"), [("teacher", "tiny-r1"), ("student", "tiny-qwen")])
def test_the_embedded_cards_say_what_their_checkpoints_say(kind, name):
    card = catalog.load(kind, name)
    directory = catalog.resolve_weights(kind, name)
    config = json.loads((directory / "config.json").read_text())
    assert (card.family, card.context) == (config["model_type"], config["max_position_embeddings"])
    extra_layer = f"model.layers.{config['num_hidden_layers']}."  # multi-token prediction, not counted
    with safetensors.safe_open(directory / "model.safetensors", "pt") as file:
        counted = [n for n in file.keys() if not n.startswith(extra_layer) and not n.endswith("_scale_inv")]  # noqa: SIM118
        total = sum(math.prod(file.get_slice(n).get_shape()) for n in counted)
    assert card.parameters == pytest.approx(total / 1e9, rel=0.03)


def test_the_r1_recipes_are_those_of_the_report():
    rates = {
        "qwen-1.5b": 1e-4,
        "qwen-7b": 8e-5,
        "qwen-14b": 7e-5,
        "qwen-32b": 6e-5,
        "llama-8b": 5e-5,
        "llama-70b": 2e-5,
    }
    for name, rate in rates.items():
        train = catalog.load_recipe(f"r1-distill-{name}").train
        assert train.learning_rate == rate
        assert train.train_batch_size == 64 and train.batches_per_step(8) == 64
        assert (train.max_length, train.lr_scheduler_type, train.min_lr_rate) == (32768, "cosine", 0.1)
        assert "NOT verified here" in catalog.find("recipe", f"r1-distill-{name}").read_text()


def test_the_packages_to_install_are_the_packages_there_are():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    here = {
        ".".join(folder.relative_to(ROOT).parts)
        for folder in [ROOT / "distill", *(ROOT / "distill").rglob("*")]
        if folder.is_dir()
        and folder.name != "__pycache__"
        and any(p.is_file() and p.suffix not in (".h", ".cpp") for p in folder.iterdir())
    }
    data = [
        f"{package}.{p.split('/')[0]}" for package, ps in setuptools["package-data"].items() for p in ps if "/" in p
    ]
    here = {name for name in here if not any(f"{name}.".startswith(f"{folder}.") for folder in data)}
    catalogs = {f"distill._catalog.{kind}s" for kind in KINDS}
    assert set(setuptools["packages"]) == here | catalogs
    assert setuptools["package-dir"] == {f"distill._catalog.{kind}s": f"{kind}s" for kind in KINDS}


# ---- names and paths


def test_an_unknown_name_lists_the_choices_and_the_nearest():
    with pytest.raises(
        UserError, match=r"no recipe is named 'tinny'; did you mean tiny\? \(choices: .*r1-distill-qwen-7b"
    ):
        catalog.load_recipe("tinny")


@pytest.mark.parametrize("name", ["zzzzzz", "", "..", "card", "recipe.schema", "tiny-r1"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UserError, match="choices: "):
        catalog.load_recipe(name)


def test_a_missing_file_is_named_with_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"recipes/tiny.yaml: no such recipe file .* did you mean tiny\?") as caught:
        catalog.load_recipe("recipes/tiny.yaml")
    assert str(tmp_path) in str(caught.value)


def test_paths_are_relative_to_where_the_command_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(catalog.find("recipe", "tiny"), "mine.yaml")
    assert catalog.load_recipe("mine.yaml") == catalog.load_recipe("./mine.yaml") == catalog.load_recipe("tiny")


def test_a_card_may_be_a_folder(tmp_path):
    folder = tmp_path / "teachers" / "t"
    folder.mkdir(parents=True)
    shutil.copy(catalog.find("teacher", "deepseek-r1"), folder / "card.yaml")
    assert catalog.load_teacher(str(folder)) == catalog.load_teacher("deepseek-r1")
    with pytest.raises(UserError, match="a directory; a teacher is a YAML file, a model, or a directory with a"):
        catalog.load_teacher(str(folder.parent))


def test_names_do_not_depend_on_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert catalog.load_recipe("tiny").name == "tiny"


def test_overrides_reach_the_recipe():
    assert catalog.load_recipe("tiny", ["seed=5"]).seed == 5


def test_a_recipe_that_names_no_teacher_of_ours_does_not_pass_the_check(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(catalog.find("recipe", "tiny").read_text().replace("teacher: tiny-r1", "teacher: tiny-r2"))
    with pytest.raises(UserError, match=r"no teacher is named 'tiny-r2'; did you mean tiny-r1\?"):
        catalog.check("recipe", str(file))


def test_the_check_notes_lengths_past_the_context(tmp_path):
    file = tmp_path / "r.yaml"
    recipe = catalog.load_recipe("tiny", ["generate.sampling.max_new_tokens=100000", "train.max_length=100000"])
    file.write_text(recipe.to_yaml())
    notes = catalog.check("recipe", str(file))
    assert [note.split()[0] for note in notes] == ["generate.sampling.max_new_tokens", "train.max_length"]
    assert catalog.check("recipe", "tiny") == []


def test_the_check_notes_a_filter_that_drops_every_answer_without_thinking(card, tmp_path):
    file = tmp_path / "r.yaml"
    recipe = catalog.load_recipe("tiny", [f"teacher={card(thinking=False, context=4096)}"])
    file.write_text(recipe.to_yaml())
    (note,) = catalog.check("recipe", str(file))
    assert note.startswith("filter.format drops every trace of mine") and note.endswith("set filter.format to null")
    file.write_text(recipe.model_copy(update={"filter": recipe.filter.model_copy(update={"format": None})}).to_yaml())
    assert catalog.check("recipe", str(file)) == []


def test_the_check_counts_missing_answers_and_duplicates(tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"question": "a", "answer": 1}\n{"question": "a", "answer": 1}\n{"question": "b"}\n')
    file = tmp_path / "r.yaml"
    source = f"[{{kind: file, path: {prompts}}}]"
    file.write_text(catalog.load_recipe("tiny", [f"prompts={source}"]).to_yaml())
    assert catalog.check("recipe", str(file)) == [
        f"{tmp_path.name}/p.jsonl: 1 of 3 problems have no gold answer (first: {prompts}, line 3)",
        "1 of 3 prompts repeat an earlier one and are read once",
    ]


# ---- weights


def test_weights_are_relative_to_the_card(card, tmp_path, monkeypatch):
    file = card()
    monkeypatch.chdir("/")
    assert catalog.resolve_weights("teacher", str(file)) == tmp_path / "weights"


def test_weights_may_be_absolute(card, tmp_path):
    assert catalog.resolve_weights("teacher", str(card(weights=str(tmp_path / "weights")))) == tmp_path / "weights"


@pytest.mark.parametrize("weights", ["elsewhere", "/nowhere/at/all", "./a/b", "a/b/c"])
def test_a_directory_that_is_not_there_is_named(card, weights):
    with pytest.raises(UserError, match=r"weights: no directory .*; give a directory or a hub id \(owner/name\)"):
        catalog.resolve_weights("teacher", str(card(weights=weights)))


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_missing_file_of_the_weights_is_named(card, tmp_path, missing):
    file = card()
    (tmp_path / "weights" / missing).unlink()
    with pytest.raises(UserError, match=f"weights/{missing} is missing; download it: the weights of teacher mine"):
        catalog.resolve_weights("teacher", str(file))


def test_every_shard_of_the_index_must_be_there(card, tmp_path):
    file, weights = card(), tmp_path / "weights"
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"a": shards[0], "b": shards[1], "c": shards[0]}}
    (weights / "model.safetensors").unlink()
    (weights / "model.safetensors.index.json").write_text(json.dumps(index))
    (weights / shards[0]).write_bytes(b"")
    with pytest.raises(UserError, match=f"{shards[1]} is missing"):
        catalog.resolve_weights("teacher", str(file))
    (weights / shards[1]).write_bytes(b"")
    assert catalog.resolve_weights("teacher", str(file)) == weights


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(card, tmp_path, content):
    file = card()
    (tmp_path / "weights" / "model.safetensors").unlink()
    (tmp_path / "weights" / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index.json: (not a safetensors index|not JSON|a JSON list)"):
        catalog.resolve_weights("teacher", str(file))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model.gguf": b"GGUF"}, r"weights holds GGUF files; name one of them in its place, such as \S+/model\.gguf"),
        ({"model-00001-of-00002.gguf": b"GGUF", "config.json": b"{}"}, "holds GGUF files"),
        ({"config.json": b"{}", "pytorch_model.bin": b"PK"}, r"pytorch_model.bin: pickled weights are not read"),
        (
            {"config.json": b"{}", "model.safetensors": POINTER},
            "run `git lfs pull`",
        ),
        ({"config.json": POINTER}, r"config.json is a Git LFS pointer"),
        ({"tokenizer.json": POINTER}, r"tokenizer.json is a Git LFS pointer"),
        (
            {"config.json": b"{}", "model.safetensors": b"", "adapter_config.json": b"{}"},
            "belongs to an adapter .*merge it",
        ),
        ({"config.json": b"{}", "adapter_model.safetensors": b""}, "belongs to an adapter"),
    ],
)
def test_files_that_are_not_read_are_named_with_the_way_out(tmp_path, files, said):
    weights = tmp_path / "weights"
    weights.mkdir()
    for name, content in files.items():
        (weights / name).write_bytes(content)
    fields = {
        "name": "mine",
        "family": "qwen2",
        "weights": "weights",
        "parameters": 1,
        "context": 512,
        "license": "mit",
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(fields))
    for ask in (lambda: catalog.check("student", str(file)), lambda: model_files.model_directory(str(weights))):
        with pytest.raises(UserError, match=said) as caught:
            ask()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (
            "http://localhost:8000/v1",
            "http://localhost:8000/v1 is the address of a server; .* distill eval --model http://",
        ),
        ("localhost:8000", "localhost:8000 is the address of a server"),
        ("HTTPS://api.example.com", "is the address of a server"),
        ("model.gguf", r"model\.gguf: not a GGUF file \(it does not begin with GGUF\); download it again"),
        ("other.gguf", r"no file \S+/other\.gguf; give a directory or a hub id"),
        ("a/other.gguf", r"no file \S+/other\.gguf; give a directory or a hub id"),
        ("model-00001-of-00002.gguf", r"model-00002-of-00002\.gguf is missing; download it \(1 of 2 parts"),
        ("some.txt", "some.txt is a file; give the directory of the model"),
    ],
)
def test_weights_that_are_no_directory(card, tmp_path, monkeypatch, weights, said):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("model.gguf", "model-00001-of-00002.gguf", "some.txt"):
        (tmp_path / name).write_text("x")
    for ask in (catalog.resolve_weights, catalog.local_weights):
        with pytest.raises(UserError, match=rf"mine\.yaml: weights: .*{said}"):
            ask("teacher", str(card(weights=weights)))


def test_the_hub_without_a_network_is_one_reason(monkeypatch):
    def refuse(*_, **__):
        raise LocalEntryNotFoundError("no network") from ConnectError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    assert model_files.download("a/b", None) == "the Hugging Face Hub cannot be reached: check the network"
    with pytest.raises(UserError, match="a/b is not a directory, and as a hub id .*: the Hugging Face Hub cannot be"):
        model_files.model_directory("a/b")


# ---- what a card says of its weights


@pytest.fixture
def student(tmp_path):
    """Writes a card that points at the embedded student's weights, with an architecture."""
    shapes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    shapes |= {"num_key_value_heads": 2, "vocab_size": 576}

    def write(**changes):
        weights = str(catalog.find("student", "tiny-qwen").parent)
        fields = {"name": "mine", "family": "qwen2", "weights": weights, "parameters": 0.00086, "context": 4096}
        architecture = shapes | changes.pop("architecture", {})
        file = tmp_path / "mine.yaml"
        file.write_text(yaml.safe_dump(fields | {"license": "mit", "architecture": architecture} | changes))
        return str(file)

    return write


def test_a_card_that_says_what_its_weights_are(student):
    assert catalog.check("student", student(architecture={"tie_word_embeddings": True})) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": {"hidden_size": 256}}, "architecture.hidden_size is 256, and 128 there; correct the card"),
        (
            {"architecture": {"vocab_size": 5, "num_hidden_layers": 9}},
            "num_hidden_layers is 9, and 4 there; .*vocab_size",
        ),
        ({"architecture": {"tie_word_embeddings": False}}, "architecture.tie_word_embeddings is False, and True there"),
        ({"family": "qwen3"}, "family is qwen3, and qwen2 there"),
    ],
)
def test_a_card_that_contradicts_its_weights_is_refused(student, tmp_path, changes, said):
    file = student(**changes)
    with pytest.raises(UserError, match=rf"mine.yaml contradicts .*config.json: .*{said}"):
        catalog.check("student", file)
    with pytest.raises(UserError, match="contradicts"):
        catalog.check_recipe(catalog.load_recipe("tiny", [f"student={file}"]))


def test_doubtful_figures_of_a_card_are_noted(student):
    notes = catalog.check("student", student(context=8192, parameters=7.6))
    assert notes == [
        "mine: context is 8,192, and max_position_embeddings 4,096 in its config.json",
        "mine: parameters is 7.6 billion, and its files hold 0.000862 billion",
    ]


def test_a_hub_model_without_a_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match="not on this machine: the network is switched off by HF_HUB_OFFLINE: unset it; or"
    ) as caught:
        catalog.resolve_weights("teacher", "deepseek-r1")
    assert "distill teachers copy deepseek-r1 my-teacher.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- copies


@pytest.mark.parametrize(("kind", "name"), SHIPPED)
def test_a_copy_means_the_same_and_keeps_the_comments(kind, name, tmp_path):
    file = catalog.copy(kind, name, tmp_path / "my-own.yaml")
    original, copied = catalog.load(kind, name), catalog.load(kind, str(file))
    own = {"name": "my-own"}
    if kind in ("teacher", "student") and original.weights == ".":
        own["weights"] = str(catalog.find(kind, name).parent)
    assert copied == original.model_copy(update=own)
    comments = [line for line in catalog.find(kind, name).read_text().splitlines() if line.startswith("# ")]
    assert [c for c in comments if "$schema" not in c] == [
        line for line in file.read_text().splitlines() if line.startswith("# ") and "$schema" not in line
    ]


def test_a_copied_recipe_finds_its_schema(tmp_path):
    first = catalog.copy("recipe", "tiny", tmp_path / "a.yaml").read_text().splitlines()[0]
    assert Path(first.partition("$schema=")[2]).samefile(catalog.folder("recipe") / "recipe.schema.json")
    again = catalog.copy("recipe", str(tmp_path / "a.yaml"), tmp_path / "b.yaml").read_text().splitlines()[0]
    assert again == first


def test_a_copy_goes_beside_the_user_by_default_and_never_overwrites(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert catalog.copy("student", "tiny-qwen") == Path("tiny-qwen.yaml")
    before = Path("tiny-qwen.yaml").read_text()
    with pytest.raises(UserError, match=r"tiny-qwen.yaml already exists"):
        catalog.copy("student", "tiny-qwen")
    assert Path("tiny-qwen.yaml").read_text() == before
    with pytest.raises(UserError, match="no such directory"):
        catalog.copy("student", "tiny-qwen", Path("nowhere/a.yaml"))


def test_a_copy_into_a_folder_keeps_its_name(tmp_path):
    assert catalog.copy("benchmark", "math-500", tmp_path) == tmp_path / "math-500.yaml"


@pytest.mark.parametrize("stem", ["123", "null", "1e5"])
def test_a_copy_with_a_strange_name_still_reads(stem, tmp_path):
    assert catalog.load_recipe(str(catalog.copy("recipe", "tiny", tmp_path / f"{stem}.yaml"))).name == stem


def test_a_copy_whose_file_name_is_no_recipe_name_keeps_the_old_one(tmp_path):
    assert catalog.load_recipe(str(catalog.copy("recipe", "tiny", tmp_path / "My Recipe.yaml"))).name == "tiny"


def test_a_run_directory_in_place_of_a_model_names_its_student(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a run directory; its trained model is .*/student$"):
        model_files.model_directory(str(tmp_path))


def test_decontamination_with_a_dataset_that_may_change_is_noted(tmp_path):
    """The card of minerva names no revision, that of gsm8k one; a file is known by its content."""
    source = {"kind": "procedural", "name": "arithmetic"}

    def notes(**changed):
        settings = {"filter.decontaminate": {"benchmarks": ["minerva", "gsm8k"]}, "prompts": [source]}
        sets = [f"{key}={json.dumps(value)}" for key, value in (settings | changed).items()]
        return catalog.check_recipe(catalog.load_recipe("tiny", sets), prompts=True)

    [note] = notes()
    assert "the card of minerva names no `revision` of " in note
    path = tmp_path / "minerva.jsonl"
    path.write_text('{"question": "q", "answer": "1"}\n')
    assert notes(**{"eval.benchmarks": ["minerva"], "eval.sources": {"minerva": str(path)}}) == []
    assert len(notes(**{"eval.benchmarks": ["minerva"], "filter.decontaminate": True})) == 1
