"""A Hub that takes uploads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.hub.server import served, use
from tests.hub.uploads import TOKEN, WritableHub


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    monkeypatch.setattr("time.sleep", lambda _: None)  # between attempts
    with served(WritableHub()) as running:
        use(running, monkeypatch, tmp_path / "cache")
        yield running
