"""Optimizers, one file each, and how those of several dictionaries become one."""

from dictlearn.training.optimizers.adam import Adam
from dictlearn.training.optimizers.base import OptimizerSettings, RunOptimizer, average_, build_optimizer
from dictlearn.training.optimizers.muon import Muon
from dictlearn.training.optimizers.sign_sgd import SignSGD

__all__ = ["Adam", "Muon", "OptimizerSettings", "RunOptimizer", "SignSGD", "average_", "build_optimizer"]
