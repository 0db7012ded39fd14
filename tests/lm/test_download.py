"""Names of the Hub: what is downloaded, and the reason, within seconds, where nothing can be.

In subprocesses, since huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dictlearn.lm import load_lm
from tests.lm.hub_server import COMMIT, HubServer, hub_server

TRY = """
import json, sys, time
from dictlearn.lm import lm_config, load_lm, skeleton
from dictlearn.types import DictlearnError
results = []
for call, name, revision in json.loads(sys.argv[1]):
    start = time.perf_counter()
    try:
        got = {"load_lm": load_lm, "lm_config": lm_config, "skeleton": skeleton}[call](name, revision)
        text = f"{got.name} {got.revision} {got.fingerprint()}" if call == "load_lm" else type(got).__name__
    except DictlearnError as error:
        text = f"ERROR {error}"
    results.append((text, time.perf_counter() - start))
print(json.dumps(results))
"""


Call = tuple[str, str, str | None]  # function, name, revision


def attempts(endpoint: str, cache: Path, calls: Sequence[Call], **env: str) -> list[tuple[str, float]]:
    """What each call gave, and the seconds it took, in one process with its own download cache."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    clean |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", **env}
    out = subprocess.run(
        [sys.executable, "-c", TRY, json.dumps(calls)], env=clean, capture_output=True, text=True, timeout=300
    )
    assert out.returncode == 0, out.stderr
    return [(text, seconds) for text, seconds in json.loads(out.stdout.splitlines()[-1])]


@pytest.fixture
def server(folder):
    with hub_server(folder("llama")) as running:
        yield running


def test_an_lm_is_downloaded_once_and_knows_its_commit(server: HubServer, folder, tmp_path):
    expected = f"someone/tiny {COMMIT} {load_lm(str(folder('llama'))).fingerprint()}"
    calls: list[Call] = [("skeleton", "someone/tiny", None), ("load_lm", "someone/tiny", None)]
    results = attempts(server.url, tmp_path, calls)
    assert [text for text, _ in results] == ["LlamaForCausalLM", expected]
    files = {request.rsplit("/", 1)[-1] for request in server.requests if request.startswith("GET")}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json"}
    n_requests = len(server.requests)
    again: list[Call] = [("load_lm", "someone/tiny", None), ("load_lm", "someone/tiny", COMMIT)]
    assert [text for text, _ in attempts(server.url, tmp_path, again)] == [expected, expected]
    assert server.requests[n_requests:] == []
    unreachable = attempts("http://127.0.0.1:9", tmp_path, again)
    assert [text for text, _ in unreachable] == [expected, expected]
    assert max(seconds for _, seconds in unreachable) < 5


WRONG = [
    ("models/foo", None, "There is no language model 'models/foo': no folder here and no repository on http://127"),
    ("someone/gated", None, "'someone/gated' is gated: accept its licence on http://127"),
    (
        "someone/tiny",
        "v2",
        "'someone/tiny' has no revision 'v2': lm.revision takes a branch, tag or commit, see http",
    ),
    ("someone/empty", None, "/someone/empty has no config.json: it is no transformers model."),
    ("someone/down", None, "'someone/down' is not in the download cache ("),
    ("someone/slow", None, "cannot be reached ("),
    ("someone/website", None, "is no Hugging Face Hub: its answer names no commit."),
    ("a b", None, "'a b' is neither a folder nor a Hub id: Repo id must"),
]


def test_each_reason_has_its_message_within_seconds(server: HubServer, tmp_path):
    results = attempts(server.url, tmp_path, [("skeleton", name, revision) for name, revision, _ in WRONG])
    for (name, _, message), (text, seconds) in zip(WRONG, results, strict=True):
        assert text.startswith("ERROR "), name
        assert message in text
        assert seconds < 4, name
        assert sum(f"/{name}/" in request for request in server.requests) <= 1
    assert "503" in results[4][0]
    assert "lm.name takes 'embedded', a folder or a Hub id" in results[0][0]


@pytest.mark.parametrize(
    ("endpoint", "offline", "message"),
    [
        ("http://127.0.0.1:9", "0", "http://127.0.0.1:9 cannot be reached"),
        ("http://no-such-host.invalid", "0", "http://no-such-host.invalid cannot be reached"),
        ("http://127.0.0.1:9", "1", "HF_HUB_OFFLINE is set, so that nothing is downloaded"),
    ],
)
def test_without_a_network(tmp_path, endpoint, offline, message):
    ((text, seconds),) = attempts(endpoint, tmp_path, [("load_lm", "models/foo", None)], HF_HUB_OFFLINE=offline)
    assert text.startswith("ERROR Language model 'models/foo' is not in the download cache (")
    assert message in text
    assert seconds < 4
