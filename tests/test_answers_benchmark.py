"""The benchmark of answers a second, with a tiny pair: every side gives the pair's own answers."""

from benchmarks.shared.measuring import Measured
from benchmarks.speed import answers
from cozyrag.pipeline import CozyRAG


def test_every_side_gives_the_same_answers(pair_folder):
    pair = CozyRAG.from_pretrained(pair_folder, device="cpu")
    questions = ["What colour is the fox?", "Where does the river of the old town flow?", "Who?"]
    sides = answers.answering(pair, questions, batch_size=2)
    found = {name: [" ".join(text.split()) for text in side(3)] for name, side in sides.items()}
    assert list(found) == [answers.OURS, answers.OUR_GENERATOR, answers.PIPELINE, answers.PIPELINE_ALONE]
    assert found[answers.OURS] == found[answers.OUR_GENERATOR]
    for name in (answers.PIPELINE, answers.PIPELINE_ALONE):
        assert found[name] == found[answers.OURS]


def test_a_row_compares_with_the_first_side_within_each_repetition():
    first, other = Measured("a", [4.0, 2.0, 9.0], 0), Measured("b", [2.0, 2.0, 3.0], 0)
    row = answers.table("answers", [first, other], {"b": "3 of 4"}).splitlines()[-1]
    assert row == "| b | 2 | 2 to 3 | 2.00x | 1.00 to 3.00 | 3 of 4 |"
