"""From questions to contexts: sentences, the filter, positives and hard negatives, and the table, with real FAISS.

Only token counts (words) and question vectors (angles on a circle) are stand-ins.
"""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from cozyrag.config import parse_settings
from cozyrag.data.matching import contains_answer, matching_form
from cozyrag.data.questions import features, read_questions
from cozyrag.data.sentences import split_sentences
from cozyrag.models.generator import Generator
from cozyrag.models.retriever import Retriever
from cozyrag.retrieval.bm25 import LexicalIndex, SentenceWords
from cozyrag.retrieval.contexts import (
    CONTEXT_FEATURES,
    MEASURED_FEATURES,
    SEARCH_DEPTH,
    ContextBuilder,
    attach_contexts,
    sentence_source,
)
from cozyrag.retrieval.hybrid import Searcher
from cozyrag.retrieval.passage_index import PassageIndex, Passages
from cozyrag.training.training_pairs import retriever_batch, training_pairs


def count_words(texts):
    return [len(text.split()) for text in texts]


def context_of(builder, question, rows):
    """The context of one question."""
    return builder.contexts([question], [rows])[0]


def builder_of(*texts, titles=None, top_k=9, budget=99, hard_negatives=0, count_tokens=count_words):
    passages = Passages([f"p{row}" for row in range(len(texts))], titles or [""] * len(texts), list(texts))
    return ContextBuilder(passages, count_tokens, top_k=top_k, budget=budget, hard_negatives=hard_negatives)


