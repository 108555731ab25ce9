"""What a recipe may say, what of it is fingerprint, and how it is written out."""

import json

import pytest
from pydantic import ValidationError

from distill.catalog import entries, folder, load_recipe
from distill.config import parse, read_yaml
from distill.recipe import Generate, Recipe, SamplingSettings, recipe_schema
from distill.recipe.sources import FilePrompts
from distill.section import Section


def test_settings_leave_counts_and_means_out():
    settings = Generate(samples=7, max_batch=3).settings()
    assert settings == {
        "sampling.temperature": 0.6,
        "sampling.top_p": 0.95,
        "sampling.top_k": 0,
        "sampling.max_new_tokens": 32768,
        "prompt_suffix": "",
        "logprobs": None,
    }


def test_settings_do_not_change_with_what_is_free_and_do_with_the_rest():
    base = Generate()
    assert base.settings() == Generate(samples=9, max_batch=1).settings()
    assert base.settings() != Generate(sampling=SamplingSettings(temperature=0.7)).settings()


def test_optional_counts_are_free_too():
    assert FilePrompts(kind="file", path="a", limit=3).settings() == FilePrompts(kind="file", path="a").settings()


def test_settings_of_a_recipe_are_flat_json_and_go_into_lists():
    settings = load_recipe("tiny").settings()
    assert settings["prompts.0.kind"] == "procedural"
    assert "prompts.0.limit" not in settings
    assert settings["eval.seed"] == 1 and "eval.benchmarks" not in settings, "other benchmarks extend an evaluation"
    assert json.loads(json.dumps(settings)) == settings


def test_sections_are_frozen_and_refuse_unknown_keys():
    with pytest.raises(ValidationError, match="frozen"):
        Generate().samples = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Generate(sample=2)


@pytest.mark.parametrize("name", entries("recipe"))
def test_the_resolved_recipe_reads_back_as_the_same_recipe(name, tmp_path):
    recipe = load_recipe(name)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert parse(Recipe, read_yaml(file), str(file)) == recipe
    assert load_recipe(str(file)) == recipe


def every_key(section: Section) -> dict | None:
    """None for a section without keys, which is written as `true`."""
    return (
        None
        if not type(section).model_fields
        else {
            name: every_key(value)
            if isinstance(value := getattr(section, name), Section)
            else dict.fromkeys(value)
            if isinstance(value, dict)
            else None
            for name in type(section).model_fields
        }
    )


def test_the_resolved_recipe_writes_every_default_out_in_order(tmp_path):
    recipe = load_recipe("tiny")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")

    def shape(data):
        return {key: shape(value) if isinstance(value, dict) else None for key, value in data.items()}

    written = shape(read_yaml(file))
    assert written == every_key(recipe)
    assert list(written) == list(Recipe.model_fields)
    assert list(written["train"]) == list(type(recipe.train).model_fields)


def test_the_committed_schema_is_current():
    committed = (folder("recipe") / "recipe.schema.json").read_text(encoding="utf-8")
    assert committed == recipe_schema(), "run: distill recipes schema > recipes/recipe.schema.json"


def test_the_schema_refuses_unknown_keys_and_describes_every_key():
    schema = json.loads(recipe_schema())
    sections = [schema, *(section for section in schema["$defs"].values() if "properties" in section)]
    assert all(section["additionalProperties"] is False for section in sections)
    bare = [
        f"{section['title']}.{name}"
        for section in sections
        for name, field in section["properties"].items()
        if "description" not in field and "$ref" not in field and name != "kind"
    ]
    assert not bare


@pytest.mark.parametrize("name", entries("recipe"))
def test_every_recipe_names_its_schema_for_editors(name):
    first = entries("recipe")[name].read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=recipe.schema.json"
