"""Base of recipes and cards: frozen models that know which of their fields decide what a stage produces."""

from pydantic import BaseModel, ConfigDict, JsonValue

from distill.config import dump_yaml


class Free:
    """Mark of a field that does not decide what a stage's output *is*: how many, how fast, where."""


class Later:
    """Mark of a field that belongs to the fingerprint only where it differs from its default, so that runs begun before
    the field existed can go on."""


class Section(BaseModel):
    """Part of a recipe or a card. Frozen, so that the validated values are those that run."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def settings(self) -> dict[str, JsonValue]:
        """The fields that belong to the stage's fingerprint: dotted keys → JSON values, without the `Free` ones."""
        flat: dict[str, JsonValue] = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if Free not in info.metadata and not (Later in info.metadata and value == info.default):
                flat |= _flattened(name, value)
        return flat

    def marked(self, marker: type) -> dict[str, JsonValue]:
        """Those of the `settings` whose fields carry a mark."""
        fields = [name for name, info in type(self).model_fields.items() if marker in info.metadata]
        return {key: value for key, value in self.settings().items() if key.partition(".")[0] in fields}

    def to_yaml(self) -> str:
        """The section as YAML, every default written out, in the order of the fields."""
        return dump_yaml(self.model_dump(mode="json"))


def _flattened(key: str, value: JsonValue | Section | tuple[JsonValue | Section, ...]) -> dict[str, JsonValue]:
    if isinstance(value, Section):
        return {f"{key}.{inner}": v for inner, v in value.settings().items()}
    if isinstance(value, tuple):
        if any(isinstance(item, Section) for item in value):
            return {k: v for i, item in enumerate(value) for k, v in _flattened(f"{key}.{i}", item).items()}
        return {key: [item for item in value if not isinstance(item, Section)]}
    return {key: value}


def with_tuples(value: object) -> object:
    """A value that came through a validator in Python, where pydantic takes no list for a tuple."""
    if isinstance(value, list | tuple):
        return tuple(map(with_tuples, value))
    return {key: with_tuples(inner) for key, inner in value.items()} if isinstance(value, dict) else value
