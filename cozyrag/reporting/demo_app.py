"""A page to try a pair in the browser: ask, see the answer and what it was read from, and change how many passages are read.

Gradio makes the page and its API; it comes with `pip install "cozyrag[demo]"`. The page asks for nothing outside the machine it runs
on: analytics are off, fonts are the system's, and a content security policy holds the browser to it. Left out: answering
(pipeline.py), tags (templates.py), a folder for Hugging Face Spaces (hf_space.py).
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from cozyrag.errors import InputError
from cozyrag.pipeline import Answer, CozyRAG, Source
from cozyrag.reporting.run_reader import read_lines, spread
from cozyrag.reporting.templates import render, stylesheet
from cozyrag.runtime.old_names import evaluation_files

if TYPE_CHECKING:
    import gradio

EXAMPLES = 6
MOST_PASSAGES = 20  # end of the slider
DEPTHS = (1, 2, 4, 8, 16)
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
MEANING = {
    "dense": "cosine of the vectors of question and passage",
    "bm25": "BM25 score of the question's words in the passage",
    "hybrid": "cosine of question and passage, times the weight of the vectors, plus the BM25 score",
}


def serve(name: str, *, port: int | None = None, open_browser: bool = False) -> None:
    """Load a pair and show its page on this machine only, until Ctrl+C.

    Raises:
        InputError: no Gradio, no pair of that name, or the port is taken.
    """
    gr = load_gradio()
    page = page_of(name)
    from starlette.middleware import Middleware

    try:
        page.launch(
            server_name="127.0.0.1",
            server_port=port,
            inbrowser=open_browser,
            share=False,
            prevent_thread_lock=True,
            app_kwargs={"middleware": [Middleware(_Policy)]},
            **look(gr),
        )
    except OSError as error:
        raise InputError(
            f"--port: expected a free port, found {port or '7860 and the next hundred'} taken ({error}). Give another one."
        ) from error
    print(f"{name} answers at {page.local_url} (this machine only). Ctrl+C ends it.", flush=True)
    page.block_thread()


def load_gradio() -> ModuleType:
    """Gradio with its analytics switched off, which must happen before it is imported. Raises InputError if it is not there."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise InputError(
            f'Expected Gradio for the page, found none ({error}). Install it with: pip install "cozyrag[demo]"'
        ) from error
    return gradio


def page_of(name: str, examples: Sequence[str] | None = None, *, title: str | None = None) -> "gradio.Blocks":
    """The page of the pair in a folder or repository; its examples are questions it was examined with, where there are any."""
    pair, local = CozyRAG.from_pretrained(name), Path(name).is_dir()
    if examples is None:
        examples = evaluation_questions(Path(name)) if local else []
    return build_page(pair, name=title or (Path(name).resolve().name if local else name), examples=examples)


def look(gr: ModuleType) -> dict:
    """What `launch` is to be told about the looks: fonts that are there already, nothing of Gradio's own around the page."""
    theme = gr.themes.Default(
        primary_hue="teal",
        font=("system-ui", "sans-serif"),
        font_mono=("ui-monospace", "monospace"),
    )
    return {"theme": theme, "css": stylesheet("demo.css"), "footer_links": [], "quiet": True, "ssr_mode": False}


