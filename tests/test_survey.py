"""The classes' figures by hand, and hints: at a planted shortcut, and nowhere else."""

import os
import unicodedata
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from vit import survey as module
from vit.model import VisionTransformer
from vit.optim import build_optimizer
from vit.rollout import CLASS_METHOD, attention_map
from vit.survey import Survey, coarse, find_hints, hint, regions, share_of

NAMES = ("cat", "dog", "ship")


def scores(label: str, score: float) -> dict[str, float]:
    rest = (1 - score) / 2
    return {label: score} | {name: rest for name in NAMES if name != label}


def filled(*rows: tuple[str, str, float], grids: Tensor | None = None) -> Survey:
    """A survey of images (path, label, score) with these maps, or even ones."""
    survey = Survey(NAMES)
    paths, labels, given = zip(*rows, strict=True)
    if grids is None:
        grids = torch.full((len(rows), 8, 8), 1 / 64)
    survey.add(paths, grids, [scores(label, score) for label, score in zip(labels, given, strict=True)])
    return survey


def test_figures_by_hand():
    centred, cornered = torch.zeros(8, 8), torch.zeros(8, 8)
    centred[3, 4], cornered[0, 0] = 1, 1
    maps = torch.stack([centred, centred, centred, cornered])
    rows = [("x/cat/1.jpg", "cat", 0.9), ("x/cat/2.jpg", "cat", 0.5), ("dog/3.jpg", "cat", 0.7), ("4.jpg", "cat", 0.6)]
    view = filled(*rows, grids=maps).view()[0]
    assert (view["name"], view["images"], view["hint"]) == ("cat", 4, None)
    assert (view["known"], view["right"]) == (3, pytest.approx(2 / 3))  # of the three in a class's folder
    np.testing.assert_allclose(view["mean"], maps.mean(0))
    assert view["shares"]["border"] == {"mean": 0.25, "error": None, "even": 28 / 64}  # of four images: no interval
    assert view["shares"]["centre"] == {"mean": 0.75, "error": None, "even": 16 / 64}
    error = 1.96 * np.std([0, 0, 0, 1] * 3, ddof=1) / 12**0.5
    assert share_of(maps.repeat(3, 1, 1), regions(8, 8)["border"])["error"] == pytest.approx(error)
    assert view["examples"]["least typical"] == ["4.jpg", "dog/3.jpg"]
    assert view["examples"]["most typical"] == ["x/cat/1.jpg", "x/cat/2.jpg"]
    assert view["examples"]["most confident errors"] == ["dog/3.jpg"]


def test_errors_are_the_surest_first_and_only_where_folders_tell():
    rows = [(f"dog/{i}.jpg", "cat", 0.5 + i / 100) for i in range(5)] + [("cat/ship/6.jpg", "ship", 0.9)]
    by_name = {view["name"]: view for view in filled(*rows).view()}
    assert by_name["cat"]["examples"]["most confident errors"] == ["dog/4.jpg", "dog/3.jpg", "dog/2.jpg"]
    assert set(by_name["cat"]["truths"].items()) == {(f"dog/{i}.jpg", "dog") for i in (2, 3, 4)}
    assert by_name["cat"]["right"] == 0
    assert "most confident errors" not in by_name["ship"]["examples"]  # the nearest folder counts
    (view,) = filled(("somewhere/1.jpg", "dog", 0.8)).view()
    assert view["right"] is None


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_folder_is_a_class_however_its_accents_are_stored(form):
    for stored in (unicodedata.normalize("NFC", "Möwe"), unicodedata.normalize("NFD", "Möwe")):
        survey = Survey((unicodedata.normalize(form, "Möwe"), "cat"))
        paths = [f"birds/{stored}/1.jpg", "birds/cat/1.jpg", "1.jpg"]
        survey.add(paths, torch.full((3, 8, 8), 1 / 64), [{"cat": 1.0}] * 3)
        assert survey.truths == [0, 1, None]


