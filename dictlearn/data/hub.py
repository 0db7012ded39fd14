"""Data sets of the Hugging Face Hub, or folders laid out like one, through the `datasets` library.

Nothing of a repository is ever run: `datasets` has no scripts since version 4. The cursor is [shard, row]: shards
are the split's files, so that those before the cursor are not read again. There is no shuffling, after which a
position could not be continued exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx

from dictlearn.data.readers import Document, SourceError, as_document, check_column
from dictlearn.data.sources import Cursor, document_hash, file_identity, is_blank

TIMEOUT_SECONDS = 5  # of the first question to the Hub: whether it can be reached, and for the commit
ROWS_AT_ONCE = 1000  # of a data set on disk
SAVED_DICT, SAVED = "dataset_dict.json", "state.json"  # files that save_to_disk writes
UNREADABLE = (OSError, ValueError, ImportError, NotImplementedError, DatasetGenerationError, httpx.HTTPError)


@dataclass(frozen=True)
class HubSource:
    """The rows of one split, in the order of its files; made by `find`.

    `name`, `config` and `commit` pin the data set (a folder has no commit, and one that save_to_disk wrote has
    no config); `files` are those of a folder that decide the rows.
    """

    name: str
    config: str | None
    split: str
    column: str
    streaming: bool
    commit: str | None
    files: tuple[str, ...]
    start = [0, 0]  # noqa: RUF012
    endless = False

    def documents(self, cursor: Cursor, keep: Callable[[int], bool]) -> Iterator[tuple[Cursor, Document]]:
        try:
            for after, value in self._values(cursor):
                document = as_document(value, self.place(after), self.column)
                if not is_blank(document) and keep(document_hash(document)):
                    yield after, document
        except SourceError:
            raise
        except UNREADABLE as error:
            raise SourceError(f"Cannot read {self.name}, split {self.split}: {_reason(error)}") from error

    def place(self, cursor: Cursor) -> str:
        shard = f" of shard {cursor[0]}" if cursor[0] else ""
        return f"{self.name}, split {self.split}, row {cursor[1]}{shard}"

    def identity(self) -> dict[str, Any]:
        files = {"files": [file_identity(Path(file)) for file in self.files]}
        where = files if self.files else {"name": self.name, "commit": self.commit}
        rest = {key: getattr(self, key) for key in ("config", "split", "column", "streaming")}
        return {"kind": "hub", **where, **rest}

    def spec(self) -> dict[str, Any]:
        return {"kind": "hub", **asdict(self)}

    def open(self) -> Any:
        """A Dataset, or where it is streamed an IterableDataset."""
        if _is_saved(Path(self.name)):
            return _saved_splits(Path(self.name))[self.split]
        return datasets.load_dataset(
            self.name, self.config, split=self.split, streaming=self.streaming, revision=self.commit
        )

    def _values(self, cursor: Cursor) -> Iterator[tuple[Cursor, Any]]:
        """(cursor after it, value of the column) of the rows from `cursor` on."""
        dataset = self.open()
        where = f"{self.name}, split {self.split}"
        if dataset.features is not None:
            check_column(where, dataset.features.arrow_schema, self.column)
        elif self.column not in (first_row := next(iter(dataset), {})):
            raise SourceError(f"{where}: no column {self.column!r}; it has {', '.join(first_row)}")
        dataset = dataset.select_columns([self.column])
        first, start = cursor
        if isinstance(dataset, datasets.Dataset):
            for number in range(start, len(dataset), ROWS_AT_ONCE):
                values = dataset[number : number + ROWS_AT_ONCE][self.column]
                for after, value in enumerate(values, number + 1):
                    yield [0, after], value
            return
        for shard in range(first, dataset.num_shards):
            part = dataset.shard(dataset.num_shards, shard).skip(start if shard == first else 0)
            for after, row in enumerate(part, 1 + (start if shard == first else 0)):
                yield [shard, after], row[self.column]


@lru_cache
def find(
    name: str, config: str | None, split: str, column: str, streaming: bool, revision: str | None
) -> HubSource:
    """Look up a data set, its configuration, split and column; reads no more than its metadata.

    In one process the same question has the same answer: a branch that moves on does not move a run's text.
    Raises SourceError with the choices for whatever does not exist, and at once if the Hub cannot be reached.
    """
    if not name:
        raise SourceError("data.name must be a data set on the Hub or a folder; it is empty")
    folder = Path(name).expanduser()
    if _is_saved(folder):
        return _find_saved(folder, config, split, column)
    if folder.is_dir():
        if revision is not None:
            raise SourceError(f"data.revision={revision} is for data sets on the Hub, but {name} is a folder")
        name, commit = str(folder.absolute()), None
    else:
        commit = _commit(name, revision)
    builder = _builder(name, config, commit)
    data_files = {str(key): value for key, value in (builder.config.data_files or {}).items()}
    splits = list(data_files) or list(builder.info.splits or {})
    if split not in splits:
        raise SourceError(f"data.split must be one of {', '.join(splits)}, got {split!r}")
    files: list[str] = []
    if folder.is_dir():
        files = [*map(str, data_files[split]), *map(str, folder.glob("README.md"))]
    elif constants.HF_HUB_OFFLINE:  # the newest one in the cache, whatever was asked for
        commit = str(builder.hash)
        if revision not in (None, commit):
            raise SourceError(
                f"data.revision must be the commit in the cache, {commit}, while offline; got {revision}"
            )
    source = HubSource(name, builder.config.name, split, column, streaming, commit, tuple(files))
    if builder.info.features is not None:
        check_column(f"{name}, split {split}", builder.info.features.arrow_schema, column)
    return source


def _find_saved(folder: Path, config: str | None, split: str, column: str) -> HubSource:
    if config is not None:
        raise SourceError(f"data.config must be null for {folder}, which save_to_disk wrote; got {config!r}")
    splits = _saved_splits(folder)
    if split not in splits:
        raise SourceError(f"data.split must be one of {', '.join(splits)}, got {split!r}")
    check_column(f"{folder}, split {split}", splits[split].features.arrow_schema, column)
    place = folder / split if (folder / SAVED_DICT).exists() else folder
    files = tuple(str(path) for path in sorted(place.iterdir()) if path.suffix == ".arrow")
    return HubSource(str(folder.absolute()), None, split, column, False, None, files)


def _is_saved(folder: Path) -> bool:
    return (folder / SAVED_DICT).is_file() or (folder / SAVED).is_file()


def _saved_splits(folder: Path) -> dict[str, datasets.Dataset]:
    """A single data set that was saved without its split's name is split "train"."""
    try:
        saved = datasets.load_from_disk(str(folder))
    except UNREADABLE as error:
        raise SourceError(f"Cannot open {folder}, which save_to_disk wrote: {_reason(error)}") from error
    if isinstance(saved, datasets.Dataset):
        return {str(saved.split or "train"): saved}
    return {str(key): value for key, value in saved.items()}


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of `revision` (default: the main branch); None where the library works offline."""
    if name.startswith(("/", "./", "../", "~")):
        raise SourceError(f"data.name must be a data set on the Hub or a folder, but there is no folder {name}")
    if constants.HF_HUB_OFFLINE:
        return revision
    try:
        return HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT_SECONDS, expand=["sha"]).sha
    except RevisionNotFoundError as error:
        raise SourceError(f"data.revision must be a branch, tag or commit of {name}, got {revision!r}") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise SourceError(
            f"data.name must be a data set on the Hub or a folder, and {name!r} is neither, or it is private and "
            f"needs `hf auth login`"
        ) from error
    except (HfHubHTTPError, httpx.HTTPError) as error:
        raise SourceError(
            f"The Hub at {constants.ENDPOINT} must be reached to look up {name}, and cannot ({_reason(error)}): "
            f"give a folder, or set HF_HUB_OFFLINE=1 for a data set that is in the cache"
        ) from error


def _builder(name: str, config: str | None, commit: str | None) -> datasets.DatasetBuilder:
    try:
        return datasets.load_dataset_builder(name, config, revision=commit)
    except UNREADABLE as error:
        configs = _configs(name, commit)
        if configs and config not in configs:
            raise SourceError(f"data.config must be one of {', '.join(configs)}, got {config!r}") from error
        raise SourceError(f"Cannot open {name} as a data set: {_reason(error)}") from error


def _configs(name: str, commit: str | None) -> list[str]:
    try:
        return datasets.get_dataset_config_names(name, revision=commit)
    except UNREADABLE:
        return []  # the reason why it cannot be opened is another one


def _reason(error: BaseException) -> str:
    """The first line of the first cause that says something."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}".rstrip(": ")
