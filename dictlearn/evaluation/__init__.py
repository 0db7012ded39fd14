"""Evaluation of dictionaries on a language model: blocks, reports, plots, tables."""

from dictlearn.evaluation.context import EvaluationBlock, EvaluationContext
from dictlearn.evaluation.run import Results, evaluate

__all__ = ["EvaluationBlock", "EvaluationContext", "Results", "evaluate"]
