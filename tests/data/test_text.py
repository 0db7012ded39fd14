import json
import logging
import os
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerFast

import dictlearn.data
from dictlearn.data import EmbeddedText, HubText, LocalText
from dictlearn.data.sources import HASHES, FileSource
from dictlearn.types import DictlearnError
from tests.data.helpers import BOS, bos_tokenizer, brute_force_rows, random_documents, token_ids, word_tokenizer

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.fixture
def local(tmp_path):
    """Writes documents, one a line, and gives the text; every call has a file and a cache of its own."""
    made = []

    def make(documents, **changes):
        made.append(None)
        path = tmp_path / f"text{len(made)}.txt"
        path.write_text("\n".join(documents) + "\n")
        return LocalText(path=str(path), cache_dir=str(tmp_path / "cache"), **{"ctx": 16, **changes})

    return make


def words_of(rows):
    return sorted(token for token in rows.flatten().tolist() if token != BOS)


@pytest.mark.parametrize("special", [{"bos_token": "<bos>"}, {"eos_token": "<bos>"}, {}])
def test_a_store_holds_what_an_independent_packer_makes(local, special):
    documents = random_documents(300)
    text = local(documents)
    store = text.train(word_tokenizer(**special))
    rows = store.rows(0, store.wait(10**9))
    source = text.source()
    kept = [d for _, d in source.documents(source.start, store.spec.keep)]
    assert 0 < len(kept) < len(documents)
    assert rows.tolist() == brute_force_rows([token_ids(d) for d in kept], 16, BOS if special else None)
    mask = store.mask(rows)
    assert mask[:, 1:].all() or special
    assert not mask[:, 0].any()
    assert int(mask.sum()) == store.n_counted
    assert store.n_counted == (int((rows != BOS).sum()) if special else 15 * len(rows))


def test_special_tokens_do_not_count(local):
    """eos and pad are masked where they are written in the text; unk is not special."""
    tokenizer = word_tokenizer(bos_token="<bos>", eos_token="<eos>", pad_token="w5")
    text = local(["w1 w5 <eos> strange w2"] * 20 + ["w7 w8 w9 w10 w11"] * 20)
    rows = text.train(tokenizer).rows(0, 3)
    mask = text.train(tokenizer).mask(rows)
    assert set(rows[mask].tolist()) == {4, 2, 5} or set(rows[mask].tolist()) == {10, 11, 12, 13, 14}


