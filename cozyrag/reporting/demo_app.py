"""A web page to try a pair: answers with their passages, the sentences that the generator read, the effect of top-k.

Gradio serves the page and its API (`pip install "cozyrag[demo]"`). The page loads nothing from other servers: analytics
are off, fonts are those of the system, and a content security policy enforces it. Left out: answering (pipeline.py),
tags (templates.py), a folder for Hugging Face Spaces (hf_space.py).
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from cozyrag.errors import InputError
from cozyrag.pipeline import CozyRAG, Source
from cozyrag.reporting.run_reader import spread
from cozyrag.reporting.templates import render, stylesheet
from cozyrag.runtime.json_lines import read_json_lines
from cozyrag.runtime.old_names import evaluation_files
from cozyrag.runtime.terminal import one_line, say
from cozyrag.serving.known_hosts import KnownHosts

if TYPE_CHECKING:
    import gradio

EXAMPLES = 6
MOST_PASSAGES = 20  # end of the slider
DEPTHS = (1, 2, 4, 8, 16)
LONGEST = 4_000  # characters of a question
WAITING = 32  # questions; the next ones are refused
UPLOADS = ("/gradio_api/upload", "/upload")  # the page has no files to take
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
MEANING = {
    "dense": "cosine of question and passage",
    "bm25": "BM25 score of the passage for the question",
    "hybrid": "cosine of question and passage times its fusion weight, plus the BM25 score",
}


def serve(name: str, *, port: int | None = None, open_browser: bool = False) -> None:
    """Load a pair and serve its page on 127.0.0.1 until Ctrl-C.

    Raises:
        InputError: Gradio is missing, there is no pair of that name, or the port is taken.
    """
    gr = load_gradio()
    page = page_of(name)
    from starlette.middleware import Middleware

    try:
        with _without_proxies():
            page.launch(
                server_name="127.0.0.1",
                server_port=port,
                inbrowser=open_browser,
                share=False,
                prevent_thread_lock=True,
                app_kwargs={"middleware": [Middleware(KnownHosts, closed=UPLOADS), Middleware(_Policy)]},
                **look(gr),
            )
    except OSError as error:
        taken = port or "7860 and the next hundred"
        raise InputError(f"--port: expected a free port, found {taken} taken ({error}). Give another one.") from error
    say(f"{one_line(name)} answers at {page.local_url} (this machine only). Ctrl-C stops it.")
    page.block_thread()


@contextmanager
def _without_proxies() -> Iterator[None]:
    """Hide the proxies of the environment: Gradio asks its own server, on this machine, whether it runs.

    No proxy answers for this machine, and NO_PROXY does not help where a proxy is malformed or needs another package.
    """
    hidden = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)


def load_gradio() -> ModuleType:
    """Gradio without its analytics, which must be off before the import. Raises InputError if it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        with _without_proxies():  # the import makes clients that a malformed proxy stops
            import gradio
    except ImportError as error:
        raise InputError(
            f'Expected Gradio for the page, found none ({error}). Install it with: pip install "cozyrag[demo]"'
        ) from error
    return gradio


def page_of(name: str, examples: Sequence[str] | None = None, *, title: str | None = None) -> "gradio.Blocks":
    """The page of the pair in a folder or repository. `examples`: None: questions of the run's last evaluation."""
    pair, local = CozyRAG.from_pretrained(name), Path(name).is_dir()
    if examples is None:
        examples = evaluation_questions(Path(name)) if local else []
    return build_page(pair, name=title or (Path(name).resolve().name if local else name), examples=examples)


def look(gr: ModuleType) -> dict:
    """Arguments of `launch` for the appearance: system fonts, no links of Gradio."""
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}
    theme = gr.themes.Default(primary_hue="teal", **fonts)
    # White on the theme's teal has a contrast of 2.5; WCAG's level AA asks for 4.5, which its darker shades reach.
    theme = theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )
    return {"theme": theme, "css": stylesheet("demo.css"), "footer_links": [], "quiet": True, "ssr_mode": False}


