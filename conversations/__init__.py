"""From a file or the Hub to checked messages, their text in a chat template, encoded rows on disk, and previews.

Imports `config` and `storage`. What is supervised is decided in `data.py`; models and devices are unknown here.
"""
