"""Recipes: text -> Recipe. Nothing here looks at a model."""
