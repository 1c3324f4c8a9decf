"""The demo page: its content, that untrusted text stays text, its API, and that it contacts no other server."""

import json
import os
import re
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import SimpleNamespace

import evaluated
import pytest
import tiny

from cozyrag import cli
from cozyrag.data.questions import read_questions
from cozyrag.errors import InputError
from cozyrag.pipeline import Answer, CozyRAG, Source
from cozyrag.reporting import demo_app
from cozyrag.reporting.demo_app import answer_data, answer_html, depths_html, evaluation_questions, pieces
from cozyrag.runtime.json_lines import append_json_line, end_last_line, read_json_lines

EVIL = (
    "<script>window.owned=1</script><img src=x onerror='window.owned=2'> "
    "{{#each x}} {{y}} ${window.owned=3} `t` </mark>."
)
TEXT = "The fox is red. It was made in 1500. Red is its house."


class FakePair:
    """Answers "red" from its first passage, except for some special questions."""

    top_k, decoding = 2, SimpleNamespace(context_tokens=60)
    index = SimpleNamespace(passages=SimpleNamespace(ids=[f"p{number}" for number in range(9)]))
    searcher = SimpleNamespace(mode="dense")

    def answer(self, question, *, top_k=None):
        if question.startswith("refuse"):
            raise InputError(question)
        k = self.top_k if top_k is None else top_k
        text = {"evil": EVIL, "silent": ""}.get(question, "red" if k < 4 else "blue")
        first = Source("p0", EVIL if question == "evil" else "Fox", TEXT, 0.9, ((0, 15), (37, 54)))
        others = tuple(Source(f"p{rank}", "", EVIL, 0.9 - rank / 10) for rank in range(1, k))
        return Answer(text, 0.876, "context", (first, *others))


# ---- content


