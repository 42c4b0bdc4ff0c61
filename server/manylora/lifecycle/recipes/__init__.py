"""The shipped demo adapters' data, each made by a script from generated text or from what a package ships."""

from manylora.lifecycle.recipes.commands import Places, all_commands
from manylora.lifecycle.recipes.recipe import Recipe, Splits, write_splits
from manylora.lifecycle.recipes.registry import RECIPES

__all__ = ["RECIPES", "Places", "Recipe", "Splits", "all_commands", "write_splits"]
