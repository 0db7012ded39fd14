"""Dictionaries on disk and on the Hub: one codec file per format, and the doors `load`, `list` and `save`."""

from dictlearn.hub.load import list_dictionaries, load, locate, save

__all__ = ["list_dictionaries", "load", "locate", "save"]
