import json
import random

import numpy as np
import pytest

from dictlearn.data.packing import META_FILE, ROWS_FILE, Packer, PackingSpec, Writer, counted, read_meta
from tests.data.helpers import brute_force_rows, random_documents, token_ids


@pytest.mark.parametrize("bos", [0, None])
@pytest.mark.parametrize("ctx", [2, 3, 16, 61])
def test_rows_equal_a_packer_that_goes_token_by_token(ctx, bos):
    documents = [token_ids(d) for d in random_documents(200)]
    documents[17:17] = [[], [0, 0, 5], [5, 0]]  # nothing, and BOS written in the text
    expected = brute_force_rows([d for d in documents if d], ctx, bos)
    packer = Packer(ctx, bos)
    rows = packer.add(documents)
    assert rows.tolist() == expected
    n_left = len(packer.pending)
    assert n_left < ctx, "only the last incomplete row is missing"


def test_nothing_is_lost_or_repeated():
    documents = [token_ids(d) for d in random_documents(300)]
    packer = Packer(16, 0)
    rows = packer.add(documents)
    kept = [t for t in [*rows.ravel().tolist(), *packer.pending] if t != 0]
    assert kept == [t for d in documents for t in d]


@pytest.mark.parametrize("bos", [0, None])
def test_how_documents_are_divided_does_not_matter(bos):
    documents = [token_ids(d) for d in random_documents(120)]
    whole = Packer(8, bos).add(documents)
    cuts = sorted(random.Random(0).sample(range(120), 30))
    packer = Packer(8, bos)
    parts = []
    for start, stop in zip([0, *cuts], [*cuts, 120], strict=True):
        packer = Packer(8, bos, packer.pending)  # as after a restart
        parts.append(packer.add(documents[start:stop]))
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_row_starts_with_one_bos():
    rows = Packer(4, 0).add([[5, 6, 7], [8, 9], [3, 4, 5, 6]])
    assert rows.tolist() == [[0, 5, 6, 7], [0, 8, 9, 0], [0, 3, 4, 5]]


def test_special_tokens_do_not_count_nor_position_0_without_bos():
    rows = np.array([[5, 1, 7, 2], [0, 5, 5, 5]])
    assert counted(rows, [0, 1], 0).tolist() == [[True, False, True, True], [False, True, True, True]]
    assert counted(rows, [], None).tolist() == [[False, True, True, True]] * 2


def spec(ctx=4):
    return PackingSpec({}, "train", 0, ctx, 0, [0], "uint16")


def fill(folder, documents, n=None):
    writer = Writer(folder, spec(), [0])
    for i in range(writer.meta.cursor[0], len(documents) if n is None else n):
        writer.append([documents[i]], [i + 1], complete=i + 1 == len(documents))
    return writer


@pytest.mark.parametrize("damage", ["rows without meta", "half a meta", "rows beyond meta", "rows lost", "no meta"])
def test_a_damaged_store_is_repaired(tmp_path, damage):
    documents = [token_ids(d) for d in random_documents(40)]
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    fill(good, documents)
    fill(bad, documents, n=25)
    rows, meta = bad / ROWS_FILE, bad / META_FILE
    if damage == "half a meta":
        meta.write_text(meta.read_text()[:30])
    elif damage == "rows beyond meta":
        with rows.open("ab") as file:
            file.write(b"\1\2\3")
    elif damage == "rows lost":
        rows.write_bytes(rows.read_bytes()[:-3])
    elif damage == "no meta":
        meta.unlink()
    else:
        meta.write_text(json.dumps({"n_rows": 3}))
    fill(bad, documents)
    assert rows.read_bytes() == (good / ROWS_FILE).read_bytes()
    assert read_meta(bad) == read_meta(good)
