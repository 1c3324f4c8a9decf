"""Two runs compared: which questions match, differences worked out by hand, flips, and what is more than noise."""

import re

import evaluated
import numpy as np
import pytest

from cozyrag.errors import InputError
from cozyrag.evaluation.metrics import paired_bootstrap
from cozyrag.reporting import compare as comparison
from cozyrag.reporting import extras
from cozyrag.reporting.compare import Difference, as_text, compare, differences, matched, more_than_noise, write_page


def runs(tmp_path, rows_a, rows_b, **settings):
    a = evaluated.write_run(tmp_path / "a", [[evaluated.row(1, em=0)], rows_a], seed=1, top_k=4)
    return a, evaluated.write_run(tmp_path / "b", [rows_b], **({"seed": 2, "top_k": 4} | settings))


def scored(*ems, **others):
    return [evaluated.row(number, em=em, **others) for number, em in enumerate(ems)]


# ---- which questions match


def test_questions_match_by_id_and_text_in_the_order_of_the_first():
    a, b = scored(0, 1, 0), scored(1, 1, 1)
    assert matched(a, b[::-1]) == list(zip(a, b, strict=True))


def test_the_same_id_with_another_question_is_another_question():
    a, b = [evaluated.row(1, em=1)], [evaluated.row(1, em=1, question="Something else?")]
    assert matched(a, b) == []


def test_questions_match_by_text_if_ids_differ():
    a, b = evaluated.row(1, em=1), evaluated.row(1, em=0, id="other")
    assert matched([a], [b]) == [(a, b)]


def test_a_repeated_text_does_not_match_by_text():
    twice = [evaluated.row(1, em=1, id="x"), evaluated.row(1, em=0, id="y")]
    assert matched(twice, [evaluated.row(1, em=1, id="z")]) == []
    assert matched([evaluated.row(1, em=1, id="z")], twice) == []


def test_the_last_rounds_are_compared(tmp_path):
    found = compare(*runs(tmp_path, scored(1, 0), scored(1, 1)))
    assert found.rounds == ("round 1", "untuned baseline") and [(a["em"], b["em"]) for a, b in found.pairs] == [
        (1, 1),
        (0, 1),
    ]


def test_runs_without_a_common_question_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"found none in common \(1 in .*a, 1 in .*b\)"):
        compare(*runs(tmp_path, [evaluated.row(1, em=0)], [evaluated.row(2, em=0)]))


def test_only_common_questions_are_compared_with_a_warning(tmp_path):
    found = compare(*runs(tmp_path, scored(1, 0, 1), scored(1, 1)))
    assert len(found.pairs) == 2
    assert found.warnings == ["A evaluated 3 questions and B 2; only the 2 of both are compared."]


def test_other_reference_answers_give_a_warning(tmp_path):
    other = [evaluated.row(0, em=0, answers=["nothing like it"])]
    [warning] = compare(*runs(tmp_path, scored(1), other)).warnings
    assert warning.startswith("1 of these questions have other reference answers")


# ---- numbers


def test_differences_are_those_of_the_paired_bootstrap_in_percent():
    a, b = scored(*[0, 1] * 20), scored(*[1, 1, 0, 1] * 10)
    found = {each.metric: each for each in differences(list(zip(a, b, strict=True)))}
    middle, low, high, _ = paired_bootstrap(np.tile([0.0, 1.0], 20), np.tile([1.0, 1.0, 0.0, 1.0], 10))
    assert found["em"] == Difference("em", 50.0, 75.0, 100 * low, 100 * high)
    assert found["em"].points == pytest.approx(100 * middle) and found["em"].certain
    assert found["recall@5"] == Difference("recall@5", 100.0, 100.0, 0.0, 0.0) and not found["recall@5"].certain


def test_a_metric_that_one_run_lacks_is_left_out():
    a, b = scored(1), scored(0)
    del b[0]["mrr@10"]
    assert "mrr@10" not in [each.metric for each in differences([(a[0], b[0])])]


