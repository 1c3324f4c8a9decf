"""What is asked for: who writes, how much, how strictly it is checked, and which files it becomes.

Imports nothing heavy, so that a command can refuse a mistake at once. Left out: doing it (running.py).
"""

from dataclasses import dataclass, field
from pathlib import Path

WAYS = ("auto", "examples", "instruction", "trained")
OUTPUTS = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Making:
    """How questions are made and checked.

    Args:
        pairs: drafts of a passage, at most. batch_size: passages of a part.
        least_f1: agreement of the reader with the answer, 0 to 1; 0: nothing is read again.
        top_k: passages of the search among which the right one must be; 0: nothing is searched.
        eval_share: share of the passages whose pairs are for validation.
    """

    pairs: int = 3
    batch_size: int = 8
    least_f1: float = 0.6
    top_k: int = 20
    eval_share: float = 0.1
    seed: int = 42


@dataclass(frozen=True)
class Request:
    """Who writes and reads, about how many passages, and how.

    Args:
        generator: a model's folder, Hub id or "smollm2"; None: the best that is installed. way: one of WAYS.
        endpoint: address of a server that writes instead. model: its model; None: the first that it lists.
        reader: folder of a trained pair or generator; None: the writer reads.
        limit: passages to ask about, drawn with the seed; None: all.
    """

    generator: str | None = None
    way: str = "auto"
    endpoint: str | None = None
    model: str | None = None
    reader: str | None = None
    limit: int | None = None
    how: Making = field(default_factory=Making)


@dataclass(frozen=True)
class Places:
    """The files of an output: its own name, and what is put before the ending for the others."""

    training: Path
    validation: Path
    rejected: Path
    summary: Path
    page: Path
    parts: Path

    @classmethod
    def of(cls, output: str | Path) -> "Places":
        """The files for the output of this name, which ends in one of OUTPUTS."""
        path = Path(output)
        ending = next(each for each in reversed(OUTPUTS) if path.name.lower().endswith(each))
        stem, own = path.name[: -len(ending)], path.name[-len(ending) :]
        return cls(
            training=path,
            validation=path.with_name(f"{stem}.validation{own}"),
            rejected=path.with_name(f"{stem}.rejected{own}"),
            summary=path.with_name(f"{stem}.summary.json"),
            page=path.with_name(f"{stem}.html"),
            parts=path.with_name(f"{path.name}.parts"),
        )
