"""The resources that a recipe needs, before they are spent: tokens, money, memory, time and disk of all stages."""

from distill.plan.stages import plan_recipe
from distill.plan.training import plan_training

__all__ = ["plan_recipe", "plan_training"]