# ---- sentences ----


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("It costs 5.60 m. in all. 1815 was wet.", ["It costs 5.60 m. in all.", "1815 was wet."]),
        ("e.g. this stays. Élan starts. Ärger too.", ["e.g. this stays.", "Élan starts.", "Ärger too."]),
        (
            'He said "Go." She (who knew.) "Went!" Then [he.]\u2019 Slept.',
            ['He said "Go."', "She (who knew.)", '"Went!"', "Then [he.]\u2019", "Slept."],
        ),
        (
            "“Nie.” „Doch.\u201d (He left.)  \u201cSo.\u201d",
            ["“Nie.”", "„Doch.\u201d", "(He left.)", "\u201cSo.\u201d"],
        ),
        ("no stop\nnew line\n\nThird", ["no stop", "new line", "Third"]),
        ("好。 1 好！ B", ["好。", "1 好！", "B"]),
        ("One", ["One"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_sentences_end_where_a_new_one_starts(text, sentences):
    assert split_sentences(text) == sentences


@settings(deadline=None)  # a busy machine must not fail the test
@given(st.text(st.sampled_from("aB1.!? \n\"')”(“é。"), max_size=40))
def test_splitting_loses_nothing_but_space(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())


# ---- the filter ----


def test_filter_keeps_the_answer_sentence_within_the_budget():
    filler = [f"Nothing much happens on day {day}." for day in range(12)]
    text = " ".join([*filler[:8], "The zebra moved to Oslo.", *filler[8:]])
    builder = builder_of(text, *["Nothing much happens here."] * 3, budget=5)
    assert context_of(builder, "Where did the zebra move?", [1, 0, 2, 3]) == "The zebra moved to Oslo."


# four passages: the rarity of a word in all of them is log(1 + 4/4) = 0.69, of a word in one log(1 + 4/1) = 1.61
@pytest.mark.parametrize(
    ("question", "kept"),
    [
        ("old men: zebra?", "A zebra ran."),  # 2 * 0.69 < 1.61: the rare word wins
        ("very old men: zebra?", "Very old men."),  # 3 * 0.69 > 1.61
        ("old men: ZEBRA zebra unheard?", "A zebra ran."),  # case and repeats do not count, unknown words have rarity 0
    ],
)
def test_words_are_weighted_by_their_rarity(question, kept):
    others = ["Very old men."] * 3
    assert context_of(builder_of("Very old men. A zebra ran.", *others, budget=3), question, [0]) == kept


def test_titles_count_as_words_of_their_passage():
    words = SentenceWords(["zebra", ""], [["Old men."], ["A zebra."]])
    assert words.rarity_of("zebra") == pytest.approx(math.log(1 + 2 / 2))
    assert words.rarity_of("men") == pytest.approx(math.log(1 + 2 / 1))
    assert words.rarity_of("unheard") == 0


def test_sentences_keep_their_original_order():
    first, second = "Alpha came. Beta went. Gamma stayed.", "Delta slept. Epsilon woke."
    builder = builder_of(first, second, budget=6)
    assert context_of(builder, "gamma epsilon alpha", [0, 1]) == "Alpha came. Gamma stayed.\nEpsilon woke."
    assert context_of(builder, "gamma epsilon alpha", [1, 0]) == "Epsilon woke.\nAlpha came. Gamma stayed."


def test_only_the_top_k_passages_compete():
    texts = ["Alpha came.", "Beta went.", "Zebra ran."]
    assert context_of(builder_of(*texts, top_k=2), "zebra", [0, 1, 2]) == "Alpha came.\nBeta went."
    assert context_of(builder_of(*texts, top_k=2, budget=2), "zebra", [0, 2, 1]) == "Zebra ran."


def test_ties_go_to_the_better_passage_and_its_beginning():
    texts = ["Alpha came. Beta went.", "Gamma ate. Delta slept."]
    assert context_of(builder_of(*texts, budget=2), "unrelated", [1, 0]) == "Gamma ate."
    assert context_of(builder_of(*texts, budget=6), "unrelated", [1, 0]) == "Gamma ate. Delta slept.\nAlpha came."


@pytest.mark.parametrize(
    ("budget", "context"),
    [
        (9, "Long zebra tale of many a word.\nBeta ran."),  # 7 + 2 words
        (8, "Long zebra tale of many a word."),
        (5, "Long zebra tale of many a word."),  # the best sentence is always kept; prompts.py truncates it
    ],
)
def test_sentences_over_the_budget_are_left_out(budget, context):
    builder = builder_of("Long zebra tale of many a word.", "Beta ran.", budget=budget)
    assert context_of(builder, "zebra", [0, 1]) == context


def test_a_shorter_sentence_can_fill_the_rest_of_the_budget():
    builder = builder_of("Zebra oslo ran. Zebra slept all day long. Beta ran.", "Gamma ate.", budget=5)
    assert context_of(builder, "zebra oslo", [0, 1]) == "Zebra oslo ran. Beta ran."


# a title of 6 letters is estimated at 6 // 3 + 2 = 4 tokens, once per passage; each sentence has 3
@pytest.mark.parametrize(
    ("budget", "context"),
    [
        (7, "AB CDE: Alpha came home."),
        (9, "AB CDE: Alpha came home."),
        (10, "AB CDE: Alpha came home. Beta went home."),
        (12, "AB CDE: Alpha came home. Beta went home."),
        (13, "AB CDE: Alpha came home. Beta went home.\nGamma ate home."),
    ],
)
def test_titles_are_added_once_and_cost_tokens(budget, context):
    builder = builder_of("Alpha came home. Beta went home.", "Gamma ate home.", titles=["AB_CDE", ""], budget=budget)
    assert context_of(builder, "unrelated", [0, 1]) == context


def test_without_passages_the_context_is_empty():
    assert context_of(builder_of("Alpha."), "alpha", []) == ""
    assert context_of(builder_of("", "Alpha."), "alpha", [0]) == ""


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.lists(st.sampled_from(["fox", "owl", "is", "the"]), max_size=6), max_size=5), min_size=1, max_size=5
    ),
    st.integers(1, 25),
    st.randoms(use_true_random=False),
)
def test_context_is_the_best_subset_in_order(passages, budget, chance):
    """Sentences are unique. The kept ones fit, keep their order, and leave no room for a dropped one."""
    numbers = iter(range(1000))
    sentences = [[" ".join([f"S{next(numbers)}", *words]) + "." for words in passage] for passage in passages]
    rows = list(range(len(passages)))
    chance.shuffle(rows)
    builder = builder_of(*[" ".join(passage) for passage in sentences], budget=budget)
    kept = [
        sentence
        for line in context_of(builder, "Is the fox here?", rows).split("\n")
        for sentence in split_sentences(line)
    ]
    candidates = [sentence for row in rows for sentence in sentences[row]]
    assert kept == [sentence for sentence in candidates if sentence in kept]
    room = budget - sum(count_words(kept))
    assert room >= 0 or len(kept) == 1
    assert all(count_words([sentence])[0] > room for sentence in candidates if sentence not in kept)

    def score(sentence):
        return sum(
            map(builder._sentence_words.rarity_of, sorted({"is", "the", "fox"} & set(sentence.rstrip(".").split())))
        )

    ranks = [rank for rank, row in enumerate(rows) for _ in sentences[row]]
    points = np.array([score(sentence) for sentence in candidates])
    points = (points - points.mean()) / points.std() if len(points) and points.std() else 0 * points
    points = [each - 0.6 * min(rank, 3) for each, rank in zip(points, ranks, strict=True)]
    near = [sentence for each, sentence in zip(points, candidates, strict=True) if each > max(points) - 1e-9]
    assert not kept or set(near) & set(kept)


