"""The data whose answer is known, and how maps are held against it."""

import pytest
import torch

from benchmarks.ground_truth import CELLS, SIDE, canvases, deviation, in_cell, wilson
from data.sources import load_source


def test_one_cell_is_brighter_than_the_canvas_and_decides():
    split = load_source("digits").train
    images, labels, cells, deciding = canvases(split, 50, vary=False, seed=3)
    assert images.shape == (50, CELLS * SIDE, CELLS * SIDE)
    tiles = images.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE).reshape(50, CELLS**2, SIDE, SIDE).float() - 128
    assert torch.equal((tiles.amax((2, 3)) > 0).float().argmax(1), cells)
    assert ((tiles > 0).any(3).any(2).sum(1) == 1).all()
    known = split.images[torch.arange(len(split.labels)), 0]  # type: ignore[index]
    for tile, label in zip(tiles[torch.arange(50), cells], labels, strict=True):
        nearest = (known.float() * 127 / 255 - tile).abs().amax((1, 2))
        assert nearest.min() <= 1  # it is a digit of the set, by as much brighter as the others are darker
        assert int(split.labels[nearest.argmin()]) == int(label)
    assert torch.equal(split.labels[deciding], labels)
    assert len(cells.unique()) == CELLS**2
    assert not torch.equal(images, canvases(split, 50, vary=True, seed=3)[0])


def test_a_map_is_held_against_the_cell():
    maps = torch.zeros(3, 6, 6)
    maps[0, 2:4, 4:6] = 0.25  # all of it in cell 5
    maps[1, 0, 0], maps[1, 5, 5] = 0.6, 0.4
    maps[2] = 1 / 36
    points, mass = in_cell(maps, torch.tensor([5, 8, 4]))
    assert points.tolist() == [True, False, False]
    assert mass.tolist() == pytest.approx([1, 0.4, 1 / 9])


def test_deviation_of_a_mean_of_values_in_groups():
    """Values that are there twice say no more than once."""
    values = torch.rand(40, generator=torch.Generator().manual_seed(0))
    alone = float(values.std(correction=0)) / 40**0.5
    assert deviation(values, torch.arange(40)) == pytest.approx(alone, rel=1e-5)
    assert deviation(values.repeat(2), torch.arange(40).repeat(2)) == pytest.approx(alone, rel=1e-5)


def test_wilson_interval():
    hits = torch.arange(10) < 8
    assert wilson(hits, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson 1927
    assert wilson(torch.ones(3000, dtype=torch.bool), 1000) == pytest.approx((0.9962, 1), abs=1e-4)