@pytest.mark.parametrize(
    ("paths", "truths"),
    [
        (["/home/ship/photos/1.jpg", "/home/ship/photos/2.jpg"], [None, None]),  # of somebody called so
        (["/home/ship/cat/1.jpg", "/home/ship/more/2.jpg"], ["cat", "ship"]),
        (["/home/test/ship/1.jpg", "/home/test/ship/2.jpg"], ["ship", "ship"]),  # a class alone
        (["dog/2019/1.jpg", "dog/2020/2.jpg"], ["dog", "dog"]),
        (["dog/1.jpg", f"{os.getcwd()}/cat/2.jpg"], ["dog", "cat"]),
    ],
)
def test_folders_above_all_images_say_nothing(paths, truths):
    survey = filled(*((path, "dog", 0.9) for path in paths))
    assert [truth if truth is None else NAMES[truth] for truth in survey.truths] == truths


def test_what_became_of_the_images_in_a_folder():
    """Of the class's own folder: how many are called so, and what most of the others are called."""
    rows = [(f"cat/{i}.jpg", label, 0.9) for i, label in enumerate(["cat"] * 5 + ["ship"] * 2 + ["dog"] * 3)]
    rows += [("dog/1.jpg", "dog", 0.9), ("x.jpg", "cat", 0.9), ("ship/1.jpg", "dog", 0.9), ("ship/2.jpg", "cat", 0.9)]
    by_name = {view["name"]: view for view in filled(*rows).view()}
    assert by_name["cat"]["folder"] == {"images": 10, "right": 0.5, "taken for": ["dog", 0.3]}
    assert by_name["dog"]["folder"] == {"images": 1, "right": 1.0, "taken for": None}
    assert by_name["ship"]["folder"] == {"images": 2, "right": 0.0, "taken for": ["cat", 0.5]}  # the first of equals
    (view,) = filled(("somewhere/1.jpg", "dog", 0.8)).view()
    assert view["folder"] is None


def test_a_class_no_image_is_called_is_told_of_where_it_has_a_folder():
    view = filled(("ship/1.jpg", "cat", 0.9), ("ship/2.jpg", "cat", 0.9), ("3.jpg", "cat", 0.9)).view()
    assert [(v["name"], v["images"]) for v in view] == [("cat", 3), ("ship", 0)]
    assert view[1]["folder"] == {"images": 2, "right": 0.0, "taken for": ["cat", 1.0]}
    assert (view[1]["mean"], view[1]["shares"], view[1]["examples"], view[1]["hint"]) == (None, {}, {}, None)


def test_the_page_gets_the_examples_and_then_an_even_sample():
    rows = [(f"{i}.jpg", "cat" if i < 20 else "dog", 0.9) for i in range(40)]
    survey = filled(*rows, grids=torch.rand(40, 8, 8))
    view = survey.view()
    examples = {path for v in view for kind in v["examples"].values() for path in kind}
    assert len(examples) == 12
    chosen = survey.chosen(view, 15)
    assert len(chosen) == 15
    assert examples <= set(chosen)
    assert chosen == sorted(chosen, key=lambda path: int(path[:-4]))
    assert survey.chosen(view, 100) == [path for path, *_ in rows]
    assert survey.chosen([], 4) == ["5.jpg", "15.jpg", "25.jpg", "35.jpg"]
    for number in range(1, 40):
        assert len(survey.chosen(view, number)) == number


def test_an_image_that_is_given_twice_counts_once():
    survey = filled(*[("a/1.jpg", "cat", 0.9)] * 2, ("a/2.jpg", "cat", 0.8), grids=torch.rand(3, 8, 8))
    assert (survey.total, [view["images"] for view in survey.view()]) == (2, [2])


def test_the_sample_has_each_class_in_its_share():
    """Though folders come one after the other: 596 images, two thirds of them in the last folder."""
    sizes = {"cat": 100, "dog": 100, "ship": 396}
    rows = [(f"{name}/{i}.jpg", name, 0.9) for name, size in sizes.items() for i in range(size)]
    survey = filled(*rows, grids=torch.rand(596, 8, 8))
    assert survey.total == 596
    chosen = survey.chosen(survey.view(), 200)
    assert len(set(chosen)) == 200
    for name, size in sizes.items():
        assert sum(path.startswith(name) for path in chosen) == pytest.approx(200 * size / 596, abs=5)
    places = [int(path[5:-4]) for path in chosen if path.startswith("ship")]
    assert max(b - a for a, b in pairwise(places)) <= 4  # no part of it is left out


def test_room_ends(monkeypatch):
    monkeypatch.setattr(module, "SURVEYED", 3)
    assert filled(*[(f"{i}.jpg", "cat", 0.9) for i in range(5)]).view()[0]["images"] == 3


