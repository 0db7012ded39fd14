"""Language models: load them, name places in them, read and replace activations there."""

from dictlearn.lm.clean_run import CleanRun, Patched, reached
from dictlearn.lm.load import LM, find_device, lm_config, load_lm, load_tokenizer, model_of, skeleton
from dictlearn.lm.sites import file_name, name_of, resolve, resolve_pair, site_width
from dictlearn.lm.taps import activations, capture, edit, widths

__all__ = [
    "LM",
    "CleanRun",
    "Patched",
    "activations",
    "capture",
    "edit",
    "file_name",
    "find_device",
    "lm_config",
    "load_lm",
    "load_tokenizer",
    "model_of",
    "name_of",
    "reached",
    "resolve",
    "resolve_pair",
    "site_width",
    "skeleton",
    "widths",
]
