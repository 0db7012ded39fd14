"""A branch of a repository of the Hub that is written to: what it holds, and one commit on top of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.utils import httpx

from dictlearn.hub.files import LOG_IN
from dictlearn.hub.manifest import MANIFEST, read_lines
from dictlearn.hub.refs import HubRef
from dictlearn.types import DictlearnError

CARD = "README.md"
STATUS = {  # of the Hub's answer
    401: f"the Hub does not accept the token: {LOG_IN}",
    403: "the token may not write there: it needs write access to the repository",
    404: "there is no such repository or branch, or the token does not see it",
    412: "somebody else has committed to it meanwhile: push again",
}
NOT_COMMITTED = "Nothing was committed"


class Held(NamedTuple):
    """What the branch holds: at `commit` the files `names`, the lines of the manifest, the card."""

    commit: str | None = None
    names: frozenset[str] = frozenset()
    lines: Mapping[str, dict[str, Any]] = {}
    card: str | None = None


def writer(target: HubRef) -> HfApi:
    """Raises DictlearnError where there is no token."""
    with _asking(target):
        token = get_token()
    if token is None:
        raise DictlearnError(f"Publishing needs a token of {constants.ENDPOINT} that may write: {LOG_IN}.")
    return HfApi(token=token)


def open_branch(api: HfApi, target: HubRef, private: bool) -> Held:
    """The branch of `target`; repository and branch are made where there are none.

    private: a new repository is; DictlearnError where it is there and public.
    """
    repo, branch = target.repo, target.revision
    with _asking(target):
        api.create_repo(repo, private=private or None, exist_ok=True)
        if branch is not None and not api.revision_exists(repo, branch):
            api.create_branch(repo, branch=branch)
        info = api.model_info(repo, revision=branch)
        if info.sha is None or info.siblings is None:
            raise ValueError("its answer names no commit and no files")
        names = frozenset(sibling.rfilename for sibling in info.siblings)
        text = {
            name: Path(api.hf_hub_download(repo, name, revision=info.sha)).read_text(encoding="utf-8")
            for name in (CARD, MANIFEST)
            if name in names
        }
    if private and not info.private:
        raise DictlearnError(f"{repo} is there already and is public, but private was asked for. {NOT_COMMITTED}.")
    where = f"{constants.ENDPOINT}/{repo}/blob/{info.sha}/{MANIFEST}"
    return Held(info.sha, names, read_lines(text.get(MANIFEST, ""), where), text.get(CARD))


def commit(
    api: HfApi,
    target: HubRef,
    held: Held,
    additions: Sequence[CommitOperationAdd],
    gone: Sequence[str],
    message: str,
) -> CommitInfo:
    """One commit on top of the one that was looked at, so that nobody's change is lost."""
    with _asking(target):
        api.preupload_lfs_files(target.repo, additions, revision=target.revision, free_memory=False)
    with _asking(target, committing=True):
        return api.create_commit(
            target.repo,
            [*additions, *(CommitOperationDelete(name) for name in gone)],
            commit_message=message,
            revision=target.revision,
            parent_commit=held.commit,
        )


@contextmanager
def _asking(target: HubRef, committing: bool = False) -> Iterator[None]:
    """Raise DictlearnError for what goes wrong with the Hub, and say whether anything was committed.

    committing: a connection that ends without an answer leaves that open.
    """
    try:
        yield
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not hasattr(cause, "response"):
            cause = cause.__cause__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        said = str(error if isinstance(error, ValueError) else cause)
        why = f"{STATUS[status]} ({status})" if status in STATUS else " ".join(said.split()).rstrip(".")
        history = f"{constants.ENDPOINT}/{target.repo}/commits/{target.revision or constants.DEFAULT_REVISION}"
        after = f"Whether it was committed: see {history}" if committing and status is None else NOT_COMMITTED
        raise DictlearnError(
            f"Cannot publish to {target.repo} on {constants.ENDPOINT}: {why or type(cause).__name__}. {after}."
        ) from error