def test_pieces_of_a_passage_mark_the_read_sentences_and_the_answer():
    source = Source("p", "Fox", TEXT, 1.0, ((0, 15), (37, 54)))
    assert list(pieces(source, "red")) == [
        ("left", ""), ("read", "The fox is "), ("answer", "red"), ("read", "."), ("left", " It was made in 1500. "),
        ("answer", "Red"), ("read", " is its house."), ("left", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("answer", ["", "red", "re", "not there", "(a+)+$", "1500"])
def test_pieces_put_together_are_the_passage(answer):
    source = Source("p", "Fox", TEXT, 1.0, ((0, 15), (37, 54)))
    found = list(pieces(source, answer))
    assert "".join(text for _, text in found) == TEXT
    assert [text for kind, text in found if kind == "answer"] == (["red", "Red"] if answer == "red" else [])


def test_an_answer_is_shown_with_its_sources():
    answer, sources, _ = answer_html(FakePair(), "what?", 3)
    assert re.search(r'class="cozy-text">red</p>', answer) and "<b>0.88</b>" in answer
    assert "read 2 sentences of 1 passage<" in answer
    assert "<mark>The fox is </mark><mark><strong>red</strong></mark>" in sources
    assert re.findall(r"score (\d\.\d\d)", sources) == ["0.90", "0.80", "0.70"]
    assert sources.count("no sentence of it was read") == 2 and "<h3>p1</h3>" in sources


def test_abstentions_and_refusals_are_shown():
    assert "No answer in these passages." in answer_html(FakePair(), "silent", 1)[0]
    assert "Type a question" in answer_html(FakePair(), "  ", 1)[0] and "Type a question" in depths_html(FakePair(), "")
    for page in (answer_html(FakePair(), "refuse <b>", 1)[0], depths_html(FakePair(), "refuse <b>")):
        assert "refuse &lt;b&gt;" in page and "<b>" not in page


def test_untrusted_text_is_escaped():
    for page in (*answer_html(FakePair(), "evil", 4)[:2], depths_html(FakePair(), "evil")):
        assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page


def test_depths_show_where_the_answer_changes():
    page = depths_html(FakePair(), "what?")
    assert re.findall(r"<td>(\d+)</td><td>([a-z]+)</td>", page) == [
        ("1", "red"),
        ("2", "red"),
        ("4", "blue"),
        ("8", "blue"),
    ]
    assert page.count('class="cozy-changed"') == 1


def test_the_api_returns_plain_data():
    found = answer_data(FakePair(), "what?", 1)
    [source] = found.pop("sources")
    assert found == {"answer": "red", "score": 0.876}
    assert source["id"] == "p0" and source["read"] == ["The fox is red.", "Red is its house."]
    assert answer_data(FakePair(), "refuse this") == {"error": "refuse this"}


def test_examples_are_evaluated_questions_correct_and_wrong_ones(tmp_path):
    rows = [evaluated.row(number, em=number % 10 == 0) for number in range(100)]
    found = evaluation_questions(evaluated.write_run(tmp_path / "run", [[evaluated.row(7, em=1)], rows]))
    correct = [question for question in found if question in {f"Question {number}?" for number in range(0, 100, 10)}]
    assert len(found) == len(set(found)) == demo_app.EXAMPLES and len(correct) == demo_app.EXAMPLES // 2
    assert evaluation_questions(tmp_path) == []


def test_examples_of_a_pair_that_is_never_correct(tmp_path):
    rows = [evaluated.row(number, em=0) for number in range(3)]
    assert len(evaluation_questions(evaluated.write_run(tmp_path / "run", [rows]))) == 3


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r'pip install "cozyrag\[demo\]"'):
        demo_app.load_gradio()


# ---- the page as it is served


@pytest.fixture(scope="module")
def served(tmp_path_factory, rated_file):
    """(address, names looked up) of the fake pair's page, served as `cozyrag demo` serves it."""
    pytest.importorskip("gradio")
    looked_up, ended = set(), []
    with pytest.MonkeyPatch.context() as patch:
        real = socket.getaddrinfo

        def noted(host, *args, **kwargs):
            looked_up.add(host)
            return real(host, *args, **kwargs)

        patch.setattr(socket, "getaddrinfo", noted)
        patch.setattr(CozyRAG, "from_pretrained", lambda name: FakePair())
        gr = demo_app.load_gradio()
        patch.setattr(gr.Blocks, "block_thread", lambda page: ended.append(page))
        rows = [evaluated.row(0, em=0, question=EVIL), evaluated.row(1, em=0, question="Is this an example?")]
        folder = evaluated.write_run(tmp_path_factory.mktemp("served") / "{{y}} ${1} <b>rag", [rows])
        patch.chdir(folder)
        demo_app.serve(str(folder), feedback=rated_file)
        [page] = ended
        yield page.local_url, looked_up
        assert sorted(path.name for path in folder.iterdir()) == ["evaluations", "metrics.jsonl", "settings.json"]
        page.close()


@pytest.fixture(scope="module")
def rated_file(tmp_path_factory):
    return tmp_path_factory.mktemp("rated") / "rated.jsonl"


def test_it_answers_on_this_machine_only_and_resolves_no_other_name(served):
    from gradio_client import Client

    address, looked_up = served
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    client = Client(address, verbose=False, httpx_kwargs={"timeout": tiny.PATIENCE})
    assert list(client.view_api(return_format="dict")["named_endpoints"]) == ["/ask"]
    assert client.predict("what?", api_name="/ask")["answer"] == "red"
    assert client.predict("what?", 5, api_name="/ask")["answer"] == "blue"
    assert {name.decode() if isinstance(name, bytes) else name for name in looked_up} <= {
        "127.0.0.1",
        "localhost",
        None,
    }


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("", {}, 200),
        ("", {"Host": "evil.example.org"}, 403),
        ("", {"Origin": "http://evil.example.org"}, 403),
        ("gradio_api/upload", {}, 403),
    ],
)
def test_only_its_own_pages_are_answered_and_nothing_is_uploaded(served, path, headers, status):
    httpx = pytest.importorskip("httpx")
    send = httpx.post if path else httpx.get
    assert send(served[0] + path, headers=headers, timeout=tiny.PATIENCE).status_code == status


