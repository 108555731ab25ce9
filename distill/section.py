"""What recipes and cards are made of: frozen models that know which of their fields decide what a stage makes."""

from typing import Any

from pydantic import BaseModel, ConfigDict

from distill.config import dump_yaml


class Free:
    """Marks a field that does not decide what a stage's output *is*: how many, how fast, where."""


class Section(BaseModel):
    """Part of a recipe or a card. Frozen, so that what was validated is what runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def settings(self) -> dict[str, Any]:
        """The fields that belong to the stage's fingerprint: dotted keys → JSON values; `Free` ones are left out."""
        flat: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            if Free not in info.metadata:
                flat |= _flattened(name, getattr(self, name))
        return flat

    def marked(self, marker: type) -> dict[str, Any]:
        """Those of the `settings` whose fields carry a mark."""
        fields = [name for name, info in type(self).model_fields.items() if marker in info.metadata]
        return {key: value for key, value in self.settings().items() if key.partition(".")[0] in fields}

    def to_yaml(self) -> str:
        """The whole of it as YAML, every default written out, in the order of the fields."""
        return dump_yaml(self.model_dump(mode="json"))


def _flattened(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Section):
        return {f"{key}.{inner}": v for inner, v in value.settings().items()}
    if isinstance(value, tuple) and any(isinstance(item, Section) for item in value):
        return {k: v for i, item in enumerate(value) for k, v in _flattened(f"{key}.{i}", item).items()}
    return {key: list(value) if isinstance(value, tuple) else value}
