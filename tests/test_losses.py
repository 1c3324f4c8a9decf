"""The retriever's losses on hand-written vectors: values, gradients and directions."""

import math

import pytest
import torch

from cozyrag.training.losses import contrastive_loss, feedback_loss, sentence_loss

SOUTHWEST = [-math.sqrt(0.5), -math.sqrt(0.5)]


def loss_of(queries, passages, positives, temperature=1.0):
    queries, passages = torch.tensor(queries, dtype=torch.float64), torch.tensor(passages, dtype=torch.float64)
    return contrastive_loss(queries, passages, positives=torch.tensor(positives), temperature=temperature).item()


@pytest.mark.parametrize(
    ("queries", "passages", "positives", "temperature", "expected"),
    [
        # cosines 1 and 0: -log(e / (e + 1))
        ([[1, 0]], [[1, 0], [0, 1]], [0], 1.0, math.log(1 + math.exp(-1))),
        # a temperature of a half doubles the scores
        ([[1, 0]], [[1, 0], [0, 1]], [0], 0.5, math.log(1 + math.exp(-2))),
        # the wrong passage is nearer
        ([[1, 0]], [[1, 0], [0, 1]], [1], 1.0, math.log(1 + math.exp(1))),
        # opposite passage: cosine -1
        ([[1, 0]], [[1, 0], [-1, 0]], [0], 1.0, math.log(1 + math.exp(-2))),
        # a single passage cannot be missed
        ([[1, 0], [0, 1]], [[0.6, 0.8]], [0, 0], 0.05, 0.0),
        # two queries, and a passage of neither: cosines (1, .6, 0) and (0, .8, 1); the mean over the queries
        (
            [[1, 0], [0, 1]],
            [[1, 0], [0.6, 0.8], [0, 1]],
            [0, 2],
            1.0,
            (math.log(1 + math.exp(-0.4) + math.exp(-1)) + math.log(1 + math.exp(-0.2) + math.exp(-1))) / 2,
        ),
        # two queries share a passage, which occurs once
        (
            [[1, 0], [0.6, 0.8]],
            [[1, 0], [0, 1]],
            [0, 0],
            1.0,
            (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.2))) / 2,
        ),
    ],
)
def test_loss_by_hand(queries, passages, positives, temperature, expected):
    assert loss_of(queries, passages, positives, temperature) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.05, 0.3, 1.0])
def test_loss_is_info_nce(temperature):
    """Van den Oord et al. 2018, eq. 4, transcribed with sums of Python floats."""
    random = torch.Generator().manual_seed(3)
    queries, passages = (
        torch.nn.functional.normalize(torch.randn(n, 5, generator=random, dtype=torch.float64)) for n in (6, 9)
    )
    positives = [4, 0, 4, 8, 2, 2]
    total = 0.0
    for query, positive in zip(queries.tolist(), positives, strict=True):
        scores = [
            math.exp(sum(a * b for a, b in zip(query, passage, strict=True)) / temperature)
            for passage in passages.tolist()
        ]
        total -= math.log(scores[positive] / sum(scores))
    assert loss_of(queries.tolist(), passages.tolist(), positives, temperature) == pytest.approx(total / 6, rel=1e-9)


def test_order_of_the_passages_does_not_matter():
    queries, passages = [[1, 0], [0.6, 0.8]], [[1, 0], [0, 1], SOUTHWEST]
    assert loss_of(queries, passages, [0, 1]) == pytest.approx(loss_of(queries, passages[::-1], [2, 1]))
    assert loss_of(queries, passages, [0, 1]) != pytest.approx(loss_of(queries, passages, [1, 0]))


