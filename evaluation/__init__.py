"""Answers of a model, comparisons of two models, and the pages and texts that show them to people.

Imports models and data, and is imported by `eval.py` and what trains; it knows no optimizer and no loop.
"""
