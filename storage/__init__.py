"""This disk and the Hub: durable files, where a model or dataset is found, the quickstart's weights.

Imports `config` alone; knows nothing of what the files mean.
"""
