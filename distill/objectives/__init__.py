"""What the student learns of a row: one file per objective, and the union of all of them.

An objective is a section of the recipe (`train.objective: {kind: …}`) and owns everything that is particular to it: its
fields and their checks, whether it needs the teacher's distributions, the names of its loss parts in the log and in
plots, its tag on the model card, and the loss itself. A new objective is a file here and a member of `Objective`; the
training, the log, the card and the memory plan know nothing else of it.

The room lies below `recipe` and not inside `train`, because a recipe is parsed by every command, and the settings and
the loss of an objective belong in one file. torch is imported where a loss is computed: parsing does not wait for it.
"""

from typing import Annotated

from pydantic import Field

from distill.objectives.base import BaseObjective, Criterion, Sampled, TopK
from distill.objectives.grpo import Grpo
from distill.objectives.logits import Logits
from distill.objectives.on_policy import OnPolicy
from distill.objectives.rollout_settings import RolloutSampling, RolloutSettings
from distill.objectives.sft import Sft

__all__ = [
    "BaseObjective",
    "Criterion",
    "Grpo",
    "Logits",
    "Objective",
    "OnPolicy",
    "RolloutSampling",
    "RolloutSettings",
    "Sampled",
    "Sft",
    "TopK",
]

Objective = Annotated[
    Sft
    | Logits
    | OnPolicy
    | Grpo,
    Field(discriminator="kind"),
]  # fmt: skip
