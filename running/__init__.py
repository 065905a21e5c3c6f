"""The life of a run: its state, checkpoints, resuming, signals, metrics, and what it tells people.

Imports everything but `train`; what is learned is decided there.
"""