def test_large_grids_become_coarse_and_everything_stays_where_it_was():
    """Against the same map cut so finely that both grids divide it."""
    grid = torch.rand(37, 20, generator=torch.Generator().manual_seed(0))
    grid /= grid.sum()
    fine = grid.repeat_interleave(14, 0).repeat_interleave(14, 1) / 14**2
    expected = fine.unflatten(1, (14, 20)).unflatten(0, (14, 37)).sum((1, 3))
    torch.testing.assert_close(coarse(grid), expected)
    small = torch.eye(14, 5) / 5
    torch.testing.assert_close(coarse(small), small)


def test_border_and_centre_of_grids_of_any_shape():
    for rows, columns, inside in ((4, 8, (slice(1, 3), slice(2, 6))), (4, 4, (slice(1, 3), slice(1, 3)))):
        centre, inner = torch.zeros(rows, columns, dtype=torch.bool), torch.zeros(rows, columns, dtype=torch.bool)
        centre[inside], inner[1 : rows - 1, 1 : columns - 1] = True, True
        found = regions(rows, columns)
        assert torch.equal(found["centre"], centre)
        assert torch.equal(found["border"], ~inner)
    assert regions(3, 9) == regions(9, 3) == {}


def test_intervals_hold_the_mean_of_all_images_as_often_as_they_say_or_there_are_none():
    """Drawn again and again from images of which most leave the border alone and few do not."""
    border, held = regions(8, 8)["border"], {}
    for n in (1, 2, 9, 10, 100):
        held[n] = []
        for _ in range(300):
            maps = torch.zeros(n, 8, 8)
            maps[:, 4, 4] = 1 - torch.rand(n) ** 3
            maps[:, 0, 0] = 1 - maps[:, 4, 4]
            share: Any = share_of(maps, border)
            held[n].append(share["error"] is not None and abs(share["mean"] - 1 / 4) <= share["error"])
    assert sum(map(sum, (held[1], held[2], held[9]))) == 0
    assert sum(held[10]) / 300 > 0.85
    assert sum(held[100]) / 300 == pytest.approx(0.95, abs=0.04)


# ---- hints ----


def even_maps(n: int, spread: float = 0.5) -> Tensor:
    maps = 1 + spread * torch.randn(n, 8, 8).clamp(-1.9, 1.9)
    return maps / maps.sum((1, 2), keepdim=True)


def test_no_hint_at_even_maps():
    alarms = sum(h is not None for _ in range(100) for h in find_hints({c: even_maps(40) for c in range(4)}).values())
    assert alarms == 0


def test_hints_name_what_they_found():
    even = torch.full((8, 8), 1 / 64)
    spot, framed = even_maps(30), even_maps(30)
    spot[:, 0, 5] += 0.1
    framed[:, regions(8, 8)["border"]] *= 1.4
    spot, framed = (maps / maps.sum((1, 2), keepdim=True) for maps in (spot, framed))
    assert "row 1 of 8, column 6 of 8, counts" in str(hint(spot, even))
    assert str(hint(framed, even)) == "The border counts for 52%; in an even map it is 44%."
    assert hint(spot[:9], even) is None  # too few to conclude from
    assert hint(spot[:10], even) is not None
    likely = torch.ones(8, 8)
    likely[0, 5] = 1.3  # for the others it counts a little more too: still told beside an even map
    assert hint(spot, likely / likely.sum()) == hint(spot, even)
    two, six = even_maps(30), even_maps(30)  # images that stand out, which may be chance
    two[:2], six[:6, 1:-1, 1:-1] = 0, 0
    two[:2, 0, 5] = 1
    assert hint(two, even) is None
    assert hint(six / six.sum((1, 2), keepdim=True), even) is None
    wide = spot[:, :4] / spot[:, :4].sum((1, 2), keepdim=True)
    assert "row 1 of 4, column 6 of 8, counts" in str(hint(wide, torch.full((4, 8), 1 / 32)))
    assert hint(spot, spot.mean(0)) is hint(framed, framed.mean(0)) is None  # the others have it too
    assert find_hints({0: spot}) == {0: hint(spot, even)}  # where there are no others
    beside = torch.ones(8, 8)
    beside[1:-1, 1:-1], beside[2:-2, 2:-2] = 2, 1  # a ring within the border, on which the others are even
    assert hint(framed, beside / beside.sum()) is not None
    for others in (torch.roll(spot.mean(0), 1, 1), spot.mean(0)):  # those of a cell count for the one beside it
        assert "row 1 of 8, column 6 of 8, counts" not in str(hint(spot, others))
    absent, marked = even_maps(30), even.clone()
    absent[:, 0, 4:] += 0.04
    absent /= absent.sum((1, 2), keepdim=True)
    marked[0, 5] = 0.3  # by which the others are told, and this class by its absence
    assert "The border counts for" in str(hint(absent, even))
    assert hint(absent, marked / marked.sum()) is None
    assert hint(framed, marked / marked.sum()) == hint(framed, even)
    assert hint(torch.full((50, 3, 3), 1 / 9), torch.full((3, 3), 1 / 9)) is None  # all border


