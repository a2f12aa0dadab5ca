"""Plain text by lines: files, tables, articles; and the word-level tokenizer's stream."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from symphony_vlm.data.text_lines import articles, open_lines, read_lines
from symphony_vlm.data.word_tokenizer import train_word_tokenizer
from symphony_vlm.errors import InputError

WIKI = "\n = A title = \n\n First line here . \n = = A section = = \n x = y\n\n = Another = \n the end\n"
LINES = WIKI.removesuffix("\n").split("\n")


def test_lines_of_a_file_end_at_line_feeds_alone(tmp_path: Path) -> None:
    file = tmp_path / "wiki.valid.tokens"
    # A line separator, a form feed and a carriage return inside a line are characters of WikiText.
    file.write_bytes("a\u2028b\x0cc\rd\r\n\nlast".encode())
    assert list(open_lines(str(file))) == ["a\u2028b\x0cc\rd", "", "last"]
    assert list(open_lines(str(file))) == list(open_lines(str(file)))


def test_a_table_with_a_column_of_text_gives_the_same_lines(tmp_path: Path) -> None:
    file = tmp_path / "wiki.txt"
    file.write_text(WIKI)
    table = tmp_path / "wiki.parquet"
    # As on the hub: a row a line, with its line end; blank lines are empty.
    Dataset.from_dict({"text": [f"{line}\n" if line else "" for line in LINES]}).to_parquet(table)
    assert list(open_lines(str(table))) == list(open_lines(str(file))) == LINES


def test_unusable_texts_are_refused_with_place_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        open_lines(str(tmp_path / "missing.txt"))
    (tmp_path / "latin.txt").write_bytes(b"ab\nc\xe9\n")
    with pytest.raises(InputError, match=r"latin.txt: is not UTF-8 text .* after line"):
        list(open_lines(str(tmp_path / "latin.txt")))
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(InputError, match="holds no text"):
        read_lines(str(tmp_path / "blank.txt"))
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="holds jsonl records, not plain text"):
        open_lines(str(tmp_path / "a.jsonl"))
    with pytest.raises(InputError, match="no subset or split"):
        open_lines(str(tmp_path / "blank.txt"), split="train")
    Dataset.from_dict({"words": ["a"]}).to_parquet(tmp_path / "w.parquet")
    with pytest.raises(InputError, match="a column 'text' of text is needed"):
        list(open_lines(str(tmp_path / "w.parquet")))


def test_articles_begin_at_titles_and_not_at_sections() -> None:
    numbers = dict(zip(LINES, articles(LINES), strict=True))
    assert numbers[" = A title = "] == numbers[" = = A section = = "] == numbers[" x = y"] == 0
    assert numbers[" = Another = "] == numbers[" the end"] == 1
    assert articles(["a preface", " = T = ", "b"]) == [0, 1, 1]


def test_the_word_tokenizer_gives_wikitexts_stream_for_a_whole_file_and_for_lines() -> None:
    tokenizer = train_word_tokenizer(LINES, vocab_size=1000)
    expected = [word for line in LINES for word in [*line.split(), "<eos>"]]
    whole = tokenizer(WIKI)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(whole) == expected
    assert [i for line in LINES for i in tokenizer(f"{line}\n")["input_ids"]] == whole
    assert sorted(tokenizer.get_vocab().values()) == list(range(len({*expected, "<unk>"})))


def test_offsets_point_into_the_text_and_line_ends_at_their_line_feeds() -> None:
    tokenizer = train_word_tokenizer(LINES, vocab_size=1000)
    encoded = tokenizer(WIKI, return_offsets_mapping=True)
    for token, (start, end) in zip(encoded.tokens(), encoded["offset_mapping"], strict=True):
        assert WIKI[start:end] == ("\n" if token == "<eos>" else token)


def test_rare_and_unknown_words_are_unk_and_the_vocabulary_has_a_limit(tmp_path: Path) -> None:
    lines = ["a a a b b c <unk>", "a b"]
    tokenizer = train_word_tokenizer(lines, vocab_size=1000, min_frequency=2)
    assert tokenizer.convert_ids_to_tokens(tokenizer("a c zebra <unk> <eos>")["input_ids"]) == [
        "a",
        *["<unk>"] * 3,
        "<eos>",
    ]
    assert set(train_word_tokenizer(lines, vocab_size=3).get_vocab()) == {"<unk>", "<eos>", "a"}
    tokenizer.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    assert opened("a b\nc")["input_ids"] == tokenizer("a b\nc")["input_ids"]
    assert (opened.eos_token, opened.unk_token, opened.bos_token) == ("<eos>", "<unk>", None)


def test_equal_texts_give_equal_vocabularies() -> None:
    lines = ["d c b a", "b a"]
    first, second = (train_word_tokenizer(some, vocab_size=5).get_vocab() for some in (lines, lines[::-1]))
    assert first == second == {"<unk>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}
