"""See with other code that `cozyrag passages` lost nothing: counts, and every article's text letter by letter.

    python scripts/check_passages.py OUTPUT.jsonl IN...

IN: WikiExtractor folders and .jsonl.gz files of articles (title, text). Makes nothing of the package's code: reads the inputs
with regular expressions and json. Three things are compared with the output and its summary:
  - the texts of all articles without white space, one after another, are exactly the passages without white space
    (for an output made with --keep_duplicates --min_characters 1);
  - otherwise: articles, words and characters, where every passage must be part of an article, and articles less passages
    must be what the summary says was left out.
"""

import gzip
import html
import json
import re
import sys
from pathlib import Path


def articles(inputs: list[str]):
    """(title, text) of every article, in the order of files."""
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            for file in sorted(each for each in path.rglob("*") if each.is_file()):
                raw = file.read_text(encoding="utf-8")
                for head, body in re.findall(r"(<doc [^\n]*>)\n(.*?)</doc>", raw, flags=re.S):
                    yield html.unescape(re.search(r'title="(.*)">$', head)[1]), html.unescape(body)
        else:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line)
                    yield row["title"], row["text"]


def without_title(title: str, text: str) -> str:
    """WikiExtractor repeats the title as the first line."""
    lines = text.strip().split("\n")
    return "\n".join(lines[1:]) if lines[0].strip() == title else text


def squeezed(text: str) -> str:
    """The text without any white space."""
    return "".join(text.split())


def passages(output: str) -> list[dict]:
    """The rows of the output."""
    if output.endswith(".parquet"):
        import pyarrow.parquet as pq

        return pq.read_table(output).to_pylist()
    with (
        gzip.open(output, "rt", encoding="utf-8") if output.endswith(".gz") else open(output, encoding="utf-8") as file
    ):
        return [json.loads(line) for line in file]


def main() -> None:
    """Compare, print, and fail where something is missing."""
    output, inputs = sys.argv[1], sys.argv[2:]
    summary = json.loads(Path(re.sub(r"\.(jsonl(\.gz)?|parquet)$", "", output) + ".summary.json").read_text())
    made, count, words, stream, titles = passages(output), 0, 0, [], {}
    for title, text in articles(inputs):
        text = without_title(title, text)
        count, words = count + 1, words + len(text.split())
        stream.append(squeezed(text))
        titles.setdefault(" ".join(title.split()), []).append(stream[-1])
    dropped = sum(each["words"] for each in summary["dropped"].values())
    found = {"articles": count, "words": words, "passages": len(made), "words in passages": sum(len(each["text"].split()) for each in made)}  # fmt: skip
    print(found, {"words left out, by the summary": dropped})
    assert (count, words) == (summary["articles"], summary["words_read"])
    assert found["passages"] == summary["passages"] and found["words in passages"] == summary["words"]
    assert abs(words - found["words in passages"] - dropped) <= 1e-5 * words  # a word of 150 may be cut in two
    assert len({each["id"] for each in made}) == len(made)
    assert all(any(squeezed(each["text"]) in text for text in titles[each["title"]]) for each in made)
    if summary["settings"]["keep_duplicates"] and summary["settings"]["min_characters"] == 1:
        assert "".join(stream) == "".join(squeezed(each["text"]) for each in made)
        print("Every article's text is there, letter by letter and in order.")
    else:
        print("Every passage is part of an article of its title; the words add up.")


if __name__ == "__main__":
    main()