def test_train_and_heldout_share_no_document(local):
    documents = list(random_documents(4000))
    documents += documents[:1000]  # copies go where the first one went
    text = local(documents, heldout_fraction=0.1, heldout_min_tokens=0)
    source = text.source()
    splits = {}
    for split in ("train", "heldout"):
        store = text._store(bos_tokenizer(), split)
        splits[split] = [d for _, d in source.documents(source.start, store.spec.keep)]
    train, heldout = set(splits["train"]), set(splits["heldout"])
    assert not train & heldout
    assert train | heldout == set(documents)
    assert len(splits["train"]) + len(splits["heldout"]) == len(documents)
    assert abs(len(heldout) / 4000 - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5


def test_embedded_train_and_heldout_share_no_document(tmp_path):
    text = EmbeddedText(cache_dir=str(tmp_path))
    source = text.source()
    train = text._store(bos_tokenizer(), "train").spec.keep
    heldout = text._store(bos_tokenizer(), "heldout").spec.keep
    hashes = []
    source.documents([0], lambda h: hashes.append(h) or len(hashes) == 2000).__next__()
    assert all(train(h) != heldout(h) for h in hashes)
    assert 10 < sum(heldout(h) for h in hashes) < 80


@pytest.mark.parametrize(
    ("n_documents", "share"),
    [(200_000, 0.02), (60_000, 100_000 / 1_800_000), (3000, 0.2)],  # about 30 tokens each
)
def test_a_small_text_gives_a_larger_part(local, n_documents, share):
    documents = random_documents(2000)
    documents = [f"{documents[i % 2000]} w{i % 400} w{i // 400}" for i in range(n_documents)]
    text = local(documents)
    store = text._store(bos_tokenizer(), "heldout")
    assert store.spec.threshold / HASHES == pytest.approx(share, rel=0.15)
    assert store.spec.threshold <= 0.2 * HASHES * 1.05


@pytest.mark.parametrize("n_documents", [2, 3, 10, 40])
def test_a_tiny_text_has_both_parts(local, n_documents):
    documents = [" ".join([f"w{i}"] * 60) for i in range(n_documents)]
    text = local(documents)
    heldout = text.heldout(bos_tokenizer(), 10)
    store = text.train(bos_tokenizer())
    assert store.wait(1) == 1
    assert not set(words_of(heldout.tokens)) & set(words_of(store.rows(0, store.wait(10**6))))
    if n_documents == 40:
        assert len(set(words_of(heldout.tokens))) <= 8


def test_heldout_rows(local, caplog):
    text = local(random_documents(3000), heldout_fraction=0.1)
    with caplog.at_level(logging.WARNING):
        rows = text.heldout(bos_tokenizer(), 1000)
        assert not caplog.records
    counts = rows.mask.sum(1)
    assert int(counts.sum()) >= 1000 > int(counts[:-1].sum()), "whole rows, no more than needed"
    assert rows.tokens.shape == rows.mask.shape == (rows.info["n_rows"], 16)
    assert rows.info["n_tokens"] == int(rows.mask.sum())
    assert json.loads(json.dumps(rows.info)) == rows.info
    everything = text.heldout(bos_tokenizer(), 10**7)
    assert "held-out tokens; 10000000 were asked for" in caplog.text
    assert everything.tokens[: len(rows.tokens)].equal(rows.tokens)


@pytest.mark.parametrize(("n_unknown", "warned"), [(0, None), (1, None), (3, "3 %"), (67, "67 %")])
def test_tokens_that_the_tokenizer_does_not_know(local, caplog, n_unknown, warned):
    """Of 100 words of a document; the tokenizer knows 403 tokens. Its <unk> counts."""
    documents = [" ".join([f"w{i}"] * (100 - n_unknown) + ["strange"] * n_unknown) for i in range(40)]
    text = local(documents, ctx=101)
    rows = text.heldout(word_tokenizer(bos_token="<bos>"), 700)
    assert int(((rows.tokens == 2) & rows.mask).sum()) == 7 * n_unknown
    if warned is None:
        assert not caplog.records
    else:
        (record,) = caplog.records
        place = f"{text.path} (heldout)"
        expected = (
            f"{warned} of the first 700 tokens of {place} are unknown to the LM's tokenizer, which knows 403,"
        )
        assert expected in record.getMessage()


def test_an_unknown_token_that_is_a_special_one_is_not_warned_of(local, caplog):
    """As GPT-2's, which is its BOS and EOS."""
    documents = [" ".join([f"w{i}"] * 50 + ["strange"] * 50) for i in range(40)]
    rows = local(documents).heldout(word_tokenizer(eos_token="<unk>"), 100)
    assert not rows.mask[rows.tokens == 2].any()
    assert not caplog.records


def test_no_heldout_row_is_an_error(local):
    with pytest.raises(DictlearnError, match=r"at least one row of data.ctx = 16 tokens"):
        local(["w1 w2 w3"] * 100).heldout(bos_tokenizer(), 10)


def test_the_fingerprint_is_of_what_decides_the_rows(local, tmp_path):
    documents = random_documents(50)
    text = local(documents)

    def fingerprint(text, tokenizer=None, split="train"):
        return text._store(tokenizer or bos_tokenizer(), split).fingerprint

    base = fingerprint(text)
    assert fingerprint(local(documents)) == base, "the same content elsewhere"
    assert fingerprint(local(documents, block_rows=3, n_slices=2, lm_batch_rows=1)) == base
    truncating = bos_tokenizer()
    truncating("w1", truncation=True, max_length=3)
    assert fingerprint(text, truncating) == base
    others = [
        fingerprint(local([*documents, "w1"])),
        fingerprint(local(documents, ctx=17)),
        fingerprint(local(documents, heldout_fraction=0.05, heldout_min_tokens=0)),
        fingerprint(text, split="heldout"),
        fingerprint(text, word_tokenizer(eos_token="<eos>")),
        fingerprint(text, word_tokenizer(bos_token="<bos>")),
        fingerprint(EmbeddedText(ctx=16, cache_dir=text.cache_dir)),
        fingerprint(EmbeddedText(ctx=16, cache_dir=text.cache_dir, seed=2)),
    ]
    assert len({base, *others}) == 9


def test_long_documents_are_not_cut(local):
    tokenizer = bos_tokenizer()
    tokenizer.model_max_length = 10
    tokenizer("w1 w2 w3 w4", truncation=True, max_length=3)
    store = local([" ".join(["w1"] * 500)] * 2 + ["w2"]).train(tokenizer)
    assert store.wait(10**6) * 15 > 400


def test_a_document_is_a_line_or_a_file(tmp_path):
    contents = ["\ufeffone\r\ntwo\n\nthree\n", "four", "", "  \n"]
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.txt").write_bytes(content.encode())

    def documents(unit, cursor=None):
        source = LocalText(path=str(tmp_path), document=unit).source()
        return list(source.documents(cursor or source.start, lambda _: True))

    assert [d for _, d in documents("line")] == ["one", "two", "three", "four"]
    whole = documents("file")
    assert [d for _, d in whole] == ["one\ntwo\n\nthree", "four"]
    assert [d for _, d in documents("file", whole[0][0])] == ["four"]
    assert documents("file", whole[1][0]) == []
    identities = [LocalText(path=str(tmp_path), document=unit).source().identity() for unit in ("line", "file")]
    assert identities[0] != identities[1]


def test_rows_of_whole_files(tmp_path):
    (tmp_path / "set").mkdir()
    documents = random_documents(90)
    for i in range(30):
        (tmp_path / "set" / f"{i:02d}.txt").write_text("\n".join(documents[3 * i : 3 * i + 3]))
    text = LocalText(path=str(tmp_path / "set"), document="file", ctx=16, cache_dir=str(tmp_path))
    store = text.train(bos_tokenizer())
    rows = store.rows(0, store.wait(10**9)).tolist()
    source = text.source()
    kept = [token_ids(str(d)) for _, d in source.documents(source.start, store.spec.keep)]
    assert 20 < len(kept) < 30
    assert rows == brute_force_rows(kept, 16, BOS)


def test_the_held_out_part_is_measured_once(local, monkeypatch):
    """Of streamed text, measuring is downloading."""
    text = local(random_documents(300))
    first = text._store(bos_tokenizer(), "train").spec.threshold
    monkeypatch.setattr("dictlearn.data.text.heldout_threshold", lambda *_: pytest.fail("measured again"))
    assert text._store(bos_tokenizer(), "heldout").spec.threshold == first
    monkeypatch.setattr("dictlearn.data.text.heldout_threshold", lambda *_: 17)
    text.heldout_fraction = 0.1
    assert text._store(bos_tokenizer(), "train").spec.threshold == 17
    assert local(random_documents(301))._store(bos_tokenizer(), "train").spec.threshold == 17


def test_no_more_is_read_than_makes_the_held_out_part_sure(tmp_path, monkeypatch):
    """2 % of 400,000 tokens are 8,000: the rest of the text is not looked at."""
    path = tmp_path / "text.txt"
    documents = random_documents(2000)
    path.write_text("".join(f"{documents[i % 2000]} w{i % 400} w{i // 400}\n" for i in range(30_000)))
    n_read = []
    original = FileSource.documents

    def spy(self, cursor, keep):
        for after, document in original(self, cursor, keep):
            n_read.append(len(str(document).split()))
            yield after, document

    monkeypatch.setattr(FileSource, "documents", spy)
    text = LocalText(path=str(path), cache_dir=str(tmp_path), heldout_min_tokens=8_000)
    assert text._store(bos_tokenizer(), "train").spec.threshold == int(0.02 * HASHES)
    assert sum(n_read) == pytest.approx(400_000, rel=0.03)


def test_files_of_a_folder_and_a_glob(tmp_path):
    for name in ("b/2.txt", "a/1.txt", "a/3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n")
    (tmp_path / "README.md").write_text("not text of the set")

    def documents(path):
        source = LocalText(path=str(path)).source()
        return [d for _, d in source.documents(source.start, lambda _: True)]

    assert documents(tmp_path) == ["a/1.txt", "a/3.txt", "b/2.txt"]
    assert documents(tmp_path / "**" / "[12].txt") == ["a/1.txt", "b/2.txt"]
    assert documents(tmp_path / "a" / "3.txt") == ["a/3.txt"]


@pytest.mark.parametrize(
    ("name", "content", "changes", "message"),
    [
        (None, "", {}, "must be a file, a folder or a glob, but there is no"),
        ("a.csv", "x", {}, "must have files that end in .txt, .jsonl, .parquet, got '.csv'"),
        ("a.txt", "\n  \n", {}, "must hold text, but every document of"),
        ("a.jsonl", '{"body": "x"}', {}, "no column 'text'; it has body"),
        ("a.txt", "x\ny", {"ctx": 1}, "data.ctx must be a whole number of at least 2, got 1"),
        ("a.txt", "x\ny", {"ctx": "long"}, "data.ctx must be a whole number of at least 2, got 'long'"),
        ("a.txt", "x\ny", {"n_slices": 0}, "data.n_slices must be a whole number of at least 1"),
        (
            "a.txt",
            "x\ny",
            {"heldout_fraction": 0.5},
            "data.heldout_fraction must be above 0 and at most 0.2, got 0.5",
        ),
        ("a.txt", "x\ny", {"document": "page"}, "data.document must be one of line, file, got 'page'"),
        ("a.jsonl", '{"text": "x"}', {"document": "file"}, "data.document=file is for .txt files"),
        ("a.txt", "x\ny", {"max_norm_ratio": 1.0}, "max_norm_ratio must be null or a number above 1, got 1.0"),
        ("a.txt", "x\ny", {"max_norm_ratio": "10"}, "max_norm_ratio must be null or a number above 1, got '10'"),
        (
            "a.txt",
            "x\ny",
            {"max_norm_ratio": float("nan")},
            "max_norm_ratio must be null or a number above 1, got nan",
        ),
        ("a.txt", "x\ny", {"column": "body"}, "data.column=body is for .jsonl and .parquet files; "),
        ("a.txt", "x\ny", {"cache_dir": 5}, "data.cache_dir must be a folder, got 5"),
        ("a.txt", "x\ny", {"cache_dir": ""}, "data.cache_dir must be a folder, got ''"),
        ("a.txt", "x\ny", {"cache_dir": "/proc/xx"}, "folder that can be written, but /proc/xx cannot: No such"),
        ("a.txt", "x\ny", {"cache_dir": __file__ + "/sub"}, "must be a folder, but " + __file__ + " is a file"),
        ("a.txt", "x\ny", {"cache_dir": "~nobody-here"}, "data.cache_dir must be a folder, got ~nobody-here: "),
        ("a.txt", "x\n \n", {}, "must hold two documents at least, one to train on and one to hold out, but"),
        ("a.txt", "x\n", {}, "is a single one: add documents (of a .txt file each line is one)"),
        ("a.txt", "x\ny", {"document": "file"}, "is a single one: data.document=line makes each line of it"),
        ("a.jsonl", '{"text": "x"}\n{"text": null}', {}, "must hold two documents at least"),
        ("a.jsonl", '{"text": "\\ud83d"}', {}, "text that is not valid Unicode: 'utf-8' codec can't encode"),
        (None, "", {"path": "x" * 300}, "cannot be read: File name too long"),
        (None, "", {"path": "~nobody-here/x.txt"}, "~nobody-here/x.txt cannot be read: "),
        ("a.txt", "x\ny", {"ctx": 99}, "data.ctx must be at most the LM's 64 positions, got 99"),
    ],
)
def test_problems_are_found_before_anything_is_loaded(tmp_path, name, content, changes, message):
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_text(content)
    text = LocalText(path=str(path), ctx=16)
    for key, value in changes.items():  # past the type check of the constructor, which only tests have
        setattr(text, key, value)
    (problem,) = text.problems(n_positions=64)
    assert message in problem


@pytest.mark.parametrize("seed", ["abc", None, 1.5, -1, True])
def test_a_seed_is_a_whole_number(seed):
    text = EmbeddedText()
    text.seed = seed
    assert text.problems() == [f"data.seed must be a whole number of at least 0, got {seed!r}"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("config", 20231101, "data.config must be text, got 20231101: quote it, \"data.config='20231101'\""),
        ("name", 5, "data.name must be text, got 5"),
        ("revision", 1.5, "data.revision must be text, got 1.5"),
        ("streaming", "no", "data.streaming must be true or false, got 'no'"),
    ],
)
def test_values_of_a_data_set_have_their_types(tmp_path, key, value, message):
    text = HubText(name=str(tmp_path))
    setattr(text, key, value)
    (problem,) = text.problems()
    assert message in problem


