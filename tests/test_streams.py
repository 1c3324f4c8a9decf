"""Encodings of text files: by mark, by NUL bytes, by a detector with a note, or refused with the line and the byte."""

import gzip

import pytest

from cozyrag.data.documents import InputSource, read_document
from cozyrag.data.passages import read_passages
from cozyrag.data.readers import read_rows
from cozyrag.data.rows import BadRows
from cozyrag.data.streams import InputFile, read_lines
from cozyrag.errors import InputError

TEXTS = {
    "cp1252": "The pump isn’t old – “it was built” by the smith’s son.\nA ticket costs 5 €, naïve as it sounds…\n",
    "cp1250": "Čerpadlo za domem čerpá vodu ze studny.\nKde leží klíč od pokoje pro hosty?\n",
    "iso8859-2": "Gdzie leży klucz do pokoju gościnnego?\nChłopiec dostał ciasto ze śmietaną i miód.\n",
    "cp1251": "Насос за домом качает воду из колодца.\nГде лежит ключ от комнаты?\n",
    "koi8-r": "Насос за домом качает воду из колодца.\nГде лежит ключ от комнаты?\n",
    "cp932": "家の裏のポンプは井戸から水をくみ上げます。\n① 客間の鍵はどこにありますか。\n",
    "gb18030": "屋后的水泵从井里抽水。\n客房的钥匙在哪里？\n",
    "big5": "屋後的水泵從井裡抽水。\n客房的鑰匙在哪裡？\n",
    "cp949": "집 뒤의 펌프는 우물에서 물을 끌어올립니다.\n손님방 열쇠는 어디에 있습니까?\n",
}
ASCII = "# written by hand\nsize 3\n"


def read(path, content):
    """The text of a file with that content, and the notes about it."""
    path.write_bytes(content)
    notes = []
    return "".join(read_lines(InputFile(path.name, str(path), note=notes.append))), notes


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("before", ["", ASCII * 20_000], ids=["at once", "late"])
def test_an_old_encoding_is_found_and_noted(tmp_path, encoding, before):
    text = before + TEXTS[encoding] * 3 + ASCII
    found, notes = read(tmp_path / "a.txt", text.encode(encoding))
    assert found == text and len(notes) == 1
    assert notes[0].startswith("a.txt: read as ") and "(not UTF-8); save it as UTF-8" in notes[0]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    "text", ["Frage\tAntwort\r\nWann?\tim Mai\r\n", "Где?\tздесь\nв мае\u2028один\n" * 3, "Pumpe 泵\nx"]
)
def test_unicode_files_keep_every_line(tmp_path, encoding, text):
    found, notes = read(tmp_path / "a.txt", text.encode(encoding))
    assert found == text and len(notes) == (encoding in ("utf-16-le", "utf-16-be", "utf-32-le"))
    lines = list(read_lines(InputFile("a", str(tmp_path / "a.txt"))))
    assert lines == text.splitlines(keepends=True) if "\u2028" not in text else len(lines) == 6


def test_a_packed_file_is_detected_as_well(tmp_path):
    found, notes = read(tmp_path / "a.txt.gz", gzip.compress(TEXTS["cp1251"].encode("cp1251")))
    assert found == TEXTS["cp1251"] and "read as cp1251" in notes[0]
    assert read(tmp_path / "b.txt.gz", gzip.compress(TEXTS["cp1251"].encode("utf-16")))[0] == TEXTS["cp1251"]


def test_one_odd_character_in_a_long_english_file(tmp_path):
    text = "The pump stands behind the house and lifts water.\n" * 500 + "It costs 10 £\n"
    assert read(tmp_path / "a.txt", text.encode("cp1252"))[0] == text


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("Größe\n".encode() + b"Stra\xdfe\n", "line 2: expected UTF-8 text, found byte 0xdf (byte 5 of the line)"),
        (b"a\n" + "größer und schöner".encode() + b" \xff\n", "line 2: expected UTF-8 text, found byte 0xff"),
        (b"a\nb \xff\n" + "“größer” und “schöner”\n".encode(), "line 2: expected UTF-8 text, found byte 0xff"),
        (b"a\nb\0c\n", "line 2: expected UTF-8 text, found a NUL byte (byte 2 of the line)"),
        ("é".encode() + b"\0\n", "line 1: expected UTF-8 text, found a NUL byte (byte 3 of the line)"),
        ("Frage\n".encode("utf-16") + b"\x00\xd8\n\x00", "after line 0: expected utf-16 text, found"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0\x01\n\n", "line 1: expected UTF-8 text, found byte 0xff (byte 1"),
    ],
    ids=["line", "within", "before", "nul", "nul after", "wide", "picture"],
)
def test_mixed_or_broken_text_is_refused_with_its_place(tmp_path, content, place):
    with pytest.raises(InputError) as refused:
        read(tmp_path / "a.txt", content)
    assert place in str(refused.value) and "iconv" not in str(refused.value)


def test_a_text_that_the_detected_encoding_does_not_hold_is_refused(tmp_path):
    content = (TEXTS["cp1252"] * 1000).encode("cp1252") + b"broken \x81\n"
    with pytest.raises(InputError, match="line 2001: expected cp1252 text, found byte 0x81"):
        read(tmp_path / "a.txt", content)


def test_notes_are_reported_once_and_fail_nothing(tmp_path):
    rows = 'text\n"Müller’s pump – a long story of the smith"\n'
    (tmp_path / "a.csv").write_bytes(rows.encode("cp1252"))
    table, report = read_passages(str(tmp_path / "a.csv"))
    assert table["text"][:] == ["Müller’s pump – a long story of the smith"]
    assert report.startswith(f"{tmp_path / 'a.csv'}: read as cp1252") and "\n" not in report
    bad = BadRows()
    assert len(list(read_rows(str(tmp_path / "a.csv"), bad=bad))) == 1 and len(bad.notes) == 1
    bad.note(bad.notes[0])
    bad.add("a.csv, line 3", "odd")
    assert bad.finish("a.csv", skip=True).split("\n")[1:] == ["a.csv: 1 row skipped: a.csv, line 3: odd"]


def test_many_notes_are_shortened():
    bad = BadRows()
    for number in range(1234):
        bad.note(f"{number}.txt: read as cp1252 \ud800")
    lines = bad.finish("These", skip=False).split("\n")
    assert len(lines) == 11 and lines[-1] == "... and 1,224 more notes" and lines[0].endswith("\\ud800")


def test_a_note_of_a_document_is_passed_on(tmp_path):
    (tmp_path / "a.md").write_bytes(f"# Насос\n{TEXTS['koi8-r']}".encode("koi8-r"))
    notes = []
    assert read_document(InputSource(str(tmp_path / "a.md"), "markdown"), notes.append).title == "Насос"
    assert len(notes) == 1 and "koi8-r" in notes[0]
