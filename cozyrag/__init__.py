"""CoZyRAG: fine-tune a small retriever and a small generator together on your own questions and passages."""

import os
import sys

__version__ = "0.2.0"

if sys.platform == "darwin":
    # PyTorch and FAISS each bring an OpenMP runtime; on macOS the second one to load aborts the process without this.
    os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")

# oneDNN and PyTorch's layer over it each keep 1,024 kernels of bf16, over half a megabyte each, one for every shape of
# a product. Layers of a model share theirs, and the next batch has other shapes. Read at the first product.
for _name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_name, "64")

__all__ = ["Answer", "CozyRAG", "Source", "__version__", "train"]


def __getattr__(name: str):
    """`from cozyrag import CozyRAG` without paying for torch when only the version is wanted."""
    if name in ("Answer", "CozyRAG", "Source"):
        from cozyrag import pipeline

        return vars(pipeline)[name]
    if name == "train":
        from cozyrag import api

        return api.train
    raise AttributeError(f"module 'cozyrag' has no attribute {name!r}")