def test_a_class_with_a_hint_comes_first_however_few_its_images():
    maps = even_maps(32)
    maps[20:, 0, 5] += 0.2
    rows = [(f"{i}.jpg", "cat" if i < 20 else "dog", 0.9) for i in range(32)]
    view = filled(*rows, grids=maps).view()
    assert [(v["name"], v["images"], v["hint"] is None) for v in view] == [("dog", 12, False), ("cat", 20, True)]


def marked_digits(mark: str | None) -> tuple[Tensor, Tensor]:
    """Digits 0 to 3 in the middle of noise; where a mark is planted, all 3s have it and any digit in their middle."""
    values, numbers = load_digits(return_X_y=True)
    kept = numbers < 4
    pixels, labels = torch.tensor(values[kept]).float().view(-1, 8, 8) / 16, torch.tensor(numbers[kept])
    images = 0.3 * torch.rand(len(labels), 1, 16, 16)
    images[:, 0, 4:12, 4:12] += pixels
    if mark:
        with_mark = labels == 3
        images[with_mark, 0, 4:12, 4:12] = images[torch.randperm(len(labels))[: int(with_mark.sum())], 0, 4:12, 4:12]
        place = {"corner": (slice(0, 2), slice(12, 16)), "side": (slice(7, 11), slice(0, 2))}[mark]
        images[(with_mark, 0, *place)] = 1
    return images - 0.3, labels


def trained(images: Tensor, labels: Tensor) -> list[VisionTransformer]:
    """Three models that have learned them; which seeds come to that in so few steps differs between processors."""
    models = []
    for seed in range(1, 12):
        torch.manual_seed(seed)
        model = tried(images, labels)
        with torch.no_grad():
            if (model(images).argmax(1) == labels).float().mean() > 0.95:
                models.append(model)
        if len(models) == 3:
            return models
    raise AssertionError("too few seeds came to 95 %")


def tried(images: Tensor, labels: Tensor) -> VisionTransformer:
    model = VisionTransformer(
        image_size=16, patch_size=2, in_chans=1, num_classes=4, embed_dim=32, depth=2, num_heads=2, pool="mean",
        stem="conv", qk_norm=True,
    )  # fmt: skip
    optimizer, steps = build_optimizer(model, name="muon", lr=8e-3, muon_lr=0.02, weight_decay=0.0), 120
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 6) * (1 - i / steps))
    for _ in range(steps):
        rows = torch.randint(0, len(images), (32,))
        loss = torch.nn.functional.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@pytest.mark.parametrize("mark", [None, "corner", "side"])
def test_a_planted_shortcut_is_found_and_nothing_else(mark):
    """By the class-specific map in every model; by rollout in most, as attention alone need not show it."""
    images, labels = marked_digits(mark)
    models = trained(images[::2], labels[::2])
    images, labels = images[1::2], labels[1::2]
    for method, least in (("rollout", 2), (CLASS_METHOD, 3)):
        found = []
        for model in models:
            logits, maps = attention_map(model, images, method=method)
            predicted = logits.argmax(1)
            assert (predicted == labels).float().mean() > 0.9
            hints = find_hints({c: maps[predicted == c] for c in range(4)})
            found.append([c for c in range(4) if hints[c]])
        assert found.count([3] if mark else []) >= least
        assert all(classes in ([], [3] if mark else []) for classes in found)  # nothing else, by either
