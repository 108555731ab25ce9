"""The resources that a recipe needs, before they are spent: memory, time and disk of the training."""

from distill.plan.training import plan_training

__all__ = ["plan_training"]