def test_earlier_passages_are_preferred_up_to_the_fourth():
    """The same words score lower in a passage of a later rank; a sentence with more of them still wins."""
    texts = ["None here.", "A fox.", "A fox.", "A fox, a grey fox."] + ["A fox."] * 3
    builder = builder_of(*texts, budget=2)
    assert context_of(builder, "fox", [2, 1]) == context_of(builder, "fox", [1, 2]) == "A fox."
    scores = builder._scores("grey fox", [0, 1, 2, 4, 5, 6], [["One."]] * 6, [])
    assert scores[1] - scores[2] == pytest.approx(0.6) and scores[2] - scores[3] == pytest.approx(0.6)
    assert scores[3] == scores[4] == scores[5] > scores[0]
    assert context_of(builder_of(*texts, budget=5), "grey fox", [1, 2, 4, 3]) == "A fox, a grey fox."


def cosine_builder(score_by, vectors, *texts, **more):
    """A builder whose sentences have these vectors (one list for each text)."""

    def sentence_vectors(rows):
        return [np.array(vectors[row], dtype=np.float16).reshape(-1, 2) for row in rows]

    return replace(builder_of(*texts, **more), score_by=score_by, sentence_vectors=sentence_vectors)


EAST, NORTH, UNREAD = (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)


def test_the_dense_filter_keeps_the_sentence_nearest_to_the_question():
    texts = ["The zebra ran. Its home is Oslo."], [[NORTH, EAST]]
    for score_by, kept in (("sparse", "The zebra ran."), ("dense", "Its home is Oslo.")):
        builder = cosine_builder(score_by, texts[1], *texts[0], budget=4)
        assert builder.contexts(["zebra"], [[0]], np.array([EAST])) == [kept]


def test_the_hybrid_filter_adds_z_scores():
    """Overlaps and cosines of four sentences by hand: each alone prefers another sentence than the sum does."""
    texts = ["Zebra oslo. Zebra ran. Nothing else. Void here."]
    cosines = np.array([0.1, 0.8, 0.9, 0.0])
    vectors = [[(c, math.sqrt(1 - c * c)) for c in cosines]]
    builder = cosine_builder("hybrid", vectors, *texts, budget=2)
    zebra, oslo = (math.log(1 + 1 / 1) for _ in range(2))  # one passage
    overlap = np.array([zebra + oslo, zebra, 0.0, 0.0])
    total = sum((values - values.mean()) / values.std() for values in (overlap, cosines))
    assert (int(overlap.argmax()), int(cosines.argmax()), int(total.argmax())) == (0, 2, 1)
    assert builder.contexts(["zebra oslo"], [[0]], np.array([EAST])) == ["Zebra ran."]