def test_gradient_by_hand():
    """dL/dq = (sum_j p_j d_j - d_pos) / T and dL/dd_j = (p_j - [j = pos]) q / T, p the softmax of the scores."""
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    passages = torch.tensor([[0.6, 0.8], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    contrastive_loss(query, passages, positives=torch.tensor([0]), temperature=0.5).backward()
    wrong = math.exp(2) / (math.exp(1.2) + math.exp(2))
    assert query.grad[0].tolist() == pytest.approx([wrong * 0.4 / 0.5, -wrong * 0.8 / 0.5])
    assert passages.grad.flatten().tolist() == pytest.approx([-wrong / 0.5, 0, wrong / 0.5, 0])


def test_a_gradient_step_pulls_the_pair_together_and_the_rest_apart():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    passages = torch.tensor([[0.6, 0.8], SOUTHWEST, [0.8, -0.6]], requires_grad=True)  # the last is a hard negative
    contrastive_loss(queries, passages, positives=torch.tensor([0, 1]), temperature=0.5).backward()
    with torch.no_grad():
        before = queries @ passages.T
        after = (queries - 0.1 * queries.grad) @ (passages - 0.1 * passages.grad).T
    change = after - before
    assert change[0, 0] > 0  # the positives
    assert change[1, 1] > 0
    assert change[0, 2] < 0  # the hard negative, and the other query's positive
    assert change[1, 0] < 0


def test_gradients_agree_with_finite_differences():
    random = torch.Generator().manual_seed(0)
    queries, passages = (torch.randn(n, 3, generator=random, dtype=torch.float64, requires_grad=True) for n in (3, 4))

    def loss(queries, passages):
        return contrastive_loss(queries, passages, positives=torch.tensor([1, 3, 1]), temperature=0.7)

    assert torch.autograd.gradcheck(loss, (queries, passages))


def test_a_shared_passage_is_pulled_by_every_query():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    passages = torch.tensor([SOUTHWEST, [0.8, -0.6]], requires_grad=True)
    contrastive_loss(queries, passages, positives=torch.tensor([0, 0]), temperature=1.0).backward()
    assert (passages.grad[0] < 0).all()  # towards both queries


def test_a_query_without_a_positive_adds_nothing():
    vectors = [[1.0, 0.0], [0.6, 0.8]]
    alone = loss_of([[1, 0]], vectors, [0])
    assert loss_of([[1, 0], [0, 1]], vectors, [0, -1]) == pytest.approx(alone)
    assert loss_of([[1, 0]], vectors, [-1]) == 0.0


# ---- sentences ----


def marks(*rows):
    """(n_queries, n_sentences) bool from strings: "x" is marked, "." is not."""
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_sentence_loss_is_the_mass_on_sentences_with_the_answer(temperature):
    """Transcribed with sums of Python floats; the last sentence, the only one for the last query, is truncated."""
    random = torch.Generator().manual_seed(1)
    queries, sentences = (
        torch.nn.functional.normalize(torch.randn(n, 5, generator=random, dtype=torch.float64)) for n in (4, 6)
    )
    sentences[5] = 0
    own = marks("xxx...", "xxx...", "...xxx", "...xxx")
    right = marks("x.x...", ".x....", "...x.x", ".....x")
    expected = []
    for query in range(3):
        grown = [math.exp(float(queries[query] @ vector) / temperature) for vector in sentences[:5]]
        every = sum(grown[at] for at in range(5) if own[query, at])
        expected.append(-math.log(sum(grown[at] for at in range(5) if right[query, at]) / every))
    found = sentence_loss(queries, sentences, own=own, right=right, temperature=temperature).item()
    assert found == pytest.approx(sum(expected) / 3)


def test_sentence_loss_ignores_the_sentences_of_other_passages():
    queries = torch.tensor([[0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    sentences = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = sentence_loss(queries, sentences, own=marks("xx."), right=marks("x.."), temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.8 - 0.6)))
    query, change = queries.detach()[0], -sentences.grad
    assert change[0] @ query > 0 > change[1] @ query and (change[2] == 0).all()
    down = -queries.grad[0]
    assert down @ sentences.detach()[0] > 0 > down @ sentences.detach()[1]


def test_sentence_loss_is_zero_if_all_sentences_or_none_hold_the_answer():
    sentences = torch.eye(2, requires_grad=True)
    for right in ("xx", ".."):
        loss = sentence_loss(torch.eye(2)[:1], sentences, own=marks("xx"), right=marks(right), temperature=0.1)
        (gradient,) = torch.autograd.grad(loss, sentences)
        assert loss.item() == 0 and (gradient == 0).all()
    nothing = torch.zeros(1, 0, dtype=torch.bool)
    assert sentence_loss(torch.eye(2)[:1], sentences[:0], own=nothing, right=nothing, temperature=0.1).item() == 0


def test_gradients_of_the_sentence_loss_agree_with_finite_differences():
    random = torch.Generator().manual_seed(0)
    queries, sentences = (torch.randn(n, 3, generator=random, dtype=torch.float64, requires_grad=True) for n in (3, 5))
    own, right = marks("xxx..", "xxx..", "...xx"), marks("x.x..", "...x.", "....x")
    assert torch.autograd.gradcheck(
        lambda q, s: sentence_loss(q, s, own=own, right=right & own, temperature=0.5), (queries, sentences)
    )


# ---- feedback ----


def feedback_of(queries, passages, candidates, likelihoods, temperature=1.0):
    tensors = [torch.tensor(each, dtype=torch.float64) for each in (queries, passages, likelihoods)]
    return feedback_loss(
        tensors[0], tensors[1], candidates=torch.tensor(candidates), likelihoods=tensors[2], temperature=temperature
    ).item()


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def softmax(values):
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


PASSAGES = [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_feedback_is_the_divergence_of_two_distributions(temperature):
    """Cosines of (1, 0) are 1, 0, -1; the candidates are not in the order of the passages."""
    found = feedback_of([[1.0, 0.0]], PASSAGES, [[2, 0, 1]], [[-0.3, -2.0, -1.0]], temperature)
    wanted = softmax([x / temperature for x in (-0.3, -2.0, -1.0)])
    given = softmax([x / temperature for x in (-1.0, 1.0, 0.0)])
    assert found == pytest.approx(kl(wanted, given))


def test_feedback_compares_the_same_passages():
    """A shuffle of both sides together changes nothing; a shuffle of one side changes the loss."""
    straight = feedback_of([[1.0, 0.0]], PASSAGES, [[0, 1, 2]], [[-0.3, -2.0, -1.0]])
    assert feedback_of([[1.0, 0.0]], PASSAGES, [[1, 2, 0]], [[-2.0, -1.0, -0.3]]) == pytest.approx(straight)
    assert feedback_of([[1.0, 0.0]], PASSAGES, [[1, 2, 0]], [[-0.3, -2.0, -1.0]]) != pytest.approx(straight, abs=0.1)


def test_agreement_has_no_loss_whatever_is_added_to_the_likelihoods():
    assert feedback_of([[1.0, 0.0]], PASSAGES, [[0, 1, 2]], [[-4.0, -5.0, -6.0]]) == pytest.approx(0.0, abs=1e-12)


def test_feedback_is_a_mean_over_the_questions_with_an_answer():
    one = feedback_of([[1.0, 0.0]], PASSAGES, [[0, 1]], [[-3.0, -1.0]])
    both = feedback_of([[1.0, 0.0], [0.0, 1.0]], PASSAGES, [[0, 1], [0, 1]], [[-3.0, -1.0], [math.nan, math.nan]])
    assert both == pytest.approx(one)
    assert feedback_of([[1.0, 0.0]], PASSAGES, [[0, 1]], [[math.nan, math.nan]]) == 0.0


def test_feedback_pulls_towards_the_passage_with_the_likelier_answer():
    query = torch.tensor([[0.6, 0.8]], dtype=torch.float64, requires_grad=True)
    passages = torch.tensor(PASSAGES, dtype=torch.float64, requires_grad=True)
    likelihoods = torch.tensor([[-0.1, -5.0]], dtype=torch.float64, requires_grad=True)
    candidates = torch.tensor([[0, 1]])
    feedback_loss(query, passages, candidates=candidates, likelihoods=likelihoods, temperature=0.1).backward()
    assert query.grad @ passages[0].detach() < 0 < query.grad @ passages[1].detach()
    assert (passages.grad[2] == 0).all() and (passages.grad[:2] != 0).any()
    assert likelihoods.grad is None  # the generator is not trained


def test_gradients_of_the_feedback_agree_with_finite_differences():
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 4, generator=random, dtype=torch.float64, requires_grad=True)
    passages = torch.randn(5, 4, generator=random, dtype=torch.float64, requires_grad=True)
    candidates = torch.tensor([[0, 1, 2], [4, 3, 0], [1, 1, 2]])
    likelihoods = torch.randn(3, 3, generator=random, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda q, p: feedback_loss(q, p, candidates=candidates, likelihoods=likelihoods, temperature=0.5),
        (queries, passages),
    )
