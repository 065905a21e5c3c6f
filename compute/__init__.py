"""How a window is computed exactly and fast: layouts, packed attention, cross-entropy, the self-check, memory.

Imports what is to its left: `config`, `storage`, `conversations`, `data`. Files and formats are unknown here.
"""