def test_a_sentence_without_a_vector_gets_the_mean_score():
    builder = cosine_builder("dense", [[NORTH, UNREAD, EAST]], "Alpha ran. Beta ran. Gamma ran.", budget=4)
    assert builder.contexts(["x"], [[0]], np.array([EAST])) == ["Beta ran. Gamma ran."]


def test_with_equal_vectors_words_decide():
    builder = cosine_builder("hybrid", [[EAST, EAST]], "Alpha ran. Zebra ran.", budget=2)
    assert builder.contexts(["zebra"], [[0]], np.array([EAST])) == ["Zebra ran."]


def test_sentence_vectors_are_requested_once_per_batch_for_the_top_k_only():
    asked = []
    builder = cosine_builder("hybrid", [[EAST]] * 3, "Alpha ran.", "Beta ran.", "Gamma ran.", top_k=2)
    of = builder.sentence_vectors
    builder = replace(builder, sentence_vectors=lambda rows: asked.append(list(rows)) or of(rows))
    contexts = builder.contexts(["alpha", "beta"], [[1, 0, 2], [0, 1, 2]], np.array([EAST, EAST]))
    assert asked == [[0, 1]]
    assert contexts == ["Beta ran.\nAlpha ran.", "Alpha ran.\nBeta ran."]


def test_without_passages_no_vectors_are_requested():
    assert cosine_builder("hybrid", [], "Alpha.").contexts(["x"], [[]], np.array([EAST])) == [""]


def test_sentence_vectors_computed_when_needed_equal_those_of_the_index(retriever_path, tmp_path):
    retriever = Retriever.load(str(retriever_path))
    passages = [{"id": f"p{i}", "title": f"T {i}", "text": f"The fox {i} is red. It ran home."} for i in range(3)]
    table = Dataset.from_list(passages)
    columns = Passages.of(table)
    vectors, sentences = retriever.encode_passages(columns.to_read(), columns.spans(range(3)), batch_size=2)
    kept = PassageIndex(table, vectors, fingerprint=retriever.fingerprint(), sentences=sentences)
    kept.save(tmp_path)
    kept = PassageIndex.load(tmp_path, fingerprint=retriever.fingerprint())
    bare = PassageIndex(table, vectors, fingerprint=retriever.fingerprint())
    for one, other in zip(
        sentence_source(kept, retriever)([2, 0]), sentence_source(bare, retriever)([2, 0]), strict=True
    ):
        assert one.shape == (2, 32)
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=2e-3)


def test_an_unknown_filter_is_refused():
    with pytest.raises(ValueError, match="sparse, dense, hybrid"):
        ContextBuilder(Passages([], [], []), count_words, top_k=1, budget=1, score_by="magic")


def test_budget_is_counted_in_the_tokens_of_the_generator(generator_path):
    generator = Generator.load(str(generator_path))
    text = "The fox 0 is red. It was made in 1500. People of village 0 keep the fox 0 in a house of stone."
    sentences = split_sentences(text)
    lengths = [len(generator.tokenizer.encode(f" {sentence}")) for sentence in sentences]
    both = lengths[0] + lengths[1]
    for budget, kept in ((both, sentences[:2]), (both - 1, sentences[:1])):
        builder = builder_of(text, budget=budget, count_tokens=generator.count_tokens)
        assert context_of(builder, "unrelated", [0]) == " ".join(kept)


# ---- positives and hard negatives ----


def test_answers_match_as_whole_normalised_words():
    builder = builder_of("It was The Red-Fox, in 1815!", "A redfox.")
    assert builder.holds_answer(0, ["redfox"])  # the SQuAD normaliser drops hyphens
    assert builder.holds_answer(0, ["nothing", "a 1815."])
    assert not builder.holds_answer(0, ["181"])
    assert not builder.holds_answer(1, ["fox"])
    assert not builder.holds_answer(0, ["the", ""])
    assert not builder.holds_answer(0, [])


