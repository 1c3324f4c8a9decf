#!/bin/sh
# From a folder of Markdown notes and a TSV of questions to an answer in four commands, with the bundled models and a short training.
# Usage: notes_to_answers.sh [OUTPUT_FOLDER] (default: notes-rag). Takes about two minutes on two cores.
set -e
here=$(cd "$(dirname "$0")/.." && pwd)
out=${1:-notes-rag}
mkdir -p "$out"
cozyrag passages "$here/tests/notes" --output "$out/passages.jsonl"
cozyrag questions "$here/tests/notes-questions.tsv" --output "$out/questions.jsonl" --passages "$out/passages.jsonl"
accelerate launch --config_file "$here/accelerate_configs/cpu.yaml" "$here/train.py" --questions "$out/questions.jsonl" --passages "$out/passages.jsonl" --generator embedded --rounds 1 --generator_steps 4 --retriever_steps 2 --output_dir "$out/my-rag" --overwrite_output_dir
cozyrag ask "$out/my-rag" "Who is the vet of the cat?"
