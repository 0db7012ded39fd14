"""Dictionaries on disk: one codec file per format, and the doors `load` and `find`."""

from dictlearn.hub.load import find, load, save

__all__ = ["find", "load", "save"]