@pytest.mark.parametrize(
    ("gold", "ranking", "answers", "positive"),
    [
        (3, [0, 1, 2], ["red"], 3),  # gold, though not found and without the answer
        (0, [1, 2], ["blue"], 0),
        (-1, [3, 2, 0, 1], ["red"], 2),  # the best-ranked that holds an answer, not the first row
        (-1, [3, 0, 2, 1], ["red"], 0),
        (-1, [3, 1, 0], ["purple", "blue"], 1),  # any of the answers
        (-1, [3, 1], ["red"], -1),  # never a mere top hit
        (-1, [0, 1], [], -1),
        (-1, [], ["red"], -1),
    ],
)
def test_positive_is_gold_else_the_best_answer_holder_else_none(gold, ranking, answers, positive):
    builder = builder_of("A red fox.", "A blue river.", "The red owl.", "Nothing.")
    assert builder.positive(gold, ranking, answers) == positive


def negatives_of(ranking, *, holders=(), positive=-1, count=1):
    texts = ["The zebra." if row in holders else "Nothing." for row in range(max(ranking) + 1)]
    return builder_of(*texts, hard_negatives=count).negatives(positive, [ranking], ["zebra"])


@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_negatives_come_from_ranks_4_to_60(count):
    ranking = list(range(100, 200))
    assert negatives_of(ranking, count=count) == ranking[3:60][:count]


def test_negatives_stop_at_rank_60():
    ranking = list(range(100))
    assert negatives_of(ranking, holders=range(58), count=9) == [58, 59]
    assert negatives_of(ranking, holders=range(60), count=9) == []
    assert negatives_of([5, 6, 7], count=9) == []
    assert SEARCH_DEPTH == 60


@settings(deadline=None)
@given(st.permutations(range(70)), st.sets(st.integers(0, 69)), st.integers(-1, 69), st.integers(0, 8))
def test_negatives_hold_no_answer_and_are_not_the_positive(ranking, holders, positive, count):
    allowed = [row for rank, row in enumerate(ranking, 1) if 4 <= rank <= 60 and row not in holders and row != positive]
    assert negatives_of(ranking, holders=holders, positive=positive, count=count) == allowed[:count]


def test_negatives_of_two_rankings_come_from_both_in_turn_and_once_each():
    builder = builder_of(*["Nothing."] * 20, hard_negatives=4)
    assert builder.negatives(5, [list(range(10)), [9, 8, 7, 3, 5, 6, 4, 0]], ["zebra"]) == [3, 4, 6, 7]


# ---- the contexts table ----

TEXTS = [
    "The fox is red. It eats fish.", "A river is blue.", "The owl is grey. It sees red mice.", "The tower is old.",
    "A lamp is on.", "The engine is blue. It runs.", "A castle is big.", "The garden is green.",
]  # fmt: skip
TITLES = ["Fox", "", "Grey_owl", "", "", "", "", ""]
ANGLES = {"What colour is the fox?": 0, "What is blue?": 70, "Who knows?": 0, "Is there an answer?": 40}  # degrees


def on_circle(degrees):
    radians = np.deg2rad(np.array(degrees, dtype=np.float64))
    return np.stack([np.cos(radians), np.sin(radians)], axis=1).astype(np.float32)


def index_of(size=8):
    """Passage i at 10 i degrees, or closer together for more of them."""
    texts, titles = TEXTS + ["More."] * (size - len(TEXTS)), TITLES + [""] * (size - len(TITLES))
    table = Dataset.from_dict({"id": [f"p{row}" for row in range(size)], "title": titles, "text": texts})
    return PassageIndex(table, on_circle(np.arange(size) * 80 / size), fingerprint="f")


def questions():
    columns = {
        "id": ["a", "b", "c", "d"],
        "question": list(ANGLES),
        "answers": [["Red!"], ["purple", "blue"], ["nobody"], []],
        "passage_id": ["p0", None, "gone", "p1"],
        "negative_ids": [[], [], [], []],
    }
    return Dataset.from_dict(columns, features=features())


