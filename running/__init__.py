"""The life of a run: its state, checkpoints, resuming, signals, metrics, and reports.

Imports everything but `train`; what is learned is decided there.
"""
