"""This disk and the Hub: durable files, the cache, models and datasets by name, the quickstart's weights.

Imports `config` alone; knows nothing of what the files mean.
"""