def attached(
    asked=None,
    *,
    index=None,
    encode=lambda texts: on_circle([ANGLES[text] for text in texts]),
    fingerprint="name",
    batch_size=512,
    noise=0.0,
    noise_seed="",
    **limits,
):
    index = index or index_of()
    builder = ContextBuilder(index.passages, count_words, **{"top_k": 2, "budget": 6, "hard_negatives": 2} | limits)
    return attach_contexts(
        questions() if asked is None else asked,
        search=lambda texts: Searcher(index, None, encode=encode, mode="dense").search(texts, SEARCH_DEPTH),
        builder=builder,
        fingerprint=fingerprint,
        batch_size=batch_size,
        noise=noise,
        noise_seed=noise_seed,
    )


def test_table_by_hand():
    table = attached()
    assert table.features == CONTEXT_FEATURES
    asked = questions().remove_columns("negative_ids")
    assert {name: table[name][:] for name in asked.column_names} == asked[:]
    columns = table[:]
    # from 70 degrees: 7, then 6, 5, ...; from 40: 4, then 3 and 5, both at 10 degrees
    assert columns["rows"][:3] == [list(range(8)), list(range(8))[::-1], list(range(8))]
    assert columns["rows"][3][0] == 4
    assert set(columns["rows"][3][1:3]) == {3, 5}
    assert columns["gold_row"] == [0, -1, -1, 1]
    assert columns["positive"] == [0, 5, -1, 1]
    # ranks 4 and later: 3 4 5 ... (2 holds "red" but ranks third); 4 3 2 ... (1 and 5 hold "blue"); no positive; not 1
    assert columns["negatives"][:3] == [[3, 4], [4, 3], []]
    assert len(columns["negatives"][3]) == 2
    assert 1 not in columns["negatives"][3]
    assert columns["context"][0] == "Fox: The fox is red."  # 4 words and 3 for the title leave no room
    assert columns["context"][1] == "The garden is green."  # found 7 and 6: 4 words, and 4 more
    assert columns["answer_in_context"] == [True, False, False, False]


def test_a_measured_table_has_the_rank_of_the_positive_in_each_search():
    index, encode = index_of(), lambda texts: on_circle([ANGLES[text] for text in texts])
    searcher = Searcher(index, LexicalIndex(index.passages.to_read()), encode=encode, mode="hybrid")
    builder = ContextBuilder(index.passages, count_words, top_k=2, budget=6, hard_negatives=2)
    options = {"builder": builder, "fingerprint": "name"}
    table = attach_contexts(questions(), search=lambda t: searcher.each_search(t, 60), measured=True, **options)
    assert table.features == MEASURED_FEATURES
    plain = attach_contexts(questions(), search=lambda texts: searcher.search(texts, 60), **options)
    shared = [name for name in CONTEXT_FEATURES if name != "negatives"]
    assert {name: table[name][:] for name in shared} == {name: plain[name][:] for name in shared}
    asked, ranks = questions()[:], table["ranks"][:]
    lists = searcher.each_search(asked["question"], 60).lists
    for number, (answers, gold) in enumerate(zip(asked["answers"], asked["passage_id"], strict=True)):
        for name, rows in lists.items():
            relevant = [
                f"p{row}" == gold if gold else contains_answer(matching_form(index.passages.texts[row]), answers)
                for row in rows[number]
            ]
            assert ranks[number][name] == (relevant.index(True) + 1 if any(relevant) else 0)
    assert [row["dense"] for row in ranks][:3] == [1, 3, 0]  # the angles by hand: see test_table_by_hand
    empty = attach_contexts(
        questions().select([]), search=lambda t: searcher.each_search(t, 60), measured=True, **options
    )
    assert empty.features == MEASURED_FEATURES


