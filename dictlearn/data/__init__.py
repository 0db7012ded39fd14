"""Text -> token rows on disk -> activations of a frozen LM -> shuffled batches.

Names are imported on first use: the tokenising worker starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dictlearn.data.module import ActivationData
    from dictlearn.data.normalize import SiteStatistics, estimate_norm_filter, estimate_statistics
    from dictlearn.data.outliers import NormFilter
    from dictlearn.data.planted import Planted
    from dictlearn.data.rows import RowData, Rows, RowStore
    from dictlearn.data.sequences import Sequences, SequenceStream
    from dictlearn.data.store import ActivationStore
    from dictlearn.data.stored import StoredStream
    from dictlearn.data.stream import ActivationStream, Batch
    from dictlearn.data.text import EmbeddedText, HubText, LocalText, TextData
    from dictlearn.data.tokens import TokenStore

_HOME = {
    "ActivationData": "module",
    "ActivationStore": "store",
    "ActivationStream": "stream",
    "Batch": "stream",
    "EmbeddedText": "text",
    "HubText": "text",
    "LocalText": "text",
    "NormFilter": "outliers",
    "Planted": "planted",
    "RowData": "rows",
    "RowStore": "rows",
    "Rows": "rows",
    "SequenceStream": "sequences",
    "Sequences": "sequences",
    "SiteStatistics": "normalize",
    "StoredStream": "stored",
    "TextData": "text",
    "TokenStore": "tokens",
    "estimate_norm_filter": "normalize",
    "estimate_statistics": "normalize",
}
__all__ = [
    "ActivationData",
    "ActivationStore",
    "ActivationStream",
    "Batch",
    "EmbeddedText",
    "HubText",
    "LocalText",
    "NormFilter",
    "Planted",
    "RowData",
    "RowStore",
    "Rows",
    "SequenceStream",
    "Sequences",
    "SiteStatistics",
    "StoredStream",
    "TextData",
    "TokenStore",
    "estimate_norm_filter",
    "estimate_statistics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dictlearn.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dictlearn.data.{_HOME[name]}"), name)