def evaluation_questions(folder: Path) -> list[str]:
    """Some questions of the last evaluation in a run's folder, answered correctly and wrongly; empty without one."""
    files = evaluation_files(folder)
    if not files:
        return []
    rows = read_json_lines(files[max(files)])
    correct = spread([row for row in rows if row["em"]], EXAMPLES // 2)
    wrong = spread([row for row in rows if not row["em"]], EXAMPLES - len(correct))
    return [row["question"] for row in [*correct, *wrong]]


def build_page(pair: CozyRAG, *, name: str, examples: Sequence[str] = ()) -> "gradio.Blocks":
    """The page, ready to `launch(**look(gradio))`. Its API has one endpoint, `/ask`, which returns `answer_data`."""
    gr = load_gradio()
    count = len(pair.index.passages.ids)

    def show(question: str, top_k: float) -> tuple[str, str]:
        return answer_html(pair, question, int(top_k))

    def compare(question: str) -> str:
        return depths_html(pair, question)

    def ask(question: str, top_k: int | None = None) -> dict:
        return answer_data(pair, question, top_k)

    def opened(request):
        """The question of a link (?q=...) with its answer; without one the page stays as it is."""
        asked = request.query_params.get("q", "").strip()
        return (asked, *show(asked, min(pair.top_k, count))) if asked else [gr.skip()] * 3

    with gr.Blocks(title=f"{name} · CoZyRAG", analytics_enabled=False) as page:
        gr.HTML(render("masthead.html", name=name, passages=count, trained=pair.top_k))
        with gr.Row(equal_height=True):
            question = gr.Textbox(
                label="Question",
                placeholder="Ask about the passages",
                scale=5,
                min_width=300,
                autofocus=True,
                max_length=LONGEST,
            )
            button = gr.Button("Ask", variant="primary", scale=1, min_width=90)
        limits = (1, min(MOST_PASSAGES, count))
        top_k = gr.Slider(*limits, value=min(pair.top_k, count), step=1, label="Passages to read (top-k)")
        shelf = None
        if examples:
            shelf = gr.Examples([[text] for text in examples], [question], label="Questions it was evaluated on")
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
        page.queue(max_size=WAITING)
        opened.__annotations__ = {"request": gr.Request}  # by which Gradio knows what to give
        page.load(opened, None, [question, answer, sources], **one_at_a_time)
    return page


def answer_data(pair: CozyRAG, question: str, top_k: int | None = None) -> dict:
    """An answer as plain data: text, score, and its sources with the sentences that the generator read."""
    try:
        answer = pair.answer(_bounded(question), top_k=top_k)
    except InputError as error:
        return {"error": str(error)}
    sources = [
        {name: getattr(source, name) for name in ("id", "title", "score", "text")}
        | {"read": list(source.read), "metadata": dict(source.metadata)}
        for source in answer.passages
    ]
    return {"answer": answer.text, "score": answer.score, "sources": sources}


def answer_html(pair: CozyRAG, question: str, top_k: int) -> tuple[str, str]:
    """(answer, sources) as HTML; a question that is refused gets the reason in place of the answer."""
    if not question.strip():
        return render("refusal.html", message="Type a question, or choose one of the examples."), ""
    started = time.perf_counter()
    try:
        answer = pair.answer(_bounded(question), top_k=top_k)
    except InputError as error:
        return render("refusal.html", message=str(error)), ""
    seconds = time.perf_counter() - started
    best = max((source.score for source in answer.passages), default=0.0)
    how = {"pieces": pieces, "address": address, "meaning": MEANING[pair.searcher.mode]}
    sources = render("sources.html", answer=answer, best=best, **how)
    return render("answer.html", answer=answer, seconds=seconds), sources


def _bounded(question: str) -> str:
    """The question. Raises InputError for one that is too long; the page's own field does not take it."""
    if len(question) > LONGEST:
        raise InputError(f"Expected a question of at most {LONGEST:,} characters, found {len(question):,}. Shorten it.")
    return question


def address(source: Source) -> str:
    """Where a source can be read, if its metadata have a web address; else ""."""
    url = str(source.metadata.get("url", ""))
    return url if url.lower().startswith(("https://", "http://")) else ""


def pieces(source: Source, answer: str) -> Iterator[tuple[str, str]]:
    """A passage as ("left", text) outside the context, ("read", text) in it, and ("answer", text) in the latter."""
    wanted = re.compile(rf"(?<!\w)({re.escape(answer)})(?!\w)", re.IGNORECASE) if answer else None
    at = 0
    for start, end in source.used:
        yield "left", source.text[at:start]
        parts = wanted.split(source.text[start:end]) if wanted else [source.text[start:end]]
        yield from (("answer" if odd % 2 else "read", part) for odd, part in enumerate(parts) if part)
        at = end
    yield "left", source.text[at:]


def depths_html(pair: CozyRAG, question: str) -> str:
    """The answers to one question with few and many passages, as an HTML table."""
    if not question.strip():
        return render("refusal.html", message="Type a question first.")
    depths = [depth for depth in DEPTHS if depth <= len(pair.index.passages.ids)]
    try:
        rows = [(depth, pair.answer(_bounded(question), top_k=depth)) for depth in depths]
    except InputError as error:
        return render("refusal.html", message=str(error))
    return render("depths.html", rows=rows, context_tokens=pair.decoding.context_tokens)


class _Policy:
    """ASGI middleware that forbids the browser to contact any other server."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)