def evaluation_questions(folder: Path) -> list[str]:
    """Some questions of the last examination in a run's folder, right and wrong ones in turn; none where there is none."""
    files = evaluation_files(folder)
    if not files:
        return []
    rows = read_lines(files[max(files)])
    right = spread([row for row in rows if row["em"]], EXAMPLES // 2)
    wrong = spread([row for row in rows if not row["em"]], EXAMPLES - len(right))
    return [row["question"] for row in [*right, *wrong]]


def build_page(pair: CozyRAG, *, name: str, examples: Sequence[str] = ()) -> "gradio.Blocks":
    """The page, ready to `launch(**look(gradio))`. Its API has one entry, `/ask`, which gives what `asked` gives."""
    gr = load_gradio()
    count = len(pair.index.passages.ids)

    def show(question: str, top_k: float) -> tuple[str, str]:
        return shown(pair, question, int(top_k))

    def compare(question: str) -> str:
        return depths(pair, question)

    def ask(question: str, top_k: int | None = None) -> dict:
        return asked(pair, question, top_k)

    with gr.Blocks(title=f"{name} · CoZyRAG", analytics_enabled=False) as page:
        gr.HTML(render("masthead.html", name=name, passages=count, trained=pair.top_k))
        with gr.Row(equal_height=True):
            question = gr.Textbox(
                label="Question", placeholder="Ask about the passages", scale=5, min_width=300, autofocus=True
            )
            button = gr.Button("Ask", variant="primary", scale=1, min_width=90)
        top_k = gr.Slider(
            1, min(MOST_PASSAGES, count), value=min(pair.top_k, count), step=1, label="Passages to read (top-k)"
        )
        shelf = None
        if examples:
            shelf = gr.Examples([[text] for text in examples], [question], label="Questions it was examined with")
        answer, sources = gr.HTML(), gr.HTML()
        with gr.Accordion("The same question with fewer and more passages", open=False):
            depth_button = gr.Button("Compare", size="sm")
            table = gr.HTML()
        one_at_a_time = {"concurrency_id": "pair", "concurrency_limit": 1, "api_visibility": "private"}
        wiring = {"fn": show, "inputs": [question, top_k], "outputs": [answer, sources], **one_at_a_time}
        gr.on([button.click, question.submit, top_k.change], trigger_mode="always_last", **wiring)
        if shelf is not None:
            shelf.load_input_event.then(**wiring)
        depth_button.click(compare, [question], [table], **one_at_a_time)
        gr.api(ask, api_name="ask", concurrency_id="pair", concurrency_limit=1)
    return page


def asked(pair: CozyRAG, question: str, top_k: int | None = None) -> dict:
    """One answer as plain data: text, score, and its sources with the sentences that were read."""
    try:
        answer = pair.answer(question, top_k=top_k)
    except InputError as error:
        return {"error": str(error)}
    return {
        "answer": answer.text,
        "score": answer.score,
        "sources": [
            {
                "id": source.id,
                "title": source.title,
                "score": source.score,
                "text": source.text,
                "read": [source.text[start:end] for start, end in source.used],
            }
            for source in answer.passages
        ],
    }


def shown(pair: CozyRAG, question: str, top_k: int) -> tuple[str, str]:
    """One answer as HTML: (the answer, its sources). What cannot be asked is said in the answer's place."""
    if not question.strip():
        return render("refusal.html", message="Type a question, or choose one of the examples."), ""
    started = time.perf_counter()
    try:
        answer = pair.answer(question, top_k=top_k)
    except InputError as error:
        return render("refusal.html", message=str(error)), ""
    read = [source for source in answer.passages if source.used]
    best = max((source.score for source in answer.passages), default=0.0)
    facts = render(
        "answer.html",
        text=answer.text,
        score=answer.score,
        sentences=sum(len(source.used) for source in read),
        passages=len(read),
        seconds=time.perf_counter() - started,
    )
    sources = [
        {
            "title": source.title or source.id,
            "score": source.score,
            "share": 100 * max(source.score, 0.0) / best if best > 0 else 0.0,
            "read": bool(source.used),
            "pieces": list(pieces(source, answer.text)),
        }
        for source in answer.passages
    ]
    return facts, render("sources.html", sources=sources, meaning=MEANING[pair.searcher.mode])


def pieces(source: Source, answer: str) -> Iterator[tuple[str, str]]:
    """A passage cut into ("left", text), ("read", text) and ("answer", text): not read, read, the answer's words in what was read."""
    wanted = re.compile(rf"(?<!\w)({re.escape(answer)})(?!\w)", re.IGNORECASE) if answer else None
    at = 0
    for start, end in source.used:
        yield "left", source.text[at:start]
        parts = wanted.split(source.text[start:end]) if wanted else [source.text[start:end]]
        yield from (("answer" if odd % 2 else "read", part) for odd, part in enumerate(parts) if part)
        at = end
    yield "left", source.text[at:]


def depths(pair: CozyRAG, question: str) -> str:
    """The answers to one question with few and many passages, as an HTML table."""
    if not question.strip():
        return render("refusal.html", message="Type a question first.")
    rows: list[dict] = []
    for top_k in (depth for depth in DEPTHS if depth <= len(pair.index.passages.ids)):
        try:
            answer = pair.answer(question, top_k=top_k)
        except InputError as error:
            return render("refusal.html", message=str(error))
        rows.append(_depth(top_k, answer) | {"changed": bool(rows) and rows[-1]["text"] != answer.text})
    return render("depths.html", rows=rows, context_tokens=pair.decoding.context_tokens)


def _depth(top_k: int, answer: Answer) -> dict:
    return {
        "top_k": top_k,
        "text": answer.text,
        "score": answer.score,
        "sentences": sum(len(source.used) for source in answer.passages),
        "titles": [source.title or source.id for source in answer.passages if source.used],
    }


class _Policy:
    """ASGI middleware: tells the browser to ask this server and nobody else."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)
