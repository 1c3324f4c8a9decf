"""Fine-tune a retriever and a generator together on your own questions and passages.

    accelerate launch train.py                                     # the quickstart set that comes with the package
    accelerate launch train.py --questions qa.tsv --passages wiki.jsonl --output_dir my-rag

cozyrag/run.py shows a run step by step; --help explains the settings.
"""

from cozyrag.cli import entry_point
from cozyrag.commands.train import train

if __name__ == "__main__":
    entry_point(lambda: train(description=__doc__), prints=False)
