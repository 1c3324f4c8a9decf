"""Encode passages with a retriever and build their index: DIR gets passages.parquet,
vectors.safetensors, index.faiss and index.json, as a run of train.py writes them to OUTPUT/index.

Every process of `accelerate launch` encodes a share. To resume a stopped run, give the command again.
After a change of the passages, only new and changed ones are encoded, if the retriever is the same.

--index_memory 400MB (or 8GB) selects the index: Flat (exact) if it fits, else SQ8 (a quarter of it),
from 100,000 passages on lists of short codes (about a 25th, and faster), else the vectors stay on
disk (exact and slow). Beside all but Flat, texts and their words stay on the disk, too (--stemmer).
--index_precision: auto is bf16 if the machine supports it, else float32; int8 is about 1.6 times as
fast on a CPU, with cosines that differ by about 0.005, and needs pip install "cozyrag[int8]".
--output lancedb:URI writes into a database of LanceDB (pip install "cozyrag[lancedb]") instead: a
folder, or s3://, gs:// or az:// with credentials from the environment. Every process writes its share;
it needs no --index_memory, and --stemmer must be that of the searches. Others search it meanwhile as
it was, and one of another retriever is refused.
--no_sentence_vectors saves about 4 KB per passage: hybrid search then compares whole passages, and
the context filter encodes sentences at query time.

examples:
  cozyrag index passages.jsonl --output my-index
  accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m cozyrag index wiki.parquet \\
    --output wiki-index
  cozyrag index wiki.parquet --retriever my-rag/retriever --output my-rag/index --index_memory 8GB
  cozyrag train --questions qa.tsv --passages passages.jsonl --index my-index
  cozyrag index wiki.parquet --output lancedb:s3://my-bucket/wiki

Left out: storing and finding vectors (vector_shards.py).
"""

import argparse
import re
from collections.abc import Sequence
from typing import get_args

from cozyrag.commands.options import add_columns, add_delimiter, at_least
from cozyrag.config import DEFAULTS, KINDS
from cozyrag.config_checks import EMBEDDED
from cozyrag.data.matching import STEMMERS
from cozyrag.retrieval.lance_database import database_of

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("passages", nargs="+", metavar="PASSAGES", help="output of `cozyrag passages`, or any --passages of train.py")
    help = "folder for the index, or lancedb:URI; an existing index in it is updated"
    add("--output", required=True, metavar="DIR", help=help)
    add("--retriever", default=EMBEDDED, metavar="NAME", help="folder or Hub id of a SentenceTransformer")
    add("--retriever_revision", metavar="REV", help="Hub revision of --retriever")
    help = "text before every question, as for train.py; the index is for a run with the same prompts"
    add("--query_prompt", metavar="TEXT", help=help)
    add("--passage_prompt", metavar="TEXT", help="text before every passage, as for train.py")
    add("--index_memory", type=bytes_of, metavar="SIZE", help="memory limit of the index (default: no limit, exact)")
    help = "tokens of a passage that are encoded, as for train.py"
    add("--passage_tokens", type=at_least(8), default=DEFAULTS["passage_tokens"], metavar="N", help=help)
    help = "of the words that are kept on the disk, as for train.py"
    add("--stemmer", choices=STEMMERS, default=DEFAULTS["stemmer"], metavar="LANGUAGE", help=help)
    help = "passages per batch"
    add("--encode_batch_size", type=at_least(1), default=DEFAULTS["encode_batch_size"], metavar="N", help=help)
    precisions, default = get_args(KINDS["index_precision"]), DEFAULTS["index_precision"]
    add("--index_precision", choices=precisions, default=default, help="of the encoder, see above")
    add("--shard_size", type=at_least(1), default=4096, metavar="N", help="passages after which progress is saved")
    add("--no_sentence_vectors", action="store_true", help="leave out the vectors of sentences, see above")
    add("--passages_split", default="train", help="split, if PASSAGES is a Hub dataset")
    add_columns(parser, "title", "text", "id")
    add_delimiter(parser)
    add("--skip_bad_rows", action="store_true", help="count, list and skip unusable rows instead of stopping")
    add("--use_cpu", action="store_true", help="encode on the CPU even if there is a GPU")
    add("--threads", type=int, metavar="N", help="CPU threads per process (default: all cores, shared)")


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Encode what has no vector yet and build the index. Raises InputError; encoded shards are kept for a later run."""
    add_arguments(parser)
    options = parser.parse_args(arguments)
    if database_of(options.output) and options.index_memory is not None:
        parser.error("--index_memory: an index in LanceDB is never in memory; omit the option")
    from cozyrag.commands.passage_encoding import build_index  # torch: only once the options are correct

    build_index(options)


def bytes_of(text: str) -> int:
    """The bytes of a size such as 400MB. Raises argparse.ArgumentTypeError if it is not one."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"expected a size such as 400MB or 8GB, found {text!r}")
    return int(float(found[1]) * UNITS[found[2]])