def test_a_question_that_is_too_long_is_refused():
    long = "x" * (demo_app.LONGEST + 1)
    assert "at most 4,000 characters" in answer_data(FakePair(), long)["error"]
    assert "at most 4,000" in answer_html(FakePair(), long, 1)[0] and "at most 4,000" in depths_html(FakePair(), long)


def test_the_file_of_a_source_is_shown_as_text():
    class Placed(FakePair):
        def answer(self, question, *, top_k=None):
            sources = (Source(str(each), "Fox", TEXT, 0.9, ((0, 15),), each) for each in places)
            return Answer("red", 0.5, "c", tuple(sources))

    places = [{"source": "notes/<b>fox.md"}, {}, {"source": "a.pdf", "page": 3}, {"page": "<i>"}]
    page = answer_html(Placed(), "what?", 2)[1]
    shown = ["notes/&lt;b&gt;fox.md", "a.pdf, p. 3", "p. &lt;i&gt;"]
    assert re.findall(r'class="cozy-place">(.*?)</p>', page) == shown


@pytest.mark.parametrize(
    ("url", "linked"),
    [("https://x.org/<b>", True), ("HTTP://x.org", True), ("javascript:alert(1)", False), ("", False), (7, False)],
)
def test_a_source_is_linked_only_to_a_web_address(url, linked):
    class Linked(FakePair):
        def answer(self, question, *, top_k=None):
            return Answer("red", 0.5, "c", (Source("p0", "Fox", TEXT, 0.9, ((0, 15),), {"url": url}),))

    page = answer_html(Linked(), "what?", 1)[1]
    assert ("<a href=" in page) == linked and "<b>" not in page and "javascript:" not in page


def test_the_policy_forbids_other_servers(served):
    from urllib.request import urlopen

    with urlopen(served[0]) as reply:
        assert reply.headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert "fonts.googleapis" not in reply.read().decode()


@pytest.mark.parametrize(
    "proxies",
    [
        {"http_proxy": "http://127.0.0.1:9"},
        {"HTTP_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"all_proxy": "http://127.0.0.1:9", "no_proxy": "example.org"},
        {"https_proxy": "no proxy at all"},
        {"http_proxy": ""},
    ],
    ids=lambda proxies: " ".join(proxies),
)
def test_a_proxy_does_not_stop_the_page_and_stays_set(monkeypatch, proxies):
    gr = demo_app.load_gradio()
    pages = []
    monkeypatch.setattr(CozyRAG, "from_pretrained", lambda name: FakePair())
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda page: pages.append(page))
    for name, value in proxies.items():
        monkeypatch.setenv(name, value)
    demo_app.serve("user/name")
    assert {name: os.environ[name] for name in proxies} == proxies
    pages[0].close()


def test_a_busy_machine_has_its_page(monkeypatch):
    """Gradio by itself gives its server five seconds to start, and then three to send the page."""
    gr = demo_app.load_gradio()
    from gradio import http_server, networking

    pages, seconds = [], count(step=10)
    monkeypatch.setattr(CozyRAG, "from_pretrained", lambda name: FakePair())
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda page: pages.append(page))
    monkeypatch.setattr(networking, "url_ok", lambda url: False)
    monkeypatch.setattr(http_server, "time", SimpleNamespace(time=lambda: next(seconds), sleep=time.sleep))
    demo_app.serve("user/name")
    assert pages[0].is_running
    pages[0].close()


def test_a_port_that_is_taken_is_an_input_error(served, monkeypatch):
    monkeypatch.setattr(CozyRAG, "from_pretrained", lambda name: FakePair())
    with pytest.raises(InputError, match="--port: expected a free port"):
        demo_app.serve("user/name", port=int(served[0].rstrip("/").split(":")[-1]))


def test_the_page_of_a_real_pair_answers_as_the_pair_does(pair_folder):
    pytest.importorskip("gradio")
    page = demo_app.page_of(str(pair_folder))
    assert page.title == f"{pair_folder.name} · CoZyRAG"
    question, pair = tiny.corpus()[1][0]["question"], CozyRAG.from_pretrained(pair_folder)
    answer = pair.answer(question, top_k=2)
    assert answer_data(pair, question, 2)["answer"] == answer.text
    assert all(any(source.used) for source in answer.passages[:1])


