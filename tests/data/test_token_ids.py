"""Columns of token ids: used as they are, in the rows that the same text would give."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dictlearn.data import HubText, LocalText
from dictlearn.data.packing import ROWS_FILE
from dictlearn.data.readers import SourceError
from dictlearn.data.sources import document_hash
from dictlearn.types import DictlearnError
from tests.data.helpers import (
    BOS,
    N_WORDS,
    bos_tokenizer,
    brute_force_rows,
    random_documents,
    token_ids,
    word_tokenizer,
)

TEXTS = random_documents(400)
IDS = [token_ids(text) for text in TEXTS]
FORMATS = ["jsonl", "parquet", "hub"]


@pytest.fixture
def text(tmp_path):
    """Of rows of token ids, in a file of the format or as a data set."""

    def make(rows, kind, column="input_ids", dtype="int32"):
        folder = tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        options = {"column": column, "ctx": 16, "cache_dir": str(tmp_path / "cache")}
        if kind == "jsonl":
            (folder / "a.jsonl").write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
        else:
            table = pa.table({column: pa.array(rows, pa.list_(pa.type_for_alias(dtype)))})
            pq.write_table(table, folder / "train.parquet", row_group_size=30)
        if kind == "hub":
            return HubText(name=str(folder), **options)
        return LocalText(path=str(folder), **options)

    return make


def rows_of(text, split="train", tokenizer=None):
    store = text._store(tokenizer or bos_tokenizer(), split)
    store.wait(10**9)
    return store.rows(0, store.n_rows).tolist()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("special", [{"bos_token": "<bos>"}, {"eos_token": "<bos>"}, {}])
def test_rows_are_those_of_an_independent_packer(text, kind, special):
    made = text(IDS, kind)
    assert made.problems() == []
    tokenizer = word_tokenizer(**special)
    kept = [ids for ids in IDS if made._store(tokenizer, "train").spec.keep(document_hash(ids))]
    assert 0 < len(kept) < len(IDS)
    assert rows_of(made, tokenizer=tokenizer) == brute_force_rows(kept, 16, BOS if special else None)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_bos_that_is_there_is_not_doubled(text, kind):
    """The same documents in the same split: the one hash is of the ids as they are written."""
    with_bos = text([[BOS, *ids] for ids in IDS], kind)
    store = with_bos._store(bos_tokenizer(), "train")
    kept = [ids for ids in IDS if store.spec.keep(document_hash([BOS, *ids]))]
    assert rows_of(with_bos) == brute_force_rows(kept, 16, BOS)
    for row in rows_of(with_bos):
        assert (np.diff(np.flatnonzero(np.array(row) == BOS)) > 1).all()


def test_no_tokenizer_is_called_and_all_formats_agree(text):
    tokenizer = bos_tokenizer()
    texts = [text(IDS, kind) for kind in FORMATS]
    contents = set()
    for made in texts:
        store = made._store(tokenizer, "train")
        path = store.folder / "tokenizer.json"
        words = json.loads(path.read_text())
        words["model"]["vocab"] = {f"x{word}": i for word, i in words["model"]["vocab"].items() if word != "<unk>"}
        words["model"]["vocab"]["<unk>"] = 2  # no word of the text is in it
        path.write_text(json.dumps(words))
        store.wait(10**9)
        contents.add((store.folder / ROWS_FILE).read_bytes())
    assert len(contents) == 1


def test_splits_share_no_row_and_lose_none(text):
    made = text(IDS + IDS[:50], "parquet")
    source = made.source()
    splits = {}
    for split in ("train", "heldout"):
        keep = made._store(bos_tokenizer(), split).spec.keep
        splits[split] = [tuple(ids) for _, ids in source.documents(source.start, keep)]
    assert not set(splits["train"]) & set(splits["heldout"])
    assert len(splits["train"]) + len(splits["heldout"]) == 450
    assert splits["heldout"]


def test_the_hash_is_of_the_ids():
    assert document_hash([1, 2, 3]) == document_hash([1, 2, 3])
    hashes = [[1, 2, 3], [3, 2, 1], [1, 2], [258, 3], [1, 2, 3, 0], "1 2 3", "\x01\x02\x03"]
    assert len({document_hash(content) for content in hashes}) == len(hashes)


@pytest.mark.parametrize(
    ("kind", "place"),
    [("jsonl", r"a.jsonl before byte \d+"), ("parquet", "train.parquet row 300"), ("hub", "split train, row 300")],
)
def test_an_id_beyond_the_vocabulary_is_an_error_with_its_row(text, kind, place):
    bad = [*IDS[:299], [5, N_WORDS + 3, 6], *IDS[300:]]
    stores = [text(bad, kind)._store(bos_tokenizer(), split) for split in ("train", "heldout")]
    (store,) = (store for store in stores if store.spec.keep(document_hash(bad[299])))
    with pytest.raises(DictlearnError, match=rf"{place}: token id 403 is not in the vocabulary .* ends at 402"):
        store.wait(10**9)
    good = [*IDS[:299], [5, N_WORDS + 2, 6], *IDS[300:]]
    assert any(N_WORDS + 2 in row for split in ("train", "heldout") for row in rows_of(text(good, kind), split))


@pytest.mark.parametrize("kind", FORMATS)
def test_columns_of_other_types_are_problems(text, kind):
    floats = text([[0.5, 1.0]] * 3, kind, dtype="float32")
    (problem,) = floats.problems()
    assert "column 'input_ids' holds list" in problem
    assert "not text or lists of token ids" in problem
    (problem,) = text([[5, -1]] * 3, kind).problems()
    assert "-1 in column 'input_ids' is no token id" in problem
    (problem,) = text([[]] * 3, kind).problems()
    assert "every document of" in problem


def test_mixed_and_nested_json_columns(tmp_path):
    path = tmp_path / "a.jsonl"
    kinds = {"lists of str": [1, "a"], "lists of list": [[1]], "lists of bool": [True], "float": 2.5}
    kinds |= {"lists of null": [1, None], "lists of bool and null": [None, 1, True]}
    for kind, value in kinds.items():
        path.write_text(json.dumps({"text": value}))
        source = LocalText(path=str(path)).source()
        with pytest.raises(SourceError, match=f"holds {kind}, not text or lists of token ids"):
            list(source.documents(source.start, lambda _: True))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_null_among_token_ids_is_an_error_with_its_row(text, kind):
    made = text([[5], [6], [7, None]], kind)
    assert made.problems() == [], "beyond the two documents that are looked at"
    with pytest.raises(DictlearnError, match=r"(row 3|before byte \d+): column 'input_ids' holds lists of null"):
        made.train(bos_tokenizer())


def test_nulls_and_empty_rows_are_skipped(text):
    for kind in FORMATS:
        source = text([[5], None, [], [6]], kind).source()
        assert [ids for _, ids in source.documents(source.start, lambda _: True)] == [[5], [6]]


@pytest.mark.parametrize(("least", "n_tokens"), [(100_000, 12_294), (6_000, 6_000)])
def test_the_held_out_part_is_counted_in_token_ids(text, least, n_tokens):
    """At most a fifth of 61,472 tokens; the estimate is exact where no text is tokenised."""
    ids = [token_ids(text) for text in random_documents(2000)]
    made = text(ids, "parquet")
    made.heldout_min_tokens = least
    store = made._store(bos_tokenizer(), "heldout")
    n_heldout = sum(len(row) for row in ids if store.spec.keep(document_hash(row)))
    assert sum(map(len, ids)) == 61_472
    assert n_heldout == pytest.approx(n_tokens, rel=0.015)
