"""Recipes: their schema, the packaged YAML files, and command-line overrides."""
