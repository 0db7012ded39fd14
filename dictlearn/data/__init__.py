"""Text -> token rows on disk -> activations of a frozen LM -> shuffled batches.

Names are imported on first use: the tokenising worker starts without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dictlearn.data.module import ActivationData
    from dictlearn.data.normalize import SiteStatistics, estimate_statistics
    from dictlearn.data.stream import ActivationStream, Batch
    from dictlearn.data.text import EmbeddedText, LocalText, Rows, TextData
    from dictlearn.data.tokens import TokenStore

_HOME = {
    "ActivationData": "module",
    "ActivationStream": "stream",
    "Batch": "stream",
    "EmbeddedText": "text",
    "LocalText": "text",
    "Rows": "text",
    "SiteStatistics": "normalize",
    "TextData": "text",
    "TokenStore": "tokens",
    "estimate_statistics": "normalize",
}
__all__ = [
    "ActivationData",
    "ActivationStream",
    "Batch",
    "EmbeddedText",
    "LocalText",
    "Rows",
    "SiteStatistics",
    "TextData",
    "TokenStore",
    "estimate_statistics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dictlearn.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dictlearn.data.{_HOME[name]}"), name)
