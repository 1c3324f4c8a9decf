"""What a retriever wants in front of questions and passages, such as E5's "query: " and "passage: ".

A retriever that was trained with prompts finds less without them. In this order: what the user gives; what the model
itself names in config_sentence_transformers.json; what its family is known to want; nothing. Left out: putting them in
front of texts (retriever.py), and retrievers of a run, which keep the prompts they were saved with.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Prompts(NamedTuple):
    """The texts in front of a question and of a passage; "" for none."""

    query: str
    document: str


SEARCH = "Represent this sentence for searching relevant passages: "
# Part of a model's name, without its owner: what the cards of these families ask for. The first match counts.
FAMILIES = {
    r"e5-mistral|e5-.*instruct": Prompts(
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: ", ""
    ),
    r"e5-(small|base|large)": Prompts("query: ", "passage: "),
    r"bge-(micro|small|base|large)-en|mxbai-embed": Prompts(SEARCH, ""),
    r"bge-(small|base|large)-zh": Prompts("为这个句子生成表示以用于检索相关文章：", ""),  # noqa: RUF001
    r"nomic-embed-text": Prompts("search_query: ", "search_document: "),
    r"snowflake-arctic-embed-.*v2": Prompts("query: ", ""),
    r"snowflake-arctic-embed": Prompts(SEARCH, ""),
}
NONE = Prompts("", "")
PASSAGE_NAMES = ("document", "passage", "corpus")  # as sentence-transformers looks for them


def choose_prompts(name: str, own: Mapping[str, str | None], query: str | None, passage: str | None) -> Prompts:
    """The prompts of a retriever.

    Args:
        name: its name on the Hub, or its folder. own: the `prompts` of the model.
        query, passage: what the user wants; None: what the model names, else what its family wants.
    """
    # Once loaded, a model that names only a "passage" also has an empty "document", which would come first.
    named = Prompts(own.get("query") or "", next(filter(None, map(own.get, PASSAGE_NAMES)), ""))
    found = named if any(named) else known_prompts(name)
    return Prompts(found.query if query is None else query, found.document if passage is None else passage)


def known_prompts(name: str) -> Prompts:
    """What the family of a model wants, recognised by the end of its name, or by its folder in the cache of the Hub."""
    parts = [part for part in Path(name).parts if part.startswith("models--")] or [Path(name).name]
    model = parts[-1].rpartition("--")[2].lower()
    return next((prompts for family, prompts in FAMILIES.items() if re.search(rf"\b({family})", model)), NONE)
