"""Recipes: YAML text to a frozen Recipe, with all faults at once, each at its line and key path."""

from ssld.recipe.model import Data, Images, Recipe, Split, schema
from ssld.recipe.reading import differences, dump, known_recipes, read_recipe

__all__ = ["Data", "Images", "Recipe", "Split", "differences", "dump", "known_recipes", "read_recipe", "schema"]
