"""Dictionaries: SAEs, transcoders and their relatives. One file per kind."""

from dictlearn.dictionaries.base import Dictionary

__all__ = ["Dictionary"]
