"""Recipes of real merges: recovered and proved, and told from recipes with one small lie.

``python -m benchmarks recipes [recover|verify ...] [--folder DIR] [--limit N] [--page FILE]``: see
`benchmarks.recipes.command`.
"""
