"""The prompts of a training with rollouts: read once, and tokenized once for every model that reads them.

The checks before the stage, the memory estimate and the feed all ask for the prompts or for the longest of them; with a
million prompts each reading takes minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from distill.backends.collect import asked
from distill.chat import Chat
from distill.objectives import RolloutSettings
from distill.prompts import Prompt, load_prompts
from distill.recipe import Recipe, Train
from distill.train.rows.encode import is_held_out


@dataclass(frozen=True)
class Questions:
    """Prompts as a model is asked them. chat: the model's."""

    prompts: Sequence[Prompt]
    chat: Chat

    @cached_property
    def lengths(self) -> list[int]:
        """The tokens of each prompt. Errors: UserError for one that the template does not render."""
        return [len(ids) for ids in self.chat.prompts_ids(prompt.messages for prompt in self.prompts)]

    def context(self, rollouts: RolloutSettings) -> int:
        """Tokens of the longest prompt and a whole rollout."""
        return max(self.lengths) + rollouts.sampling.max_new_tokens

    def largest_batch(self, settings: Train) -> tuple[int, int]:
        """(tokens, supervised tokens) of the largest batch of a forward pass."""
        rollouts = settings.objective.rollout_settings
        assert rollouts is not None, "the objective has rollouts"
        context, new, rows = (
            self.context(rollouts),
            rollouts.sampling.max_new_tokens,
            settings.per_device_train_batch_size,
        )
        if settings.packing:
            tokens = settings.max_length * rows
            return tokens, round(tokens * new / context)
        return context * rows, new * rows


def questions_of(recipe: Recipe, chat: Chat, prompts: Sequence[Prompt] | None = None) -> Questions:
    """The recipe's prompts as a student is asked them, with `generate.prompt_suffix`, without those whose traces are
    held out (`train.val_size`). prompts: where they have been read already. Errors: as `load_prompts`."""
    if prompts is None:
        prompts = list(load_prompts(recipe.prompts, limit=recipe.generate.max_prompts))
    share, seed = recipe.train.val_size, recipe.train.seed
    trained = (prompt for prompt in prompts if not is_held_out(prompt.id, share, seed))
    return Questions([asked(prompt, recipe.generate.prompt_suffix) for prompt in trained], chat)