@pytest.mark.parametrize(
    ("f1", "em", "beginning"),
    [
        ((3, 1, 5), (0, -1, 1), "More than noise: B answers better than A, F1 +2.0 points (+1.0 to +5.0) on 9"),
        ((-3, -5, -1), (0, -1, 1), "More than noise: A answers better than B, F1"),
        ((1, -1, 3), (2, 1, 4), "More than noise: B answers better than A, EM"),
        ((1, -1, 3), (0, -1, 1), "Not more than noise: F1"),
        ((0, 0, 0), (0, 0, 0), "No difference: A and B score the same on every one of 9"),
        ((0, -2, 2), (0, 0, 0), "Not more than noise: F1"),
    ],
)
def test_the_sentence(f1, em, beginning):
    found = [
        Difference(name, 50.0, 50.0 + (2.0 if points > 0 else points), low, high)
        for name, (points, low, high) in (("em", em), ("f1", f1))
    ]
    assert more_than_noise(found, 9, names=("A", "B")).startswith(beginning)


def test_the_sentence_names_other_scores_that_differ_by_more_than_noise():
    found = [
        Difference("f1", 50, 51, -1, 3),
        Difference("recall@5", 90, 80, -15, -5),
        Difference("mrr@10", 9, 9, -1, 1),
    ]
    sentence = more_than_noise(found, 9, names=("A", "B"))
    assert sentence.startswith("Not more than noise") and sentence.endswith("by more than noise: recall@5 -10.0.")


def test_many_gains_are_more_than_noise_and_a_few_either_way_are_not(tmp_path):
    better = compare(*runs(tmp_path / "x", scored(*[0] * 60), scored(*[1] * 20, *[0] * 40)))
    assert better.sentence.startswith("More than noise: B answers better than A")
    same = compare(*runs(tmp_path / "y", scored(1, 1, *[0] * 58), scored(0, 1, 1, *[0] * 57)))
    assert same.sentence.startswith("Not more than noise")


# ---- settings and flips


def test_settings_that_differ_are_listed_without_names_of_folders(tmp_path):
    passages = tmp_path / "secret" / "wiki.jsonl"
    passages.parent.mkdir()
    passages.touch()
    found = compare(*runs(tmp_path, scored(1), scored(1), passages=str(passages), run_name="x", hub_model_id="u/n"))
    assert found.settings == [("seed", 1, 2), ("passages", None, "wiki.jsonl")]


def test_flips_go_both_ways(tmp_path):
    found = compare(*runs(tmp_path, scored(1, 0, 1, 0), scored(0, 1, 1, 0)))
    assert [a["id"] for a, _ in found.lost] == ["q0"] and [a["id"] for a, _ in found.won] == ["q1"]


def test_the_text_is_complete(tmp_path):
    text = as_text(compare(*runs(tmp_path, scored(1, 0, 1), scored(0, 1, 1))))
    assert "  seed  1  ->  2" in text and "top_k" not in text
    assert "| em | 66.7 | 66.7 | +0.0 |" in text
    assert "correct -> wrong: 1\n  Question 0?\n    A: answer 0 [correct]   B: guess 0 [reader error]" in text
    assert "wrong -> correct: 1\n  Question 1?\n    A: guess 1 [reader error]   B: answer 1 [correct]" in text
    assert text.splitlines()[-1].startswith("Not more than noise")


def test_the_screen_shows_some_flips_and_the_page_all(tmp_path):
    found = compare(*runs(tmp_path, scored(*[1] * 25), scored(*[0] * 25)))
    assert as_text(found).count("guess") == comparison.FLIPS_SHOWN and "and 15 more" in as_text(found)
    write_page(found, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("guess") == 25


def test_equal_settings_and_an_abstention_are_shown(tmp_path):
    rows = [evaluated.row(0, em=0, prediction="", answers=[], verdict="abstained")]
    text = as_text(compare(*runs(tmp_path, scored(1, answers=[]), rows, seed=1)))
    assert "The settings are the same." in text and "B: (no answer) [abstained]   reference: (none)" in text


# ---- the page


@pytest.mark.parametrize("drawn", [True, False])
def test_the_page_is_one_file_with_untrusted_text_escaped(tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(extras, "plots_are_possible", lambda: drawn)
    evil = "<script>alert(1)</script>"
    rows = [evaluated.row(0, em=0, question=evil, prediction=evil, answers=[evil], verdict=evil)]
    found = compare(*runs(tmp_path, [evaluated.row(0, em=1, question=evil, answers=[evil])], rows, top_k=evil))
    write_page(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 5
    assert ("<svg" in page) is drawn
    assert set(re.findall(r'https?://[^"\s]+', page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_a_page_that_cannot_be_written_is_an_input_error(tmp_path):
    found = compare(*runs(tmp_path, scored(1), scored(0)))
    with pytest.raises(InputError, match="something else"):
        write_page(found, tmp_path)
