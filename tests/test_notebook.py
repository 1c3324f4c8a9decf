"""The notebook of examples/, cell by cell from top to bottom, with tiny models and few steps set by its own variables.

Left out: Jupyter itself, and the numbers of the real models, which docs/results.md has.
"""

import contextlib
import io
import json
from pathlib import Path

import pytest

from cozyrag.pipeline import CozyRAG

NOTEBOOK = Path(__file__).parents[1] / "examples" / "train.ipynb"
SMALL = {
    "rounds": 1, "generator_steps": 2, "retriever_steps": 1, "generator_batch_size": 4, "retriever_batch_size": 4,
    "max_questions": 16, "max_eval_questions": 6, "context_tokens": 48, "passage_tokens": 48, "answer_tokens": 4,
    "threads": 1, "use_cpu": True, "mixed_precision": "no",
}  # fmt: skip


def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_without_outputs():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells())


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(generator_path, retriever_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = {"generator": str(generator_path), "retriever": str(retriever_path)}
    monkeypatch.setenv("COZYRAG_SETTINGS", json.dumps(SMALL | models))
    monkeypatch.setenv("COZYRAG_LIMIT", "5")
    names, shown = {"__name__": "__main__"}, io.StringIO()
    with contextlib.redirect_stdout(shown):
        for cell in cells():
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert isinstance(names["pair"], CozyRAG) and names["found"].questions == 5
    assert "5 questions, 168 passages" in shown.getvalue() and "| min_certainty |" in shown.getvalue()
    loaded = CozyRAG.from_pretrained(tmp_path / "my-rag")
    assert loaded.answer("How long is the Nile in kilometres?").passages
