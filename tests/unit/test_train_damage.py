"""Files of a training that were lost or changed are named and made again, and the student is the same bytes."""

import random
import shutil

import pytest
import train_support as support

from distill.errors import UserError
from distill.run import Run
from distill.train import STAGE

STEPS = 6
SETTINGS = {"max_steps": STEPS, "logging_steps": 1, "save_steps": 2}
FAST, ALL = 8, 100  # seeded mutations of an unfinished training


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return support.make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def trained(student, tmp_path_factory):
    """A finished run, which tests copy."""
    directory = support.begin(tmp_path_factory.mktemp("runs") / "run", support.sums(12), student)
    support.train_here(directory, student, SETTINGS)
    return directory


@pytest.fixture(scope="module")
def unfinished(student, tmp_path_factory):
    """A run that was interrupted after step 4 of 6, with checkpoints of the steps 2 and 4."""
    directory = support.begin(tmp_path_factory.mktemp("unfinished") / "run", support.sums(12), student)
    with pytest.MonkeyPatch.context() as patch:
        from distill.train.learn.loop import Loop

        step = Loop.step

        def interrupted(loop):
            if loop.position.step == 4:
                raise KeyboardInterrupt
            step(loop)

        patch.setattr(Loop, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            support.train_here(directory, student, SETTINGS)
    assert sorted(p.name for p in (directory / "checkpoints").glob("step-*")) == ["step-000002", "step-000004"]
    assert not (directory / "student").exists()
    return directory


@pytest.fixture
def copy(tmp_path):
    def copy(directory):
        return shutil.copytree(directory, tmp_path / "run")

    return copy


def content(directory):
    return {path.name: path.read_bytes() for path in (directory / "student").iterdir() if path.name != "README.md"}


def flip(path, place=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if place is None else place] ^= 1
    path.write_bytes(data)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "chat_template.jinja", "tokenizer.json", "generation_config.json"]
)
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_student_is_written_again_from_the_last_checkpoint(
    trained, student, copy, name, damage, capsys, monkeypatch
):
    from distill.train.learn.loop import Loop

    monkeypatch.setattr(Loop, "step", None)  # nothing is trained
    directory = copy(trained)
    path = directory / "student" / name
    path.unlink() if damage == "missing" else flip(path)
    support.train_here(directory, student, SETTINGS)
    assert content(directory) == content(trained)
    said = capsys.readouterr().out
    assert f"{path} {'is missing' if damage == 'missing' else 'has changed'}" in said
    assert f"step {STEPS} of {STEPS} was the last: the student is written from its checkpoint" in said


def test_a_log_that_was_lost_comes_back_with_the_checkpoint(trained, student, copy):
    directory = copy(trained)
    (directory / "checkpoints" / "log.jsonl").unlink()
    support.train_here(directory, student, SETTINGS)
    assert (directory / "checkpoints/log.jsonl").read_bytes() == (trained / "checkpoints/log.jsonl").read_bytes()


def test_without_a_checkpoint_the_student_is_trained_again(trained, student, copy):
    directory = copy(trained)
    shutil.rmtree(directory / "student")
    for path in (directory / "checkpoints").glob("step-*"):
        shutil.rmtree(path)
    support.train_here(directory, student, SETTINGS)
    assert content(directory) == content(trained)


@pytest.mark.parametrize("name", ["ids.bin", "index.parquet", "rows.json"])
def test_rows_that_changed_are_made_again_before_a_training_goes_on(unfinished, trained, student, copy, name, capsys):
    directory = copy(unfinished)
    path = directory / "tokens" / name
    flip(path)
    support.train_here(directory, student, SETTINGS)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "encoding the rows again" in line]
    assert line.startswith(str(path))
    assert path.read_bytes() == (trained / "tokens" / name).read_bytes() or name == "rows.json"  # it has times
    assert content(directory) == content(trained)


# ---- seeded mutations


def mutated(directory, seed):
    """Change, cut or remove one file of the training; returns what was done."""
    draw = random.Random(seed)
    places = ("tokens", "checkpoints", "stages", "recipe.yaml")
    files = sorted(path for place in places for path in [directory / place, *(directory / place).rglob("*")])
    files = [path for path in files if path.is_file() and path.name != "filter.json"]
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    match draw.choice(("bits", "bits", "cut", "gone", "directory")):
        case "bits":
            for _ in range(draw.choice((1, 1, 8))):
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
            what = "bits"
        case "cut":
            path.write_bytes(data[: draw.randrange(len(data))])
            what = "cut"
        case "gone":
            path.unlink()
            what = "gone"
        case "directory":
            place = path.parent if path.parent != directory else directory / "checkpoints"
            shutil.rmtree(place)
            return f"{place.name} gone"
    return f"{path.relative_to(directory)} {what}"


def check(directory, unfinished, trained, student, seed):
    """One mutation: a line and exit code 2, or the student of the undisturbed training."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(unfinished, directory)
    what = mutated(directory, seed)
    try:
        support.train_here(directory, student, SETTINGS)
    except UserError as error:
        assert "\n" not in str(error), what
        assert not (directory / "student").exists(), what
        return "refused"
    assert content(directory) == content(trained), f"{what}: another student, without a word"
    assert len((directory / "checkpoints/log.jsonl").read_text().splitlines()) == STEPS, what
    with Run(directory, support.make_recipe(student, SETTINGS)) as run:
        assert STAGE.is_finished(run), what
    return "same"


def test_mutations_of_an_unfinished_training(unfinished, trained, student, tmp_path):
    outcomes = [check(tmp_path / "run", unfinished, trained, student, seed) for seed in range(FAST)]
    assert "same" in outcomes


@pytest.mark.slow
def test_a_hundred_mutations_of_an_unfinished_training(unfinished, trained, student, tmp_path):
    outcomes = [check(tmp_path / "run", unfinished, trained, student, seed) for seed in range(ALL)]
    assert outcomes.count("same") > ALL / 2