def test_a_search_that_was_not_made_has_no_rank():
    index = index_of()
    searcher = Searcher(index, None, encode=lambda texts: on_circle([ANGLES[text] for text in texts]), mode="dense")
    table = attach_contexts(
        questions(),
        search=lambda texts: searcher.each_search(texts, 60),
        builder=ContextBuilder(index.passages, count_words, top_k=2, budget=6),
        fingerprint="name",
        measured=True,
    )
    assert [row["sparse"] for row in table["ranks"]] == [row["hybrid"] for row in table["ranks"]] == [None] * 4


def test_scores_are_cosines_best_first():
    expected = np.cos(np.deg2rad(np.arange(8) * 10))
    scores = attached()[:]["scores"]
    np.testing.assert_allclose(scores[0], expected, atol=1e-6)
    np.testing.assert_allclose(scores[1], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("budget", "context", "held"),
    [(99, "The garden is green.\nA castle is big.\nThe engine is blue. It runs.", True),
     (4, "The engine is blue.", True), (3, "The engine is blue.", True)],
)  # fmt: skip
def test_answer_in_context_depends_on_the_context_only(budget, context, held):
    table = attached(top_k=3, budget=budget)
    assert table[1]["context"] == context
    assert table[1]["answer_in_context"] is held


def test_an_answer_the_filter_dropped_is_not_in_the_context():
    table = attached(
        Dataset.from_dict({"id": ["a"], "question": ["What is blue?"], "answers": [["runs"]], "passage_id": ["p5"]}),
        top_k=3,
        budget=4,
    )
    assert table[0]["context"] == "The engine is blue."
    assert table[0]["answer_in_context"] is False


def test_the_table_holds_sixty_passages_of_a_larger_corpus():
    rows = attached(index=index_of(100))[:]["rows"]
    assert [len(found) for found in rows] == [60] * 4
    assert rows[0] == list(range(60))
    assert attached(index=index_of(100), hard_negatives=50)[0]["negatives"] == list(range(3, 53))


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1, 1, 1, 1]), (3, [3, 1]), (512, [4])])
def test_questions_are_encoded_once_in_batches(batch_size, batches):
    seen = []

    def encode(texts):
        seen.append(len(texts))
        return on_circle([ANGLES[text] for text in texts])

    assert attached(encode=encode, batch_size=batch_size)[:] == attached()[:]
    assert seen == batches


def test_progress_is_called_after_each_batch():
    sizes, index = [], index_of()
    attach_contexts(
        questions(),
        search=lambda texts: Searcher(
            index, None, encode=lambda asked: on_circle([ANGLES[text] for text in asked]), mode="dense"
        ).search(texts, 60),
        builder=ContextBuilder(index.passages, count_words, top_k=2, budget=6),
        fingerprint="name",
        batch_size=3,
        progress=sizes.append,
    )
    assert sizes == [3, 1]


def test_the_fingerprint_is_set_and_no_cached_result_is_used(tmp_path):
    first, second = attached(fingerprint="one"), attached(fingerprint="one", top_k=3, budget=99)
    assert first._fingerprint == second._fingerprint == "one"
    assert first[:]["context"] != second[:]["context"]
    first.save_to_disk(str(tmp_path / "table"))
    assert Dataset.load_from_disk(str(tmp_path / "table"))[:] == first[:]


def test_an_empty_table_has_all_columns():
    """A process with an empty share joins its columns with those of the others."""
    table = attached(questions().select([]))
    assert table.features == CONTEXT_FEATURES
    assert table[:] == {name: [] for name in CONTEXT_FEATURES}


# ---- noise ----


def test_noise_removes_passages_with_an_answer_from_the_context_only():
    plain, noised = attached(top_k=3, budget=99), attached(top_k=3, budget=99, noise=1.0)
    assert noised["noised"] == [True] * 4 and plain["noised"] == [False] * 4
    others = [name for name in plain.column_names if name not in ("noised", "context", "answer_in_context")]
    assert {name: plain[name] for name in others} == {name: noised[name] for name in others}
    assert noised["answer_in_context"] == [False] * 4
    assert any(plain["answer_in_context"])
    passages = index_of().passages
    for row, answers in enumerate(questions()["answers"]):
        held = [passages.texts[passage] in noised["context"][row] for passage in plain["rows"][row]]
        expected = [
            passage
            for passage in plain["rows"][row]
            if passage != plain["gold_row"][row]
            and not contains_answer(matching_form(passages.texts[passage]), answers)
        ][:3]
        assert [p for p, kept in zip(plain["rows"][row], held, strict=True) if kept] == expected


