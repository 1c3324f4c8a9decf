"""Check independently that `cozyrag passages` lost nothing: counts, and the text of every article.

    python scripts/check_passages.py OUTPUT.jsonl IN...

IN: WikiExtractor folders and .jsonl.gz files of articles (title, text). The script does not use the code of the
package: it reads the inputs with regular expressions and json. It checks:
  - if the output was made with --keep_duplicates --min_characters 1: the articles without white space, joined, equal
    the passages without white space, joined;
  - otherwise: every passage is part of an article, and the numbers of articles, words, and passages match the summary.
"""

import argparse
import gzip
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path


def articles(inputs: list[str]) -> Iterator[tuple[str, str]]:
    """(title, text) of every article, in the order of the files."""
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            for file in sorted(each for each in path.rglob("*") if each.is_file()):
                raw = file.read_text(encoding="utf-8")
                for head, body in re.findall(r"(<doc [^\n]*>)\n(.*?)</doc>", raw, flags=re.S):
                    yield html.unescape(re.search(r'title="(.*)">$', head)[1]), without_residue(html.unescape(body))
        else:
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                for line in lines:
                    row = json.loads(line)
                    yield row["title"], row["text"]


def without_residue(text: str) -> str:
    """The text without the tags, formulas and empty parentheses that WikiExtractor leaves."""
    own = (
        "templatestyles references? ref nowiki onlyinclude includeonly noinclude section poem gallery mapframe maplink"
    )
    usual = "div span p small big center font table tr td th ul ol li"
    names = rf"(?:{own} maplink timeline dfn br)\b|(?:{usual})\s".replace(" ", "|")
    text = re.sub(rf"[^\S\n]*</?(?:{names})[^<>\n]*>", " ", text, flags=re.I)
    text = re.sub(r"[^\S\n]*\b(?:formula|codice)_\d+\b", "", text)
    return re.sub(r"(?m)(^|[^\S\n])\(\s*(?:[;,:][\s;,:]*(?:from|or|and)?\s*)?\)", "", text)


def without_title(title: str, text: str) -> str:
    """The text without its first line if that repeats the title, as in WikiExtractor's output."""
    lines = text.strip().split("\n")
    return "\n".join(lines[1:]) if lines[0].strip() == title else text


def squeezed(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def passages(output: str) -> list[dict]:
    """The rows of the output."""
    if output.endswith(".parquet"):
        import pyarrow.parquet as pq

        return pq.read_table(output).to_pylist()
    opened = gzip.open if output.endswith(".gz") else open
    with opened(output, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main() -> None:
    """Compare and print; fail if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="OUTPUT", help="output of `cozyrag passages`")
    parser.add_argument("inputs", metavar="IN", nargs="+", help="its inputs")
    options = parser.parse_args()
    output, inputs = options.output, options.inputs
    summary = json.loads(Path(re.sub(r"\.(jsonl(\.gz)?|parquet)$", "", output) + ".summary.json").read_text())
    made, count, words = passages(output), 0, 0
    stream: list[str] = []
    titles: dict[str, list[str]] = {}
    for title, text in articles(inputs):
        text = without_title(title, text)
        count, words = count + 1, words + len(text.split())
        stream.append(squeezed(text))
        titles.setdefault(" ".join(title.split()), []).append(stream[-1])
    dropped = sum(each["words"] for each in summary["dropped"].values())
    kept = sum(len(each["text"].split()) for each in made)
    print(
        f"{count} articles of {words} words; {len(made)} passages of {kept} words; {dropped} words left out, by the "
        "summary"
    )
    assert (count, words) == (summary["articles"], summary["words_read"])
    assert (len(made), kept) == (summary["passages"], summary["words"])
    assert abs(words - kept - dropped) <= 1e-5 * words  # a word of 150 characters may be split
    assert len({each["id"] for each in made}) == len(made)
    assert all(any(squeezed(each["text"]) in text for text in titles[each["title"]]) for each in made)
    if summary["settings"]["keep_duplicates"] and summary["settings"]["min_characters"] == 1:
        assert "".join(stream) == "".join(squeezed(each["text"]) for each in made)
        print("The text of every article is in the passages, in order.")
    else:
        print("Every passage is part of an article of its title, and the numbers of words match.")


if __name__ == "__main__":
    main()
