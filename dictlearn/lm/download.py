"""Which commit of a Hugging Face Hub id to load: the one in the download cache, else what the Hub has now.

A name that leads nowhere is refused after one request of at most `PATIENCE` seconds; the Hub's own client repeats
it for half a minute.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.pool import ThreadPool
from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx

from dictlearn.types import DictlearnError

PATIENCE = 3.0  # seconds
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
CHOICES = (
    "lm.name takes 'embedded', a folder or a Hub id of a causal LM that transformers can open without running the "
    "repository's own code."
)


def commit_of(name: str, revision: str | None = None) -> str:
    """The commit of the model repository `name` at `revision` (branch, tag or commit; None: main).

    A repository in the download cache (of which the cache has config.json at `revision`) is taken as it is there,
    without a request, so that the same name means the same weights from one run to the next; another one has its
    config.json downloaded. Respects HF_HUB_OFFLINE and HF_ENDPOINT.

    Raises DictlearnError: an impossible id, no such repository, a gated one, no such revision, no config.json, or
    not in the cache and the Hub cannot be reached.
    """
    try:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError as error:
        raise DictlearnError(f"{name!r} is neither a folder nor a Hub id: {error} {CHOICES}") from error
    if not isinstance(config, str):
        _ask_the_hub(name, revision)
        try:
            config = hf_hub_download(name, "config.json", revision=revision)
        except (httpx.HTTPError, OSError) as error:
            raise DictlearnError(f"Cannot download config.json of {name!r}: {_first_line(error)}") from error
    return Path(config).parent.name


def _ask_the_hub(name: str, revision: str | None) -> None:
    """Raise DictlearnError with the reason where config.json cannot be downloaded."""
    hub = constants.ENDPOINT
    at = f" at revision {revision!r}" if revision else ""
    url = hf_hub_url(name, "config.json", revision=revision)
    missing = f"Language model {name!r}{at} is not in the download cache ({constants.HF_HUB_CACHE}), and"
    try:
        # in a thread: its timeout is per address of the host, and looking up the host's name has none
        request = ThreadPool(1).apply_async(get_hf_file_metadata, (url,), {"timeout": PATIENCE})
        metadata = request.get(timeout=PATIENCE)
    except GatedRepoError as error:
        raise DictlearnError(
            f"Language model {name!r} is gated: accept its licence on {hub}/{name}, then {LOG_IN}."
        ) from error
    except RepositoryNotFoundError as error:
        raise DictlearnError(
            f"There is no language model {name!r}: no folder here and no repository on {hub} has this name (if it "
            f"is private, {LOG_IN}). {CHOICES}"
        ) from error
    except RevisionNotFoundError as error:
        raise DictlearnError(
            f"Language model {name!r} has no revision {revision!r}: lm.revision takes a branch, tag or commit, see "
            f"{hub}/{name}/tree/main."
        ) from error
    except EntryNotFoundError as error:
        raise DictlearnError(f"{hub}/{name}{at} has no config.json: it is no transformers model.") from error
    except OfflineModeIsEnabled as error:
        raise DictlearnError(f"{missing} HF_HUB_OFFLINE is set, so that nothing is downloaded.") from error
    except HfHubHTTPError as error:
        raise DictlearnError(f"{missing} {hub} answers: {_first_line(error)}") from error
    except (httpx.HTTPError, OSError, multiprocessing.TimeoutError) as error:
        raise DictlearnError(f"{missing} {hub} cannot be reached ({_first_line(error)}). {CHOICES}") from error
    if metadata.commit_hash is None:
        raise DictlearnError(f"{missing} {hub} is no Hugging Face Hub: its answer names no commit.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [f"no answer within {PATIENCE:g} s"])[0]
