"""Circuits: which latents carry a behaviour of a language model, and how faithfully."""

from dictlearn.circuits.ablation import Ablation
from dictlearn.circuits.cuts import cuts_of
from dictlearn.circuits.faithfulness import Curve, curve, error_share
from dictlearn.circuits.nodes import NodeValues, Ranking
from dictlearn.circuits.pairs import PairBatch
from dictlearn.circuits.run import run_circuit
from dictlearn.circuits.scores import node_scores

__all__ = [
    "Ablation",
    "Curve",
    "NodeValues",
    "PairBatch",
    "Ranking",
    "curve",
    "cuts_of",
    "error_share",
    "node_scores",
    "run_circuit",
]