def test_noise_depends_on_question_and_seed_but_not_on_the_batch():
    many = Dataset.from_dict(
        {
            "id": [f"q{i}" for i in range(400)],
            "question": [list(ANGLES)[0]] * 400,
            "answers": [["Red!"]] * 400,
            "passage_id": [None] * 400,
            "negative_ids": [[]] * 400,
        },
        features=features(),
    )
    drawn = attached(many, noise=0.25)["noised"]
    assert 0.17 < np.mean(drawn) < 0.33
    assert attached(many, noise=0.25, batch_size=7)["noised"] == drawn
    assert attached(many, noise=0.25, noise_seed="other")["noised"] != drawn


# ---- hard negatives that come with the questions ----


def with_negatives(*ids):
    table = questions().to_dict()
    return Dataset.from_dict(table | {"negative_ids": list(ids)}, features=features())


def test_hard_negatives_of_the_questions_come_before_mined_ones():
    asked = with_negatives(["p7", "p0", "p2", "p6", "gone"], ["p5", "p1", "p2"], ["p3"], [])
    table = attached(asked, hard_negatives=3)
    assert table.features == CONTEXT_FEATURES and "negative_ids" not in table.column_names
    columns = table[:]
    # Not the gold p0, nor p2, which holds "red"; not p5 and p1, which hold "blue". Then ranks 4 and later.
    assert columns["negatives"][0] == [7, 6, 3]
    assert columns["negatives"][1] == [2, 4, 3]
    assert columns["negatives"][2] == []  # no positive
    assert len(columns["negatives"][3]) == 3
    assert attached(asked, hard_negatives=1)[:]["negatives"][0] == [7]
    assert attached(asked, hard_negatives=0)[:]["negatives"] == [[], [], [], []]
    plain = attached(hard_negatives=3)
    assert [plain[name] == table[name] for name in CONTEXT_FEATURES if name != "negatives"] == [True] * 11


def test_a_step_of_the_retriever_trains_on_them(tmp_path):
    """From a file in the layout of DPR to the texts of a retriever step."""
    files = [
        {
            "question": "What colour is the fox?",
            "answers": ["red"],
            "positive_ctxs": [{"title": "Fox", "text": TEXTS[0]}],
            "negative_ctxs": [{"title": "", "text": text} for text in TEXTS[1:6]],
            "hard_negative_ctxs": [{"title": "", "text": TEXTS[7]}, {"title": "", "text": TEXTS[2]}],
        },
        {"question": "What is blue?", "answers": ["blue"], "positive_ctxs": [{"title": "", "text": TEXTS[1]}]},
    ]
    (tmp_path / "dpr.json").write_text(json.dumps(files))
    read = read_questions(str(tmp_path / "dpr.json"))
    order = [read.passages["text"][:].index(text) for text in (*TEXTS[:6], TEXTS[7])]
    passages = read.passages.select(order)  # at the angles of the other tests
    index = PassageIndex(passages, on_circle(np.arange(len(order)) * 10), fingerprint="f")
    columns = attached(read.table, index=index, hard_negatives=1)[:]
    assert columns["negatives"][0] == [6]  # TEXTS[2] holds "red"
    pairs = training_pairs(columns, [0, 1])
    batch = retriever_batch(pairs, index.passages, parse_settings(["--questions", "q.tsv"]).training)
    assert TEXTS[7] in batch.passages and TEXTS[2] not in batch.passages
    assert sorted(batch.passages)[0].startswith("A river") and len(batch.passages) >= 3
