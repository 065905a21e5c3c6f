"""What a model learned: its answers, comparisons of two models, and what shows them to people.

Imports models and data, and is imported by `eval.py` and what trains; it knows no optimizer and no loop.
"""