# ---- the history of a session, and ratings


def asked(question="what?", answer="red", passage="p0"):
    return {"question": question, "shown": answer, "certainty": 0.5, "passage_id": passage}


def test_the_history_has_each_question_once_the_latest_first():
    history = []
    for number in (1, 2, 1, 3):
        history = demo_app.remembered(history, asked(f"q{number}", answer=f"a{len(history)}"))
    assert [(each["question"], each["shown"]) for each in history] == [("q3", "a2"), ("q1", "a2"), ("q2", "a1")]
    assert demo_app.remembered(history, None) == history  # a question that was refused
    for number in range(50):
        history = demo_app.remembered(history, asked(f"r{number}"))
    assert len(history) == demo_app.REMEMBERED and history[0]["question"] == "r49"


def test_what_was_asked_names_the_passage_with_the_answer_in_what_was_read():
    assert answer_html(FakePair(), " what? ", 3)[2] == asked() | {"certainty": 0.876}
    assert answer_html(FakePair(), "silent", 3)[2] == asked("silent", "", None) | {"certainty": 0.876}
    assert answer_html(FakePair(), "refuse this", 1)[2] is None and answer_html(FakePair(), " ", 1)[2] is None


def test_ratings_become_questions_for_training(tmp_path):
    file = tmp_path / "rated.jsonl"
    told = [
        demo_app.rate(file, "up", asked("Who\u2028was it?"), "not read"),
        demo_app.rate(file, "down", asked("When?", "1500"), " 1600 "),
        demo_app.rate(file, "down", asked("Where?"), ""),
        demo_app.rate(file, "up", asked("Why?", "", None), ""),
    ]
    assert [("Thank you" in note, *rest) for note, *rest in told] == [(True, None, "")] * 4
    with pytest.raises(InputError, match='line 3: its answer was rated .* add it as "correction"'):
        read_questions(str(file), needs_answer=False)
    cli.run("questions", [str(file), "--output", str(tmp_path / "q.jsonl"), "--no_answer", "--skip_bad_rows"])
    rows = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert [(row["question"], row["answers"], row.get("passage_id")) for row in rows] == [
        ("Who was it?", ["red"], "p0"),
        ("When?", ["1600"], None),
        ("Why?", [], None),
    ]


def test_an_answer_is_rated_once_and_only_after_it_was_shown(tmp_path):
    note, *rest = demo_app.rate(tmp_path / "rated.jsonl", "up", None, "typed")
    assert "Ask a question first" in note and rest == [None, "typed"] and not any(tmp_path.iterdir())


def test_a_rating_that_cannot_be_written_is_told_and_can_be_given_again(tmp_path):
    note, *rest = demo_app.rate(tmp_path / "none" / "rated.jsonl", "down", asked(), "typed")
    assert "cozy-refusal" in note and rest == [asked(), "typed"]


@pytest.mark.parametrize("before", ["", '{"a": 1}\n', '{"a": 1}'], ids=["new", "whole", "cut"])
def test_lines_of_several_processes_do_not_mix(tmp_path, before):
    file = tmp_path / "rated.jsonl"
    file.write_text(before)
    end_last_line(file)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: append_json_line(file, {"n": number, "t": "x" * 5000}), range(40)))
    rows = read_json_lines(file)
    assert sorted(row["n"] for row in rows if "n" in row) == list(range(40)) and len(rows) == 40 + bool(before)


@pytest.mark.parametrize("name", ["rated.txt", "none/rated.jsonl", "folder.jsonl"])
def test_a_file_for_ratings_is_checked_before_anything_is_loaded(tmp_path, monkeypatch, name):
    (tmp_path / "folder.jsonl").mkdir()
    monkeypatch.setattr(demo_app, "load_gradio", lambda: 1 / 0)
    with pytest.raises(InputError, match="--feedback"):
        demo_app.serve("user/name", feedback=tmp_path / name)


def test_without_the_option_the_page_has_no_ratings(tmp_path):
    pytest.importorskip("gradio")
    for feedback in (None, tmp_path / "rated.jsonl"):
        page = demo_app.build_page(FakePair(), name="n", feedback=feedback)
        labels = [getattr(block, "value", None) for block in page.blocks.values()]
        assert any(str(label).endswith("Wrong") for label in labels) == (feedback is not None)


