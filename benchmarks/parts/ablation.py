"""Which settings help? Trains one phase with one setting changed, over several seeds, and evaluates.

    python -m benchmarks.parts.ablation penalties --questions dev.jsonl.gz --train train.jsonl.gz --index vectors
    python -m benchmarks.parts.ablation feedback --questions dev.jsonl.gz --train train.jsonl.gz --index vectors
    python -m benchmarks.parts.ablation feedback --teacher my-rag/reranker ...
    python -m benchmarks.parts.ablation own --of generator --variant "twice:--generator_epochs 2" ...

A study of the generator trains it on contexts that are retrieved once, and lets it answer the questions. A study of the
retriever trains it and searches with it, dense and hybrid. Every row is compared with the first: the differences of the
questions are averaged over the seeds and bootstrapped over the questions. Left out: whole runs with rounds and rollback
(train.py, `cozyrag compare`).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate.utils import tqdm

from benchmarks.shared.corpus import add_arguments
from benchmarks.shared.scoring import p_value
from benchmarks.shared.studies import KINDS, Scores, Setup, Study, settings_of, without_decoding
from cozyrag.cli import entry_point
from cozyrag.config_checks import EMBEDDED
from cozyrag.errors import InputError
from cozyrag.evaluation.metrics import bootstrap_interval, paired_bootstrap

STUDIES = {
    "penalties": (
        "generator",
        {
            "no penalty": "",
            "repeats, trained": "--repeat_penalty 0.1",
            "keywords, trained": "--keyword_penalty 0.1",
            "short answers, trained": "--short_penalty 0.1",
            "all three, trained": "--repeat_penalty 0.1 --keyword_penalty 0.1 --short_penalty 0.1",
            "no 3-gram twice, decoding": "--no_repeat_ngram_size 3",
            "at least 3 tokens, decoding": "--min_answer_tokens 3",
            "both, decoding": "--no_repeat_ngram_size 3 --min_answer_tokens 3",
            "spans only, decoding": "--extractive",
            "all of training and decoding": "--repeat_penalty 0.1 --keyword_penalty 0.1 --short_penalty 0.1 "
            "--no_repeat_ngram_size 3 --min_answer_tokens 3",
        },
    ),
    "feedback": ("retriever", {"contrastive": "", "contrastive + feedback": "--feedback_weight 0.5"}),
    "own": ("", {"defaults": ""}),
}

Arrays = Mapping[str, np.ndarray]  # by metric, (n_seeds, n_questions), 0 to 1


def run(study: Study, variants: Mapping[str, str], seeds: Sequence[int]) -> dict[str, Arrays]:
    """The scores of each variant. Seeds are the outer loop, so that variants can share a training."""
    found: dict[str, list[Scores]] = {name: [] for name in variants}
    # Variants with the same training are neighbours, so that one training serves them.
    order = sorted(variants, key=lambda name: without_decoding(variants[name]))
    with tqdm(total=len(variants) * len(seeds), desc="ablation", unit="variant") as bar:
        for seed in seeds:
            for name in order:
                bar.set_postfix_str(f"{name}, seed {seed}")
                found[name].append(study.scores(variants[name], seed))
                bar.update()
                means = ", ".join(f"{metric} {100 * np.mean(values):.1f}" for metric, values in found[name][-1].items())
                bar.write(f"{name}, seed {seed}: {means}")  # a study takes hours and may be stopped before its table
    return {
        name: {metric: np.array([each[metric] for each in runs]) for metric in study.names}
        for name, runs in found.items()
    }


# ---- tables


def first_row(scores: Arrays) -> list[str]:
    """Cells of the first row: percent with 95 % intervals over the questions."""
    cells = []
    for values in scores.values():
        mean = values.mean(axis=0)
        low, high = bootstrap_interval(mean)
        cells.append(f"{100 * mean.mean():.1f} ({100 * low:.1f} to {100 * high:.1f})")
    return cells


def other_row(scores: Arrays, first: Arrays) -> list[str]:
    """Cells of another row: percent, and the difference to the first row in points with its interval."""
    cells = []
    for metric, values in scores.items():
        gain, low, high, _ = paired_bootstrap(first[metric].mean(axis=0), values.mean(axis=0))
        cells.append(f"{100 * values.mean():.1f}, {100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
    return cells


def table(found: Mapping[str, Arrays]) -> str:
    """The results as a Markdown table."""
    (first_name, first), *others = found.items()
    lines = ["| | " + " | ".join(first) + " |", "|---|" + "---:|" * len(first)]
    lines.append(f"| {first_name} | " + " | ".join(first_row(first)) + " |")
    lines += [f"| {name} | " + " | ".join(other_row(scores, first)) + " |" for name, scores in others]
    return "\n".join(lines)


def spread_of_seeds(found: Mapping[str, Arrays], metric: str) -> str:
    """How much the seeds alone change a row, and how likely each row is no better than the first."""
    means = [scores[metric].mean(axis=1) for scores in found.values()]
    widest = max(float(values.max() - values.min()) for values in means)
    (_, first), *others = found.items()
    tests = {
        name: paired_bootstrap(first[metric].mean(axis=0), scores[metric].mean(axis=0))[3] for name, scores in others
    }
    p = "; ".join(f"{name} {p_value(value)}" for name, value in tests.items())
    return (
        f"Seeds alone change the {metric} of a row by up to {100 * widest:.1f} points. Share p of the resamples in "
        f"which a row is not better than the first: {p}."
    )


# ---- the command


def variants_of(options: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The kind of study and its rows. Raises InputError for a variant without a name or with a wrong setting."""
    kind, variants = STUDIES[options.study]
    given = {}
    for text in options.variant:
        name, colon, flags = text.partition(":")
        if not colon:
            raise InputError(
                f'--variant: expected "NAME:--setting value", found {text!r}. Put a name and a colon first.'
            )
        given[name.strip()] = flags.strip()
    chosen = {name: f"{options.base} {flags}".strip() for name, flags in (variants | given).items()}
    for flags in chosen.values():
        settings_of(flags, 0)  # raises before anything is trained
    return options.of or kind or "generator", chosen


