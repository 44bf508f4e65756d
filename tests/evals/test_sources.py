"""Texts and questions from a folder, or from public datasets (stood in for: no test uses the network)."""

from __future__ import annotations

import pytest
from tiny_sources import make_sources

from everlearn.errors import InvalidArgument
from everlearn.evals import sources as module
from everlearn.evals.language import sentences
from everlearn.evals.sources import Babi, Sources, parse_babi

TEXT = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 Fred got the milk.
2 What did Fred get? \tmilk\t1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("data"))


def test_questions_get_all_facts_before_them():
    assert parse_babi(TEXT) == [
        Babi(("Mary moved to the bathroom.", "John went to the hallway."), "Where is Mary?", "bathroom"),
        Babi(
            ("Mary moved to the bathroom.", "John went to the hallway.", "Daniel went back to the hallway."),
            "Where is Daniel?",
            "hallway",
        ),
        Babi(("Fred got the milk.",), "What did Fred get?", "milk"),
    ]


def test_books_are_parted_by_name(folder):
    parts = Sources.at(folder).books()
    assert {part: len(texts) for part, texts in parts.items()} == {"train": 2, "validation": 1, "test": 1}
    texts = [text for part in parts.values() for text in part]
    assert sorted(texts) == sorted(path.read_text() for path in (folder / "books").iterdir())


def test_everything_is_found(folder):
    found = Sources.at(folder)
    assert len(found.babi("qa3", "test")) == 40
    assert found.lambada()[0].endswith("house")
    assert found.blimp()[0] == ("agreement", "Cats go.", "Cats goes.")
    assert "<unk>" in found.wikitext()


def test_the_digest_tells_contents_apart(folder, tmp_path):
    other = make_sources(tmp_path / "other")
    assert Sources.at(folder).digest("books", "babi") == Sources.at(other).digest("books", "babi")
    (other / "books" / "author_0.txt").write_text("Other words.")
    assert Sources.at(folder).digest("books") != Sources.at(other).digest("books")
    assert Sources.at(folder).digest("babi") == Sources.at(other).digest("babi")


def test_errors_name_what_is_missing(folder, tmp_path):
    with pytest.raises(InvalidArgument, match=r"data: got .*nowhere"):
        Sources.at(tmp_path / "nowhere")
    empty = Sources.at(tmp_path)
    with pytest.raises(InvalidArgument, match="no folder 'lambada'"):
        empty.lambada()
    for name in ("books", "blimp", "wikitext2"):
        (tmp_path / name).mkdir()
    with pytest.raises(InvalidArgument, match="got 0 books"):
        empty.books()
    with pytest.raises(InvalidArgument, match=r"no \*.jsonl"):
        empty.blimp()
    with pytest.raises(InvalidArgument, match=r"no wikitext2/test\.txt"):
        empty.wikitext()
    with pytest.raises(InvalidArgument, match="no qa9_"):
        Sources.at(folder).babi("qa9", "train")


def test_without_a_folder_public_datasets_are_fetched(monkeypatch):
    rows = {
        "emozilla/pg19": [{"short_book_title": f"book {i}", "text": f"text {i}"} for i in range(50)],
        "Muennighoff/babi": [
            {"task": 2, "passage": "A b.\nC d.\n", "question": "Where?", "answer": "b"},
            {"task": 1, "passage": "E f.\n", "question": "Who?", "answer": "f"},
        ],
        "EleutherAI/lambada_openai": [{"text": "a b"}],
        "Salesforce/wikitext": [{"text": "one"}, {"text": "two"}],
        "nyu-mll/blimp": [{"sentence_good": "good", "sentence_bad": "bad"}],
    }
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda path, **given: rows[path])
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["island"])
    module._public_babi_rows.cache_clear()
    public = Sources.at(None)
    assert sum(map(len, public.books().values())) == module.PUBLIC_BOOKS
    assert public.babi("qa2", "train") == [Babi(("A b.", "C d."), "Where?", "b")]
    assert public.lambada() == ["a b"]
    assert public.wikitext() == "one\ntwo"
    assert public.blimp() == [("island", "good", "bad")]
    assert public.digest("books") == "public"
    module._public_babi_rows.cache_clear()


def test_a_dataset_that_cannot_be_fetched_is_an_error(monkeypatch):
    import datasets

    def fail(path, **given):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InvalidArgument, match="'EleutherAI/lambada_openai' could not be fetched: offline"):
        Sources.at(None).lambada()


def test_sentences_end_where_a_reader_would_end_them():
    text = 'He said “Stop.” Then he\nleft! Was it 3.5 miles? Yes. "So," she said. no capital'
    assert sentences([text]) == [
        "He said “Stop.”",
        "Then he left!",
        "Was it 3.5 miles?",
        "Yes.",
        '"So," she said. no capital',
    ]
    assert sentences(["One two three. Four."], least=2) == ["One two three."]
