"""A web page to try a pair: answers with their passages, the sentences that the generator read, the effect of top-k.

Gradio serves the page and its API (`pip install "cozyrag[demo]"`). The page loads nothing from other servers: analytics
are off, fonts are those of the system, and a content security policy enforces it. Left out: answering (pipeline.py),
tags (templates.py), a folder for Hugging Face Spaces (hf_space.py).
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from cozyrag.errors import InputError
from cozyrag.pipeline import Answer, CozyRAG, Source
from cozyrag.reporting.extras import load_gradio, without_haste, without_proxies
from cozyrag.reporting.run_reader import spread
from cozyrag.reporting.templates import render, stylesheet
from cozyrag.runtime.json_lines import append_json_line, end_last_line, read_json_lines
from cozyrag.runtime.old_names import evaluation_files
from cozyrag.runtime.terminal import one_line, say
from cozyrag.serving.known_hosts import KnownHosts

if TYPE_CHECKING:
    import gradio

EXAMPLES = 6
MOST_PASSAGES = 20  # end of the slider
DEPTHS = (1, 2, 4, 8, 16)
LONGEST = 4_000  # characters of a question
REMEMBERED = 20  # questions of a session
WAITING = 32  # questions; the next ones are refused
UPLOADS = ("/gradio_api/upload", "/upload")  # the page has no files to take
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
# Run in the browser after each answer: sources are folded where a phone would have to scroll over them.
FOLD = """() => {
  document.querySelectorAll("details.cozy-fold").forEach((each) => { each.open = window.innerWidth >= 600; });
  document.querySelectorAll(".cozy-origin").forEach((each) => { each.textContent = location.origin + "/"; });
}"""
MEANING = {
    "dense": "cosine of question and passage",
    "bm25": "BM25 score of the passage for the question",
    "hybrid": "cosine of question and passage times its fusion weight, plus the BM25 score",
}


def serve(
    name: str, *, port: int | None = None, open_browser: bool = False, feedback: str | Path | None = None
) -> None:
    """Load a pair and serve its page on 127.0.0.1 until Ctrl-C. feedback: see `build_page`.

    Raises:
        InputError: Gradio is missing, there is no pair of that name, the port is taken, or ratings cannot be written.
    """
    file = None if feedback is None else _checked_file(Path(feedback))
    gr = load_gradio()
    page = page_of(name, feedback=file)
    from starlette.middleware import Middleware

    try:
        with without_proxies(), without_haste():
            page.launch(
                server_name="127.0.0.1",
                server_port=port,
                inbrowser=open_browser,
                share=False,
                _frontend=False,  # or a busy machine, whose page takes over three seconds, is told to have no localhost
                prevent_thread_lock=True,
                app_kwargs={"middleware": [Middleware(KnownHosts, closed=UPLOADS), Middleware(_Policy)]},
                **look(gr),
            )
    except OSError as error:
        taken = port or "7860 and the next hundred"
        raise InputError(f"--port: expected a free port, found {taken} taken ({error}). Give another one.") from error
    say(f"{one_line(name)} answers at {page.local_url} (this machine only). Ctrl-C stops it.")
    page.block_thread()


def _checked_file(path: Path) -> Path:
    """The file for ratings, absolute. Raises InputError before anything is loaded if it cannot be written."""
    if path.suffix != ".jsonl" or path.is_dir():
        raise InputError(f"--feedback {path}: expected a file that ends in .jsonl. Give another name.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--feedback {path}: there is no folder {path.absolute().parent}. Create it first.")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise InputError(f"--feedback {path}: no permission to write there. Give another name.")
    end_last_line(path)
    return path.absolute()


def page_of(
    name: str, examples: Sequence[str] | None = None, *, title: str | None = None, feedback: Path | None = None
) -> "gradio.Blocks":
    """The page of the pair in a folder or repository. `examples`: None: questions of the run's last evaluation."""
    pair, local = CozyRAG.from_pretrained(name), Path(name).is_dir()
    if examples is None:
        examples = evaluation_questions(Path(name)) if local else []
    shown = title or (Path(name).resolve().name if local else name)
    return build_page(pair, name=shown, examples=examples, feedback=feedback)


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


