"""From a file or the Hub to masked examples: sources, formats, templates, masking, the corpus on disk, and previews.

Imports `config` and `storage`. Splits and windows are made in `data.py`; models and devices are unknown here.
"""