def test_the_option_reaches_the_page(monkeypatch):
    given = []
    monkeypatch.setattr("cozyrag.reporting.demo_app.serve", lambda name, **options: given.append((name, options)))
    cli.run("demo", ["my-rag", "--feedback", "rated.jsonl"])
    assert given == [("my-rag", {"port": None, "open_browser": False, "feedback": "rated.jsonl"})]


@pytest.mark.parametrize("headers", [{"Host": "evil.example.org"}, {"Origin": "http://evil.example.org"}])
def test_another_site_rates_nothing(served, rated_file, headers):
    httpx = pytest.importorskip("httpx")
    body = {"data": [asked(), ""], "fn_index": 0, "session_hash": "x"}
    for number in range(12):  # whichever of the page's functions it is
        reply = httpx.post(
            served[0] + "gradio_api/queue/join",
            json=body | {"fn_index": number},
            headers=headers,
            timeout=tiny.PATIENCE,
        )
        assert reply.status_code == 403
    assert not rated_file.exists()


# ---- in a browser


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_a_question_is_typed_and_its_answer_read(served, rated_file, browser, scheme, width):
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    page.set_default_timeout(1000 * tiny.PATIENCE)
    hosts, faults = set(), []
    page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "//" in request.url else request.url[:5]))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(served[0])
    question = page.get_by_label("Question", exact=True)
    question.fill("what?")
    page.keyboard.press("Enter")
    answer = page.locator(".cozy-text")
    answer.wait_for()
    assert answer.inner_text() == "red" and page.locator("ol.cozy-sources li").count() == 2
    assert page.locator("mark strong").all_text_contents()[1:] == ["red", "Red"]  # the first is the legend's
    page.locator("input[type=range]").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.get_by_text("blue", exact=True).first.wait_for()
    page.wait_for_function(
        "document.querySelectorAll('ol.cozy-sources li').length == 5"
    )  # each step is answered by itself
    page.get_by_text("Is this an example?").click()
    page.wait_for_function("document.querySelector('label textarea, label input').value == 'Is this an example?'")
    question.fill("evil")
    page.get_by_role("button", name="Ask", exact=True).click()
    page.get_by_text("window.owned=1").first.wait_for()
    page.wait_for_function("document.querySelector('.cozy-text').innerText.includes('owned')")
    assert answer.inner_text() == EVIL and page.evaluate("window.owned") is None
    assert page.title().startswith("{{y}} ${1} <b>rag")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    history = page.locator("#cozy-history")
    assert "Is this an example?" in history.inner_text() and "window.owned" in history.inner_text()
    page.get_by_role("button", name="Right").click()
    page.get_by_text("Thank you").wait_for()
    assert read_json_lines(rated_file)[-1]["shown"] == EVIL and read_json_lines(rated_file)[-1]["rating"] == "up"
    history.get_by_text("Is this an example?").click()  # asked again
    page.wait_for_function("document.querySelector('.cozy-text').innerText == 'blue'")
    assert page.locator("details.cozy-fold").evaluate("each => each.open") == (width >= 600)
    page.get_by_text("Use it by API").click()
    assert page.locator(".cozy-origin").inner_text() == served[0]
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert hosts - {"data:", "blob:"} == {served[0].split("/")[2]} and faults == []
    page.goto(f"{served[0]}?q=what%3F")  # a link to a question answers it
    page.get_by_text("red", exact=True).first.wait_for()
    colours = "(e) => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor]"
    assert contrast(*page.get_by_role("button", name="Ask", exact=True).evaluate(colours)) >= 4.5
    page.close()


def contrast(*colours):
    """The contrast of two colours as CSS computes them: WCAG 2, of "rgb(r, g, b)"."""
    values = [[int(part) / 255 for part in re.findall(r"\d+", colour)[:3]] for colour in colours]
    linear = [[c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in each] for each in values]
    dark, light = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (light + 0.05) / (dark + 0.05)