def test_two_documents_are_looked_at_and_no_more(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n\n{"text": "y"}\n{')
    assert LocalText(path=str(path)).problems() == []


def test_looking_at_a_folder_leaves_nothing_in_it(tmp_path):
    (tmp_path / "a.txt").write_text("x\ny\n")
    for place in ("", "new/and/deeper"):
        assert LocalText(path=str(tmp_path / "a.txt"), cache_dir=str(tmp_path / place)).problems() == []
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_all_problems_at_once(tmp_path):
    (tmp_path / "a.txt").write_text("x\ny\n")
    assert LocalText(path=str(tmp_path / "a.txt")).problems() == []
    assert EmbeddedText().problems(n_positions=128) == []
    (tmp_path / "b.jsonl").write_text("{}\n")
    (two,) = LocalText(path=str(tmp_path)).problems()
    assert "files of one format" in two
    found = LocalText(path="", ctx=0, heldout_fraction=2.0, block_rows=0, heldout_min_tokens=-1).problems()
    assert len(found) == 5


def test_a_tokenizer_without_a_fast_form_is_refused(local):
    class Slow(PreTrainedTokenizerFast):
        backend_tokenizer = None  # type: ignore[assignment]

    slow = Slow(tokenizer_object=bos_tokenizer().backend_tokenizer)
    with pytest.raises(DictlearnError, match="packed with fast tokenizers"):
        local(["w1"]).train(slow)


def test_cache_folder(local, tmp_path, monkeypatch):
    text = local(["w1 w2 w3 w4"] * 10)
    assert text.train(bos_tokenizer()).folder.parent == tmp_path / "cache" / "tokens"
    text.cache_dir = None
    assert text.train(bos_tokenizer()).folder.parents[1] == Path(os.environ["DICTLEARN_CACHE"])
    monkeypatch.delenv("DICTLEARN_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert text.train(bos_tokenizer()).folder.parents[1] == tmp_path / "home" / ".cache" / "dictlearn"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_builds_the_text_with_its_defaults(path):
    config = OmegaConf.load(path)
    required = {key: "FILE.txt" for key in OmegaConf.missing_keys(config)}
    config.update(required)
    text = instantiate(config)
    default = type(text)(**required)
    assert text == default
    assert set(config) - {"_target_"} == set(vars(default)), "every value can be set from the command line"


def test_names_are_found_in_the_package():
    assert dictlearn.data.TextData.__name__ == "TextData"
    for name in dictlearn.data.__all__:
        assert getattr(dictlearn.data, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dictlearn.data.nothing  # noqa: B018
