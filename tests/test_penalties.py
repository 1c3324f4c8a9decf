"""Each penalty equals brute-force enumeration over all sequences of a tiny vocabulary; its gradient is correct."""

import itertools

import pytest
import torch

from cozyrag.models.penalties import Penalties, expected_repeats, expected_shortfall, keyword_mass

VOCABULARY = 3


def distributions(positions, *, seed=0, answers=2, vocabulary=VOCABULARY):
    torch.manual_seed(seed)
    return torch.softmax(2 * torch.randn(answers, positions, vocabulary, dtype=torch.float64), dim=-1)


def enumerated(probabilities, value):
    """Expectation of value(sequence), positions independent: a sum over all vocabulary ** positions sequences."""
    expected = []
    for answer in probabilities:
        total = 0.0
        for sequence in itertools.product(range(answer.shape[1]), repeat=answer.shape[0]):
            probability = 1.0
            for position, token in enumerate(sequence):
                probability *= float(answer[position, token])
            total += probability * value(sequence)
        expected.append(total)
    return torch.tensor(expected, dtype=torch.float64)


def repeats(sequence, n):
    grams = [sequence[i : i + n] for i in range(len(sequence) - n + 1)]
    return sum(a == b for a, b in itertools.combinations(grams, 2))


def everything(probabilities):
    return torch.ones(probabilities.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("positions", [1, 2, 4, 7])
def test_repeats_equal_enumeration_including_overlaps(n, positions):
    probabilities = distributions(positions)
    expected = enumerated(probabilities, lambda sequence: repeats(sequence, n))
    torch.testing.assert_close(expected_repeats(probabilities, everything(probabilities), n=n), expected)


def test_repeats_of_shorter_answers_in_a_padded_batch():
    probabilities = distributions(6)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    together = expected_repeats(probabilities, mask, n=2)
    alone = expected_repeats(probabilities[1:, :4], mask[1:, :4], n=2)
    torch.testing.assert_close(together[1:], alone)


@pytest.mark.parametrize("keywords", [[[0], [2]], [[0, 2], [1, -1]], [[-1], [-1]]])
def test_keyword_mass_equals_enumeration(keywords):
    probabilities = distributions(4)
    found = keyword_mass(probabilities, everything(probabilities), torch.tensor(keywords))
    for answer, wanted in enumerate(keywords):
        share = enumerated(
            probabilities[answer : answer + 1],
            lambda sequence, wanted=wanted: sum(token in wanted for token in sequence) / 4,
        )
        torch.testing.assert_close(found[answer : answer + 1], share)


def test_keyword_mass_counts_only_the_answer():
    probabilities = distributions(4)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    found = keyword_mass(probabilities, mask, torch.tensor([[1], [1]]))
    torch.testing.assert_close(found[0], probabilities[0, :2, 1].mean())
    assert found[1] == 0


def test_the_share_of_an_answer_of_one_token_is_its_probability():
    probabilities = distributions(1)
    found = keyword_mass(probabilities, everything(probabilities), torch.tensor([[0], [2]]))
    torch.testing.assert_close(found, torch.stack([probabilities[0, 0, 0], probabilities[1, 0, 2]]))


def test_the_end_of_an_answer_and_padding_are_in_no_penalty():
    probabilities, lengths, keywords = distributions(5), torch.tensor([2, 4]), torch.tensor([[0], [2]])
    penalties = Penalties(repeats=1.0, keywords=1.0, shortness=1.0, ngram=1, min_tokens=3)
    alone = [(probabilities[row : row + 1, :end], keywords[row : row + 1]) for row, end in enumerate((2, 4))]
    repeated = sum(expected_repeats(each, everything(each), n=1).sum() for each, _ in alone)
    mass = sum(keyword_mass(each, everything(each), wanted).sum() for each, wanted in alone)
    short = expected_shortfall(probabilities[:, :, 1], torch.tensor([2, 3])).sum()
    found = penalties.values(probabilities, lengths, keywords, eos=1)
    torch.testing.assert_close(found, torch.stack([repeated, mass, short]))


@pytest.mark.parametrize("minimum", [[0, 1], [2, 3], [4, 4]])
def test_shortfall_equals_enumeration(minimum):
    probabilities = distributions(4)
    stop = 0  # the token that ends an answer

    def length(sequence):
        return sequence.index(stop) if stop in sequence else len(sequence)

    found = expected_shortfall(probabilities[:, :, stop], torch.tensor(minimum))
    for answer, least in enumerate(minimum):
        expected = enumerated(
            probabilities[answer : answer + 1], lambda sequence, least=least: max(0, least - length(sequence))
        )
        torch.testing.assert_close(found[answer : answer + 1], expected)


PENALTIES = {
    "repeats of one token": lambda p: expected_repeats(p, everything(p), n=1),
    "repeats of two": lambda p: expected_repeats(p, everything(p), n=2),
    "repeats of three": lambda p: expected_repeats(p, everything(p), n=3),
    "keywords": lambda p: keyword_mass(p, everything(p), torch.tensor([[1], [2]])),
    "shortfall": lambda p: expected_shortfall(p[:, :, 0], torch.tensor([3, 4])),
}


@pytest.mark.parametrize("name", PENALTIES)
def test_gradients_match_finite_differences(name):
    logits = distributions(5).log().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: PENALTIES[name](torch.softmax(x, dim=-1)), (logits,))


@pytest.mark.parametrize("name", PENALTIES)
def test_a_step_against_the_gradient_lowers_the_penalty(name):
    logits = distributions(5).log().requires_grad_()
    before = PENALTIES[name](torch.softmax(logits, dim=-1)).sum()
    before.backward()
    assert logits.grad.abs().max() > 1e-4
    after = PENALTIES[name](torch.softmax(logits - 0.1 * logits.grad, dim=-1)).sum()
    assert after < before


def test_the_signs_of_the_gradients():
    logits = torch.zeros(1, 4, VOCABULARY, dtype=torch.float64)
    logits[0, :, 1] = 1.0  # prefers to repeat token 1
    for name, column, sign in (("repeats of one token", 1, 1), ("keywords", 1, 1), ("shortfall", 0, 1)):
        leaf = logits.clone().requires_grad_()
        minimum = {
            "shortfall": lambda p: expected_shortfall(p[:, :, 0], torch.tensor([3])),
            "keywords": lambda p: keyword_mass(p, everything(p), torch.tensor([[1]])),
        }
        minimum.get(name, PENALTIES[name])(torch.softmax(leaf, dim=-1)).sum().backward()
        assert (sign * leaf.grad[0, :3, column] > 0).all(), name


def test_a_certain_answer_without_repeats_has_no_penalty():
    sure = torch.eye(4, dtype=torch.float64).unsqueeze(0)
    assert expected_repeats(sure, everything(sure), n=1).item() == 0
    again = torch.eye(4, dtype=torch.float64)[[0, 1, 0, 1]].unsqueeze(0)
    assert expected_repeats(again, everything(again), n=2).item() == 1
