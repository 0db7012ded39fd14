import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dictlearn.data import sources
from dictlearn.data.readers import SourceError
from dictlearn.data.sources import HASHES, EmbeddedSource, FileSource, document_hash, source_from
from tests.data.helpers import random_documents

DOCUMENTS = [*random_documents(50), "ein Wörtchen: naïve 東京"]


def every(_):
    return True


def write(folder, suffix, documents, column="text"):
    path = folder / f"text{suffix}"
    if suffix == ".txt":
        path.write_text("\n".join(["", *documents[:3], "  ", *documents[3:], ""]), encoding="utf-8")
    elif suffix == ".jsonl":
        lines = [json.dumps({"id": i, column: d}) for i, d in enumerate(documents)]
        path.write_text("\n".join([*lines[:5], "", json.dumps({column: None}), *lines[5:]]), encoding="utf-8")
    else:
        texts = [*documents[:7], None, "", *documents[7:]]
        pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), path, row_group_size=6)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_every_document_once_and_from_every_cursor(tmp_path, suffix):
    one, two = tmp_path / "1", tmp_path / "2"
    one.mkdir()
    two.mkdir()
    files = [write(one, suffix, DOCUMENTS[:30], "body"), write(two, suffix, DOCUMENTS[30:], "body")]
    source = FileSource(tuple(map(str, files)), "body")
    read = list(source.documents(source.start, every))
    assert [text for _, text in read] == DOCUMENTS
    for i, (cursor, _) in enumerate(read):
        again = source_from(json.loads(json.dumps(source.spec())))
        assert [text for _, text in again.documents(cursor, every)] == DOCUMENTS[i + 1 :]


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    assert [text for _, text in FileSource((str(path),), "").documents([0, 0], every)] == ["one", "two"]


def test_a_parquet_file_is_read_group_by_group(tmp_path, monkeypatch):
    path = write(tmp_path, ".parquet", DOCUMENTS)
    asked = []
    original = pq.ParquetFile.iter_batches

    def spy(self, *args, **kwargs):
        asked.append(kwargs["row_groups"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    source = FileSource((str(path),), "text")
    assert next(source.documents([0, 13], every))[1] == DOCUMENTS[11]
    assert asked == [[2]], "the groups before the cursor are skipped, the ones after it wait"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": 1, "body": "x"}\n', r"no column 'text'; it has id, body"),
        ("a.jsonl", b'{"text": 3}\n', r"column 'text' holds int, not text"),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"before byte 22: a line of a .jsonl file is one JSON object"),
        ("a.jsonl", b"[1]\n", r"one JSON object, not '\[1\]"),
        ("a.txt", b"fine\n\xff\xfe\n", r"at byte 5 is not UTF-8"),
        ("a.parquet", b"fine", r"cannot be read as parquet after row 0: .*file size is 4 bytes"),
        ("a.jsonl", b'{"text":' + b"[" * 100_000, r"one JSON object, but maximum recursion depth"),
        ("a.jsonl", b'{"text": [' + b"9" * 5000 + b"]}", r"one JSON object, but Exceeds the limit"),
        ("a.jsonl", b'{"text": "\\ud83d"}', r"column 'text' holds text that is not valid Unicode"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        list(FileSource((str(path),), "text").documents([0, 0], every))


def test_a_damaged_parquet_page_is_said_with_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": random_documents(4000)}), path, row_group_size=1000)
    metadata = pq.read_metadata(path)
    column = metadata.row_group(2).column(0)
    start = column.dictionary_page_offset if column.has_dictionary_page else column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start + 100 : start + 3000] = bytes(2900)
    path.write_bytes(content)
    found = []
    with pytest.raises(SourceError, match=r"a.parquet cannot be read as parquet after row 2000: ") as error:
        found += (text for _, text in FileSource((str(path),), "text").documents([0, 0], every))
    assert isinstance(error.value.__cause__, OSError | pa.ArrowException)


def test_bytes_in_a_parquet_column_that_are_no_text(tmp_path):
    raw = pa.array([b"fine", b"\xff\xfe"])
    texts = pa.StringArray.from_buffers(2, raw.buffers()[1], raw.buffers()[2])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"after row 0: 'utf-8' codec can't decode byte 0xff"):
        list(FileSource((str(tmp_path / "a.parquet"),), "text").documents([0, 0], every))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("unit", ["line", "file"])
def test_files_that_the_system_does_not_give(tmp_path, suffix, unit):
    """A folder by that name, and none: for any user, root too. A closed file is another OSError."""
    for name, made in (("folder", True), ("nothing", False)):
        path = tmp_path / f"{name}{suffix}"
        if made:
            path.mkdir()
        source = FileSource((str(path),), "text", unit)
        with pytest.raises(SourceError, match=rf"{name}{suffix} cannot be read"):
            list(source.documents([0, 0], every))
        if not made:
            with pytest.raises(SourceError, match=rf"{name}{suffix} cannot be read: No such file"):
                source.identity()


def test_parquet_columns_are_checked(tmp_path):
    path = str(write(tmp_path, ".parquet", DOCUMENTS, "body"))
    with pytest.raises(SourceError, match="no column 'text'; it has id, body"):
        list(FileSource((path,), "text").documents([0, 0], every))
    with pytest.raises(SourceError, match="column 'id' holds int64, not text"):
        list(FileSource((path,), "id").documents([0, 0], every))


def test_only_chosen_embedded_documents_are_generated(monkeypatch):
    import dictlearn.embedded.text as embedded

    made = []
    original = embedded.document
    monkeypatch.setattr(embedded, "document", lambda s, i: made.append(i) or original(s, i))
    source = EmbeddedSource(5)
    chosen = source.documents([0], lambda h: h < HASHES // 10)
    texts = [next(chosen) for _ in range(20)]
    assert len(made) == 20 < made[-1] / 4
    assert all(text == original(5, cursor[0] - 1).text for cursor, text in texts)
    again = source.documents(texts[7][0], lambda h: h < HASHES // 10)
    assert [next(again) for _ in range(12)] == texts[8:]


def test_hashes_are_uniform_and_fixed():
    assert document_hash("a") == 0x40F89E395B66422F
    hashes = [document_hash(f"document {i}") for i in range(20_000)]
    share = sum(h < HASHES // 50 for h in hashes) / len(hashes)
    assert abs(share - 0.02) < 4 * (0.02 * 0.98 / 20_000) ** 0.5
    assert all(0 <= h < HASHES for h in hashes)


def test_identity_changes_with_the_content(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("one\n")
    source = FileSource((str(path),), "text")
    before = source.identity()
    assert FileSource((str(path),), "other").identity() == before, "a .txt file has no column"
    path.touch()
    assert source.identity() == before
    path.write_text("two\n")
    assert source.identity() != before
    monkeypatch.setattr(sources, "HASHED_BYTES", 1)
    large = source.identity()
    path.write_text("six\n")
    assert source.identity() != large
    assert EmbeddedSource(1).identity() != EmbeddedSource(2).identity()