def build_page(
    pair: CozyRAG, *, name: str, examples: Sequence[str] = (), feedback: Path | None = None
) -> "gradio.Blocks":
    """The page, ready to `launch(**look(gradio))`. Its API has one endpoint, `/ask`, which returns `answer_data`.

    feedback: a JSON Lines file to which ratings of answers are appended; None: the page has no buttons for them.
    """
    gr = load_gradio()
    count = len(pair.index.passages.ids)
    usual = min(pair.top_k, count)

    def show(question: str, top_k: float, history: list[dict]) -> tuple:
        answer, sources, asked = answer_html(pair, question, int(top_k))
        history = remembered(history, asked)
        samples = [[each["question"], each["shown"] or "(no answer)"] for each in history]
        return answer, sources, asked, history, gr.Dataset(samples=samples, visible=bool(samples))

    def ask(question: str, top_k: int | None = None) -> dict:
        return answer_data(pair, question, top_k)

    def opened(request, history: list[dict]):
        """The question of a link (?q=...) with its answer; without one the page stays as it is."""
        asked = request.query_params.get("q", "").strip()
        return (asked, *show(asked, usual, history)) if asked else [gr.skip()] * 6

    with gr.Blocks(title=f"{name} · CoZyRAG", analytics_enabled=False) as page:
        gr.HTML(render("masthead.html", name=name, passages=count, trained=pair.top_k))
        question, button = _question_row(gr)
        top_k = gr.Slider(1, min(MOST_PASSAGES, count), value=usual, step=1, label="Passages to read (top-k)")
        shelf = None
        if examples:
            shelf = gr.Examples([[text] for text in examples], [question], label="Questions it was evaluated on")
        answer, asked, history = gr.HTML(), gr.State(None), gr.State([])
        if feedback is not None:
            _feedback_row(gr, asked, feedback)
        sources = gr.HTML()
        earlier = _history(gr)
        one_at_a_time = {"concurrency_id": "pair", "concurrency_limit": 1, "api_visibility": "private"}
        with gr.Accordion("The same question with fewer and more passages", open=False):
            depth_button, table = gr.Button("Compare", size="sm"), gr.HTML()
            depth_button.click(partial(depths_html, pair), [question], [table], **one_at_a_time)
        with gr.Accordion("Use it by API", open=False):
            gr.HTML(render("api.html", name=name, trained=usual))
        shown = [answer, sources, asked, history, earlier]
        wiring = {"fn": show, "inputs": [question, top_k, history], "outputs": shown, **one_at_a_time}
        fold = {"fn": None, "js": FOLD}
        gr.on([button.click, question.submit, top_k.change], trigger_mode="always_last", **wiring).then(**fold)
        if shelf is not None:
            shelf.load_input_event.then(**wiring).then(**fold)
        again = earlier.click(lambda row: row[0], [earlier], [question], api_visibility="private", queue=False)
        again.then(**wiring).then(**fold)
        gr.api(ask, api_name="ask", concurrency_id="pair", concurrency_limit=1)
        page.queue(max_size=WAITING)
        opened.__annotations__ = {"request": gr.Request}  # by which Gradio knows what to give
        page.load(opened, [history], [question, *shown], **one_at_a_time).then(**fold)
    return page


def _question_row(gr: ModuleType) -> tuple:
    """The field of the question and its button."""
    with gr.Row(equal_height=True):
        question = gr.Textbox(
            label="Question",
            placeholder="Ask about the passages",
            scale=5,
            min_width=300,
            autofocus=True,
            max_length=LONGEST,
        )
        return question, gr.Button("Ask", variant="primary", scale=1, min_width=90)


