"""The temperature is the one that makes the labels most likely, however the images were split up."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from vit.calibration import TEMPERATURES, Temperature


def drawn(count: int, temperature: float, *, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn from the probabilities that they give at a temperature."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(count, classes, generator=generator)
    labels = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator).flatten()
    return logits, labels


def found(*batches: tuple[torch.Tensor, torch.Tensor]) -> float:
    metric = Temperature()
    for logits, labels in batches:
        metric.update(logits, labels)
    return float(metric.compute())


@pytest.mark.parametrize("temperature", [0.4, 1.0, 1.7, 5.0])
def test_finds_the_temperature_that_made_the_labels(temperature):
    assert found(drawn(20_000, temperature)) == pytest.approx(temperature, rel=0.03)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.3])
def test_is_the_minimum_of_the_likelihood(temperature):
    logits, labels = drawn(500, temperature)

    def nll(log_temperature: float) -> float:
        logs = (logits.double() / np.exp(log_temperature)).log_softmax(1)
        return float(F.nll_loss(logs, labels, reduction="sum") - logs.mean())  # one image more, of any class

    best = minimize_scalar(nll, bounds=(np.log(0.25), np.log(8)), method="bounded", options={"xatol": 1e-8})
    assert found((logits, labels)) == pytest.approx(np.exp(best.x), rel=1e-3)


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(40, 5), 1e-6 * drawn(40, 1.0)[0], 1e6 * torch.eye(5).repeat(8, 1)],
    ids=["the same", "but for rounding", "certain"],
)
def test_scores_stay_as_they_are_where_no_temperature_is_better(logits):
    labels = torch.arange(5).repeat(8)
    temperature = found((logits, labels))
    assert torch.equal((logits / temperature).softmax(1), logits.softmax(1))
    assert temperature == 1 or logits.any()


def test_weights_that_overflow_do_not_end_the_run():
    assert found((torch.full((4, 5), torch.inf), torch.arange(4))) == 1
    assert found((2e38 * torch.eye(5)[:1], torch.tensor([1]))) == 8  # they do at temperatures below 1 alone


def test_ladder_is_as_said():
    assert float(TEMPERATURES[0]) == pytest.approx(0.25)
    assert float(TEMPERATURES[-1]) == pytest.approx(8)
    assert (TEMPERATURES[1:] / TEMPERATURES[:-1]).max() < 1.03


def test_batches_do_not_matter():
    logits, labels = drawn(501, 1.5)
    parts = zip(logits.split(64), labels.split(64), strict=True)
    assert found(*parts) == pytest.approx(found((logits, labels)), rel=1e-5)


def test_sum_over_ranks_is_the_whole():
    logits, labels = drawn(501, 1.5)
    first, second = Temperature(), Temperature()
    first.update(logits[:400], labels[:400])
    second.update(logits[400:], labels[400:])
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(found((logits, labels)), rel=1e-5)


def test_rank_without_images_changes_nothing():
    logits, labels = drawn(100, 1.5)
    assert found((logits, labels), (logits[:0], labels[:0])) == found((logits, labels))


def test_half_precision_logits_are_summed_in_full():
    logits, labels = drawn(2000, 1.5)
    assert found((logits.bfloat16(), labels)) == pytest.approx(found((logits, labels)), rel=0.02)


def test_stays_in_range_when_no_temperature_is_best():
    logits = drawn(20_000, 1.0)[0]
    assert found((0.1 * logits, logits.argmax(-1))) == pytest.approx(0.25)  # never wrong: the sharper the better
    assert found((100 * logits, logits.argmin(-1))) == pytest.approx(8)  # always wrong: the flatter the better


def test_few_images_that_are_all_right_do_not_make_a_mistake_certain():
    logits, labels = drawn(2000, 1.0)
    right = (logits.argmax(1) == labels).nonzero()[:50, 0]
    rest = torch.ones(2000, dtype=torch.bool).index_fill(0, right, False)
    temperature = found((logits[right], labels[right]))
    sharpest, ours = (F.cross_entropy(logits[rest] / each, labels[rest]) for each in (0.25, temperature))
    assert 0.5 < temperature < 2
    assert ours < 0.7 * sharpest


def test_a_class_that_is_ruled_out_does_not_matter():
    logits, labels = drawn(200, 3.0)
    before = found((logits, labels))
    logits[0, (labels[0] + 1) % logits.shape[1]] = -torch.inf
    assert found((logits, labels)) == pytest.approx(before, rel=0.02) != 1


def test_reset_forgets():
    metric = Temperature()
    metric.update(*drawn(100, 5.0))
    metric.reset()
    metric.update(*drawn(100, 1.0, seed=1))
    assert float(metric.compute()) == found(drawn(100, 1.0, seed=1))
