"""What a recipe will need before it is spent: so far the training's memory, time and disk."""

from distill.plan.training import plan_training

__all__ = ["plan_training"]
