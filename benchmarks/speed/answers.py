"""How many answers a second does a pair give, beside a text-generation pipeline of transformers on the same prompts?

    python -m benchmarks.speed.answers my-rag --questions cozyrag/assets/quickstart/test.jsonl --limit 32

The pipeline loads the pair's generator and gets the prompts that the pair has made: only the first side searches.
Decoding is greedy on all sides, with the pair's limits, in float32. A second table has whole processes that answer one
question. Left out: several clients (serving.py), 8-bit encoding, GPUs.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
from transformers import pipeline

from benchmarks.shared.measuring import Measured, Side, measure, ratios, spread
from cozyrag.cli import entry_point
from cozyrag.errors import InputError
from cozyrag.pipeline import CozyRAG
from cozyrag.runtime.json_lines import read_json_lines

OURS, OUR_GENERATOR = "CozyRAG.answers, search included", "its generator alone"
PIPELINE, PIPELINE_ALONE = "transformers pipeline", "transformers pipeline, one prompt at a time"
ASK, ASK_PIPELINE = "cozyrag ask", "process with a transformers pipeline"
CPU = torch.device("cpu")
PROGRAM = """import sys, torch
from transformers import pipeline
folder, prompt, count = sys.argv[1:]
write = pipeline("text-generation", folder, dtype=torch.float32, device="cpu")
print(write(prompt, do_sample=False, max_new_tokens=int(count), return_full_text=False)[0]["generated_text"])
"""

Answering = Callable[[int], list[str]]  # the answers to the first questions


def answering(pair: CozyRAG, questions: list[str], batch_size: int) -> dict[str, Answering]:
    """The sides. All but the first answer from the contexts that the pair has found."""
    contexts = [answer.context for answer in pair.answers(questions)]
    prompts = [pair.generator.prompt(*each) for each in zip(contexts, questions, strict=True)]
    limits = pair.decoding.limits(pair.no_answer_threshold is None)
    write = pipeline("text-generation", model=pair.generator.model, tokenizer=pair.generator.tokenizer, device=CPU)
    greedily = {
        "do_sample": False,
        "max_new_tokens": limits["max_new_tokens"],
        "min_new_tokens": limits["min_new_tokens"],
        "eos_token_id": pair.generator.end,
        "return_full_text": False,
        "add_special_tokens": False,
    }

    def by_pipeline(rows: int, size: int) -> list[str]:
        return [each[0]["generated_text"] for each in write(prompts[:rows], batch_size=size, **greedily)]

    def by_generator(rows: int) -> list[str]:
        written = pair.generator.write(questions[:rows], contexts[:rows], batch_size=batch_size, **limits)
        return [each.text for each in written]

    return {
        OURS: lambda rows: [answer.text for answer in pair.answers(questions[:rows])],
        OUR_GENERATOR: by_generator,
        PIPELINE: lambda rows: by_pipeline(rows, batch_size),
        PIPELINE_ALONE: lambda rows: by_pipeline(rows, 1),
    }


def commands(folder: str, pair: CozyRAG, question: str) -> dict[str, list[str]]:
    """Processes that answer one question: ours searches, the other gets the prompt."""
    prompt = pair.generator.prompt(pair.answer(question).context, question)
    alone = [sys.executable, "-c", PROGRAM, str(Path(folder) / "generator"), prompt, str(pair.decoding.answer_tokens)]
    return {ASK: [sys.executable, "-m", "cozyrag.cli", "ask", folder, question], ASK_PIPELINE: alone}


def table(unit: str, found: Sequence[Measured], equal: dict[str, str]) -> str:
    """A row for each side, compared with the first; rates of `unit`."""
    lines = [
        f"| side | {unit} a second (median) | lowest to highest | the first is faster by | lowest to highest | "
        "same answers as the first |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for each in found:
        faster = ratios(found[0], each)
        lines.append(
            f"| {each.name} | {each.rate:.4g} | {spread(each.rates, '.4g')} | {median(faster):.2f}x | "
            f"{spread(faster, '.2f')} | {equal.get(each.name, '')} |"
        )
    return "\n".join(lines)


def compare(options: argparse.Namespace) -> None:
    """Measure and print both tables."""
    pair = CozyRAG.from_pretrained(options.pair, device="cpu", precision="float32")
    if pair.decoding.extractive or pair.decoding.no_repeat_ngram_size:
        raise InputError(
            f"Expected a pair that decodes as a pipeline can, {options.pair} has --extractive or "
            "--no_repeat_ngram_size, so answers would not be comparable. Give another pair."
        )
    questions = [row["question"] for row in read_json_lines(options.questions)[: options.limit]]
    sides = answering(pair, questions, options.batch_size)
    answers = {name: [" ".join(text.split()) for text in side(len(questions))] for name, side in sides.items()}
    equal = {
        name: f"{sum(a == b for a, b in zip(own, answers[OURS], strict=True))} of {len(questions)}"
        for name, own in answers.items()
    }
    timed = [
        Side(name, len(questions), options.batch_size, lambda rows, side=side: lambda: side(rows))
        for name, side in sides.items()
    ]
    print(table("answers", measure("answers", timed, repeats=options.repeats, device=CPU), equal))
    processes = [
        Side(name, 1, 1, lambda rows, command=command: lambda: subprocess.run(command, check=True, capture_output=True))
        for name, command in commands(options.pair, pair, questions[0]).items()
    ]
    print("\n" + table("processes", measure("processes", processes, repeats=options.repeats, device=CPU), {}))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", help="output folder of a run")
    parser.add_argument("--questions", required=True, type=Path, help=".jsonl with a column question")
    parser.add_argument("--limit", type=int, default=32, help="questions to ask (default: 32)")
    parser.add_argument("--batch_size", type=int, default=32, help="prompts at once (default: 32, as CozyRAG.answers)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions, in which the sides alternate (default: 3)")
    options = parser.parse_args()
    entry_point(lambda: compare(options))


if __name__ == "__main__":
    main()