def compare(options: argparse.Namespace) -> None:
    """Train, evaluate, and report."""
    kind, variants = variants_of(options)
    setup = Setup.load(options)
    print(
        f"{len(setup.train)} training questions, {len(setup.validation)} validation questions, "
        f"{len(setup.passages.ids)} passages, seeds {', '.join(map(str, options.seeds))}.\n"
    )
    found = run(KINDS[kind](setup), variants, options.seeds)
    print(table(found))
    print(f"\n{spread_of_seeds(found, 'F1' if kind == 'generator' else 'dense R@5')}")
    if options.json:
        means = {name: {m: v.mean(axis=1).tolist() for m, v in scores.items()} for name, scores in found.items()}
        Path(options.json).write_text(json.dumps({"variants": variants, "means": means}, indent=2) + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES, help="settings that are compared; own: those of --variant")
    add_arguments(parser, max_questions=1000)
    add = parser.add_argument
    add("--train", required=True, help="training questions with their gold passage")
    add("--train_questions", type=int, default=1500, help="size of the sample of training questions (default: 1500)")
    add("--max_passages", type=int, help="number of passages: the gold ones and a sample of the others (default: all)")
    add("--generator", default=EMBEDDED, help="embedded, a folder, or a Hub id (default: embedded)")
    add("--teacher", metavar="RERANKER", help="a CrossEncoder whose scores are the feedback, not the generator's")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default: 1 2 3)")
    add("--of", choices=KINDS, help="the model that `own` trains (default: generator)")
    add("--base", default="", help='settings of all rows, as one text: "--generator_epochs 2"')
    add("--variant", action="append", default=[], help='another row: "NAME:--setting value ..."')
    add("--threads", type=int, help="CPU threads (default: all cores)")
    add("--json", help="output file for the means of each seed")
    return parser.parse_args(arguments)


def main() -> None:
    """The command line."""
    options = parse()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