def _history(gr: ModuleType) -> "gradio.Dataset":
    """The list of earlier questions and answers, hidden while there are none."""
    return gr.Dataset(
        components=[gr.Textbox(visible=False), gr.Textbox(visible=False)],
        headers=["Question", "Answer"],
        samples=[],
        label="Asked in this session",
        visible=False,
        elem_id="cozy-history",
    )


def _feedback_row(gr: ModuleType, asked: "gradio.State", file: Path) -> None:
    """Two buttons and a field for the right answer; what they say of the answer in `asked` goes to the file."""
    with gr.Row(equal_height=True):
        up = gr.Button("\N{THUMBS UP SIGN} Right", size="sm", scale=1, min_width=90)
        down = gr.Button("\N{THUMBS DOWN SIGN} Wrong", size="sm", scale=1, min_width=90)
        hint = "The right answer, if it was wrong"
        field = {"label": hint, "show_label": False, "placeholder": hint, "container": False}
        correction = gr.Textbox(**field, max_length=LONGEST, scale=4, min_width=220)
    note = gr.HTML()
    alone = {"concurrency_id": "feedback", "concurrency_limit": 1, "api_visibility": "private"}
    for button, rating in ((up, "up"), (down, "down")):
        rated = partial(rate, file, rating)
        button.click(rated, [asked, correction], [note, asked, correction], **alone)


def rate(file: Path, rating: str, asked: dict | None, correction: str) -> tuple[str, dict | None, str]:
    """Append one rating of the answer last shown; returns a note, the answer still to rate, the field's content."""
    if asked is None:
        return render("rated.html", message="Ask a question first; each answer is rated once."), None, correction
    row = {"question": asked["question"], "rating": rating, "shown": asked["shown"], "certainty": asked["certainty"]}
    if rating == "down" and correction.strip():
        row["correction"] = correction.strip()[:LONGEST]
    if rating == "up" and asked["passage_id"]:
        row["passage_id"] = asked["passage_id"]
    try:
        append_json_line(file, row)
    except (InputError, OSError) as error:
        return render("refusal.html", message=str(error)), asked, correction
    return render("rated.html", message=f"Thank you. Your rating of “{asked['question']}” is in {file.name}."), None, ""


def remembered(history: Sequence[dict], asked: dict | None) -> list[dict]:
    """The questions of a session with their last answers, the latest first; `asked`: what was asked now, or None."""
    if asked is None:
        return list(history)
    return [asked, *(each for each in history if each["question"] != asked["question"])][:REMEMBERED]


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


def answer_html(pair: CozyRAG, question: str, top_k: int) -> tuple[str, str, dict | None]:
    """(answer, sources) as HTML and what was asked, for the history and ratings.

    A question that is refused gets the reason in place of the answer, and None.
    """
    if not question.strip():
        return render("refusal.html", message="Type a question, or choose one of the examples."), "", None
    started = time.perf_counter()
    try:
        answer = pair.answer(_bounded(question), top_k=top_k)
    except InputError as error:
        return render("refusal.html", message=str(error)), "", None
    seconds = time.perf_counter() - started
    best = max((source.score for source in answer.passages), default=0.0)
    how = {"pieces": pieces, "address": address, "meaning": MEANING[pair.searcher.mode]}
    sources = render("sources.html", answer=answer, best=best, **how)
    return render("answer.html", answer=answer, seconds=seconds), sources, _asked(question, answer)


def _asked(question: str, answer: Answer) -> dict:
    """The facts of an answer that a rating records; the passage is the first one read with the answer in it."""
    found = (each.id for each in answer.passages if any(kind == "answer" for kind, _ in pieces(each, answer.text)))
    facts = {"question": question.strip(), "shown": answer.text, "certainty": round(answer.score, 4)}
    return facts | {"passage_id": next(found, None)}


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
