"""The ablation benchmark: its metrics by hand, shared training, and both kinds of study with tiny models."""

import json

import numpy as np
import pytest
import torch
from tiny import corpus, write_jsonl

from benchmarks.parts import ablation
from benchmarks.shared import studies
from cozyrag.errors import InputError
from cozyrag.models.reranker import Reranker


@pytest.fixture
def arguments(tmp_path, generator_path, retriever_path):
    """Twenty training questions, ten validation questions, 15 passages."""
    passages, questions = corpus(15)
    texts = {each["id"]: each["text"] for each in passages}
    full = [{**each, "context": texts[each.pop("passage_id")]} for each in map(dict, questions)]
    files = {"--train": full[:20], "--questions": full[20:]}
    named = [part for name, rows in files.items() for part in (name, write_jsonl(tmp_path / f"{name[2:]}.jsonl", rows))]
    more = (
        "--index",
        tmp_path / "vectors",
        "--generator",
        generator_path,
        "--retriever",
        retriever_path,
        "--threads",
        1,
    )
    return [str(each) for each in (*named, *more)]


def test_metrics_by_hand():
    assert studies.repetition([1, 2, 3, 1, 2, 3]) == pytest.approx(1 - 3 / 4)
    assert studies.repetition([1, 2]) == studies.repetition([1, 2, 3]) == 0
    assert studies.repetition([7] * 5) == pytest.approx(2 / 3)
    assert studies.parrots("the red fox", "Is the fox red?", ["blue"]) == 1
    assert studies.parrots("a red owl", "Is the fox red?", ["blue"]) == 0
    assert studies.parrots("the fox", "Is the fox red?", ["fox"]) == 0  # as in a reference
    assert studies.parrots("", "Is the fox red?", ["blue"]) == studies.parrots("the", "the?", ["x"]) == 0
    assert [studies.too_short(length, [5, 4]) for length in (0, 2, 3)] == [1, 1, 0]
    assert [studies.too_short(length, [5, 1]) for length in (0, 1)] == [1, 0]


def test_variants_with_equal_training_share_it(capsys):
    assert (
        studies.without_decoding("--extractive --repeat_penalty 0.1 --no_repeat_ngram_size 3") == "--repeat_penalty 0.1"
    )
    seen = []

    class Study:
        names = ("F1",)

        def scores(self, flags, seed):
            seen.append((seed, flags))
            return {"F1": [float(seed), 0.0]}

    variants = {"a": "", "b": "--repeat_penalty 0.1", "c": "--min_answer_tokens 2"}
    found = ablation.run(Study(), variants, [1, 2])
    assert [flags for seed, flags in seen if seed == 1] == ["", "--min_answer_tokens 2", "--repeat_penalty 0.1"]
    assert list(found) == ["a", "b", "c"] and found["b"]["F1"].tolist() == [[1, 0], [2, 0]]
    printed = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(printed) == 6 and printed[0] == "a, seed 1: F1 50.0" and printed[5] == "b, seed 2: F1 100.0"


def test_the_table_compares_with_the_first_row():
    first, other = np.array([[0, 0, 1, 1.0]] * 2), np.array([[1, 1, 1, 1.0], [1, 0, 1, 1.0]])
    text = ablation.table({"plain": {"F1": first}, "more": {"F1": other}})
    assert "| plain | 50.0 (0.0 to 100.0) |" in text and "| more | 87.5, +37.5 (" in text
    text = ablation.spread_of_seeds({"plain": {"F1": first}, "more": {"F1": other}}, "F1")
    assert "by up to 25.0 points" in text and "more 0." in text


def test_the_study_of_penalties(arguments, tmp_path, capsys):
    path = tmp_path / "means.json"
    own = [
        "--variant",
        "short too: --short_penalty 0.5 --min_answer_tokens 2",
        "--base",
        "--answer_tokens 4",
        "--json",
        str(path),
    ]
    ablation.compare(ablation.parse(["penalties", *arguments, "--seeds", "1", *own]))
    out, numbers = capsys.readouterr().out, json.loads(path.read_text())
    assert all(f"| {name} |" in out for name in numbers["variants"]) and "short too" in numbers["variants"]
    assert "20 training questions, 10 validation questions, 15 passages" in out
    assert set(numbers["means"]["short too"]) == {"EM", "F1", "seq-rep-3", "parroting", "too short"}
    assert numbers["means"]["at least 3 tokens, decoding"]["too short"] == [0.0]
    assert numbers["variants"]["no penalty"] == "--answer_tokens 4"


def test_the_study_of_feedback(arguments, tmp_path, capsys):
    path = tmp_path / "means.json"
    more = [
        "--max_passages",
        "30",
        "--base",
        "--retriever_learning_rate 1e-2 --retriever_batch_size 4",
        "--json",
        str(path),
    ]
    ablation.compare(ablation.parse(["feedback", *arguments, "--seeds", "1", *more]))
    means = json.loads(path.read_text())["means"]
    assert means["contrastive"] != means["contrastive + feedback"]
    assert set(means["contrastive"]) == set(studies.RetrieverStudy.names)
    assert "| contrastive + feedback |" in capsys.readouterr().out


def test_a_reranker_teaches_by_the_softmax_of_its_scores(arguments, reranker_path, tmp_path):
    reranker = Reranker.load(str(reranker_path))
    torch.manual_seed(0)
    torch.nn.init.normal_(reranker.model[0].model.classifier.weight)
    reranker.save(tmp_path / "teacher")
    asked = ["feedback", *arguments, "--teacher", str(tmp_path / "teacher")]
    setup = studies.Setup.load(ablation.parse(asked))
    settings = studies.settings_of("--feedback_weight 0.5 --feedback_passages 3 --feedback_temperature 0.2", 1)
    contexts = setup.contexts("train", settings)
    given = studies.RetrieverStudy(setup)._likelihoods(settings, contexts)
    texts = setup.passages.select(contexts["rows"][1][:3])
    scores = reranker.score([(contexts["question"][1], text) for text in texts])
    assert given.shape == (len(contexts), 3) and scores.std() > 0
    assert given[1] / 0.2 == pytest.approx(scores, abs=1e-5)


def test_the_retriever_trains_on_the_negatives_of_a_run(arguments):
    """As in a run, one hard negative is mined for each question by default."""
    setup = studies.Setup.load(ablation.parse(["feedback", *arguments]))
    for flags, count in (("", 1), ("--hard_negatives 2", 2), ("--hard_negatives 0", 0)):
        mined = setup.contexts("train", studies.settings_of(flags, 1))["negatives"]
        assert max(map(len, mined)) == count, flags


def test_wrong_variants_are_refused_before_anything_is_read():
    asked = ["own", "--questions", "no.jsonl", "--train", "no.jsonl", "--index", "no"]
    with pytest.raises(InputError, match='expected "NAME:--setting value", found'):
        ablation.compare(ablation.parse([*asked, "--variant", "--repeat_penalty 1"]))
    with pytest.raises(InputError, match="repeat_penalti"):
        ablation.compare(ablation.parse([*asked, "--variant", "x: --repeat_penalti 1"]))
