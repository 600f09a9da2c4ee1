"""The Python interface, against the model run by hand."""

import gc
import io
import os
import re
import signal
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import FrozenInstanceError, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageSequence
from timm.models import save_for_hf

import vit
from vit import Explanation, Prediction, Predictor, preprocess
from vit.checkpoint import Checkpoint, CheckpointError, save_checkpoint
from vit.model import VisionTransformer
from vit.predictor import batches
from vit.preprocess import ImageError, Preprocess, open_image
from vit.rollout import CLASS_METHOD, METHODS, attention_map

NAMES = ("cat", "dog", "frog")
SIZE = (16, 24)  # height, width


def checkpoint(path, *, scale: float = 0.5, temperature: float = 1.0, channels: int = 3):
    """A file of random weights whose predictions differ from image to image."""
    model = VisionTransformer(
        image_size=SIZE, patch_size=8, in_chans=channels, num_classes=len(NAMES), embed_dim=32, depth=2, num_heads=2
    )
    torch.nn.init.normal_(model.head.weight, std=scale)
    preprocess = Preprocess(image_size=SIZE, mean=(0.5,) * channels, std=(0.25,) * channels)
    about = Checkpoint(
        architecture=model.architecture, class_names=NAMES, preprocess=preprocess, temperature=temperature
    )
    return save_checkpoint(path, model.state_dict(), about)


@pytest.fixture
def predictor(tmp_path) -> Predictor:
    return Predictor.from_checkpoint(checkpoint(tmp_path / "model.safetensors"), device="cpu")


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((30 + i, 40))
        for i in range(count)
    ]


def by_hand(predictor: Predictor, image: Image.Image) -> torch.Tensor:
    with torch.no_grad():
        pixels = predictor.preprocess(image)[None]
        logits = predictor.model(predictor.preprocess.normalize(pixels))
        return (logits / predictor.about.temperature).softmax(1)[0]


def test_a_prediction_is_the_model_s(predictor):
    for image in pictures(5):
        prediction = predictor.predict(image)
        scores = by_hand(predictor, image)
        torch.testing.assert_close(torch.tensor([prediction.scores[n] for n in NAMES]), scores, atol=1e-6, rtol=0)
        assert prediction.label == NAMES[scores.argmax()]
        assert prediction.score == prediction.scores[prediction.label] == max(prediction.scores.values())
        assert list(prediction.scores.values()) == sorted(prediction.scores.values(), reverse=True)
        with pytest.raises(FrozenInstanceError):
            prediction.label = "other"  # pyright: ignore


def test_temperature_divides_the_logits(tmp_path):
    torch.manual_seed(1)
    one = Predictor.from_checkpoint(checkpoint(tmp_path / "1.safetensors"))
    torch.manual_seed(1)
    three = Predictor.from_checkpoint(checkpoint(tmp_path / "3.safetensors", temperature=3.0))
    (image,) = pictures(1)
    a = torch.tensor([one.predict(image).scores[name] for name in NAMES])
    b = torch.tensor([three.predict(image).scores[name] for name in NAMES])
    torch.testing.assert_close((a.log() / 3).softmax(0), b)
    assert three.explain(image).prediction.scores == pytest.approx(three.predict(image).scores, abs=1e-6)


def test_path_file_and_image_are_one(predictor, tmp_path):
    (image,) = pictures(1)
    image.save(tmp_path / "a.png")
    expected = predictor.predict(image)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), io.BytesIO((tmp_path / "a.png").read_bytes())):
        assert predictor.predict(source) == expected


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_array_is_the_image_of_its_file(predictor, tmp_path, mode, dtype):
    (image,) = pictures(1)
    image = image.convert(mode)
    if mode == "RGBA":
        image.putalpha(image.getchannel("R"))
    image.save(tmp_path / "a.png")
    array = np.asarray(image).astype(dtype) * (257 if dtype == np.uint16 else 1)
    expected = predictor.predict(tmp_path / "a.png")
    for same in [array, *([array[..., None]] if mode == "L" else []), np.asfortranarray(array)]:
        before = same.copy()
        assert predictor.predict(same) == expected
        np.testing.assert_array_equal(same, before)
    assert list(predictor.predict_iter(np.stack([array, array]))) == list(predictor.predict_iter([image, image]))
    np.testing.assert_array_equal(predictor.explain(array).grid, predictor.explain(tmp_path / "a.png").grid)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_a_jpeg_of_a_hundred_megapixels_shows_is_explained_at_half_its_size(predictor, tmp_path, monkeypatch):
    file = tmp_path / "a.jpg"
    pictures(1)[0].resize((960, 451)).save(file)
    expected = predictor.explain(file)
    for limit in (400_000, 200_000):  # Pillow refuses above twice the limit and only warns below that
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        found = predictor.explain(file)
        assert (found.prediction, found.image.size) == (expected.prediction, (480, 226))
        np.testing.assert_array_equal(found.grid, expected.grid)


def test_an_array_of_16_bit_colour_is_the_image_of_its_file(predictor, tmp_path):
    array = np.random.default_rng(0).integers(0, 2**16, (20, 30, 3), dtype=np.uint16)
    (tmp_path / "a.ppm").write_bytes(b"P6 30 20 65535\n" + array.astype(">u2").tobytes())
    assert predictor.predict(array) == predictor.predict(tmp_path / "a.ppm")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (None, "not NoneType"),
        (b"\x89PNG", "not bytes; io.BytesIO makes a file of them"),
        (io.StringIO("text"), "not StringIO"),
        (torch.zeros(3, 8, 8), "not Tensor"),
        (["a.png", "b.png"], "not list; predict_iter takes many images"),
        (np.zeros((2, 8, 8, 3), np.uint8), "not an array of uint8 (2, 8, 8, 3); predict_iter takes many images"),
        (np.zeros((8, 8, 3)), "not an array of float64 (8, 8, 3)"),
        (np.zeros((3, 8, 8), np.uint8), "not an array of uint8 (3, 8, 8)"),
        (np.zeros((8, 8, 2), np.uint8), "not an array of uint8 (8, 8, 2)"),
        (np.zeros((0, 8), np.uint8), "not an array of uint8 (0, 8)"),
        (np.zeros(8, np.uint8), "not an array of uint8 (8,)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_image_is_told_what_is(predictor, given, named):
    for ask in (predictor.predict, predictor.explain):
        with pytest.raises(ImageError) as caught:
            ask(given)
        assert str(caught.value).startswith("an image is a path, a file opened in binary mode, a Pillow image, or an ")
        assert str(caught.value).endswith(f", {named}")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "one",
    ["photo.jpg", Path("a.jpg"), b"\n", io.BytesIO(b"\n"), np.zeros((8, 8), np.uint8), np.zeros((8, 9, 3), np.uint8)],
    ids=["path", "Path", "bytes", "file", "L", "RGB"],
)
def test_one_image_is_not_taken_for_many(predictor, one):
    with pytest.raises(ValueError, match="predict takes one"):
        next(predictor.predict_iter(one))

    with pytest.raises(ValueError, match="predict takes one"):
        next(predictor.features_iter(one))


def test_features_are_what_the_head_classifies(predictor, tmp_path):
    """In order, also behind failures, and of any model: the logits are a linear map of them."""
    images, head = pictures(5), predictor.model.head
    *found, failure = predictor.features_iter([*images, tmp_path / "missing.png"], batch_size=2)
    for image, row in zip(images, found, strict=True):
        scores = (head(torch.from_numpy(row)) / predictor.about.temperature).softmax(0)
        torch.testing.assert_close(scores, by_hand(predictor, image), atol=1e-6, rtol=0)
    assert str(failure) == f"{tmp_path}/missing.png: no such file"
    predictor.model.norm.weight.data[0] = torch.nan
    assert "no number" in str(next(predictor.features_iter(images)))


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (torch.rand(2, 3, *SIZE), r"torch.float32 (2, 3, 16, 24)"),  # would be divided by 255 once more
        (torch.zeros(2, 3, 32, 48, dtype=torch.uint8), r"torch.uint8 (2, 3, 32, 48)"),
        (torch.zeros(3, *SIZE, dtype=torch.uint8), r"torch.uint8 (3, 16, 24)"),
        ("photo.jpg", "str"),
    ],
)
def test_pixels_of_another_kind_or_size_are_refused(predictor, pixels, found):
    expected = f"expected a torch.uint8 tensor (B, 3, 16, 24), of images as preprocess.load makes them, got {found}"
    for ask in (predictor.scores, predictor.features, lambda given: predictor.mapped(given, "rollout")):
        with pytest.raises(ValueError, match=re.escape(expected)):
            ask(pixels)


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_a_stream_keeps_order_and_goes_on_behind_failures(batch_size, predictor, tmp_path):
    images = pictures(5)
    (tmp_path / "bad.png").write_text("no image")
    sources = [*images[:2], str(tmp_path / "bad.png"), *images[2:], tmp_path / "missing.png"]
    results = list(predictor.predict_iter(sources, batch_size=batch_size, workers=2))
    good = [result for result in results if isinstance(result, Prediction)]
    for image, result in zip(images, good, strict=True):
        assert result.scores == pytest.approx(predictor.predict(image).scores, abs=1e-6)
    assert isinstance(results[2], ImageError)
    assert str(results[2]).startswith(f"{tmp_path}/bad.png: not an image")
    assert str(results[6]) == f"{tmp_path}/missing.png: no such file"
    with pytest.raises(ImageError, match=r"missing\.png: no such file"):
        predictor.predict(tmp_path / "missing.png")


def test_a_stream_takes_no_more_than_it_needs(predictor):
    (image,) = pictures(1)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield image

    stream = predictor.predict_iter(endless(), batch_size=4)
    assert isinstance(next(stream), Prediction)
    assert taken <= 4 * 4
    stream.close()
    taken = 0
    stream = predictor.predict_iter(endless(), batch_size=1)
    for number in (1, 2):  # as from a camera: none is waited for before this one's answer
        assert isinstance(next(stream), Prediction)
        assert taken == number
    stream.close()


def test_a_stream_left_unfinished_does_not_disturb_the_end_of_the_program(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code = (
        "import torch\nfrom vit import Predictor\n"
        f"stream = Predictor.from_checkpoint(device='cpu').predict_iter(['{tmp_path / 'a.png'}'] * 10, batch_size=2)\n"
        "print(next(stream).label)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_a_file_that_vanishes_meanwhile_is_a_failure_in_its_place(predictor, tmp_path):
    for i, image in enumerate(pictures(6)):
        image.save(tmp_path / f"{i}.png")

    def listed():
        for i in range(6):
            if i % 2:
                (tmp_path / f"{i}.png").unlink()
            yield tmp_path / f"{i}.png"

    results = list(predictor.predict_iter(listed(), batch_size=2))
    assert [isinstance(result, Prediction) for result in results] == [True, False] * 3
    assert str(results[1]) == f"{tmp_path}/1.png: no such file"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_compiled_model_says_the_same_and_is_compiled_once(precision, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # no C++ compiler, no wait
    path = checkpoint(tmp_path / "model.safetensors", scale=0.3)
    plain = Predictor.from_checkpoint(path, device="cpu", precision=precision)
    compiled = Predictor.from_checkpoint(path, device="cpu", precision=precision)
    compiled.compile(8)
    images = pictures(21)  # the last batch is not full
    torch._dynamo.reset()
    counters.clear()
    a, b = list(plain.predict_iter(images, batch_size=8)), list(compiled.predict_iter(images))
    assert [p.label for p in a] == [p.label for p in b]  # pyright: ignore
    assert [p.score for p in a] == pytest.approx([p.score for p in b], abs=1e-3)  # pyright: ignore
    assert counters["stats"]["unique_graphs"] == 1
    assert len(list(compiled.predict_iter(images, batch_size=16))) == 21  # larger ones are not compiled for
    assert counters["stats"]["unique_graphs"] == 1


def test_threads_get_what_one_gets(predictor):
    images = pictures(16)
    alone = [predictor.predict(image) for image in images]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(predictor.predict, images)) == alone


@pytest.mark.parametrize("many", [list, iter])
def test_the_same_image_or_file_may_be_given_many_times(predictor, tmp_path, many):
    """Not yet decoded, and to several threads."""
    (image,) = pictures(1)
    image.resize((900, 700)).save(tmp_path / "a.png")
    expected = list(predictor.predict_iter([tmp_path / "a.png"] * 16))
    for _ in range(5):
        with open(tmp_path / "a.png", "rb") as file, Image.open(tmp_path / "a.png") as opened:
            for source in (file, opened):
                assert list(predictor.predict_iter(many([source] * 16), workers=8)) == expected


def test_what_a_generator_gives_is_read_when_it_is_taken(predictor, tmp_path):
    """It may fill the same array again, go on to the next frame, or close the file."""
    images = [image.resize((40, 40)) for image in pictures(7)]
    expected = list(predictor.predict_iter(images))
    images[0].save(tmp_path / "all.tiff", save_all=True, append_images=images[1:])

    def refilled():
        array = np.empty((40, 40, 3), np.uint8)
        for image in images:
            array[:] = np.asarray(image)
            yield array

    def closed(kind):
        for number, image in enumerate(images):
            image.save(tmp_path / f"{number}.png")
            with kind(tmp_path / f"{number}.png") as file:
                yield file

    assert list(predictor.predict_iter(refilled())) == expected
    for kind in (partial(open, mode="rb"), Image.open):
        assert list(predictor.predict_iter(closed(kind))) == expected
    with Image.open(tmp_path / "all.tiff") as frames:
        assert list(predictor.predict_iter(ImageSequence.Iterator(frames))) == expected
    gone = io.BytesIO()
    gone.close()
    (failure,) = predictor.predict_iter(iter([gone]))
    assert isinstance(failure, ImageError)
    assert str(failure).startswith("damaged image (I/O operation on closed file")


def test_what_was_given_before_an_error_is_answered(predictor):
    images = pictures(7)

    def given():
        yield from images
        raise RuntimeError("the camera is gone")

    found = []
    with pytest.raises(RuntimeError, match="the camera is gone"):
        found.extend(predictor.predict_iter(given(), batch_size=3))  # extend keeps what came before
    assert found == list(predictor.predict_iter(images, batch_size=3))
    assert len(found) == 7


def test_a_pgm_of_16_bits_is_the_same_from_a_generator(predictor, tmp_path):
    """Pillow keeps it in 32 bits, and a copy of an image no longer says of what format it was."""
    grey = np.linspace(0, 65535, 48 * 48).reshape(48, 48).astype(">u2")
    (path := tmp_path / "grey.pgm").write_bytes(b"P5 48 48 65535\n" + grey.tobytes())
    of_file, *others = (
        next(predictor.predict_iter(images))
        for images in ([path], [Image.open(path)], (image for image in [Image.open(path)]))
    )
    assert all(other.scores == of_file.scores for other in others)


def test_batches_of_no_image_are_refused(predictor):
    with pytest.raises(ValueError, match="batch_size is 0, it must be at least 1"):
        next(predictor.predict_iter([np.zeros((9, 9), np.uint8)], batch_size=0))


def test_threads_may_take_the_same_image_from_generators(predictor, tmp_path):
    pictures(1)[0].resize((900, 700)).save(tmp_path / "a.png")
    expected = list(predictor.predict_iter([tmp_path / "a.png"] * 4))
    for _ in range(5):
        with (
            open(tmp_path / "a.png", "rb") as file,
            Image.open(tmp_path / "a.png") as opened,
            ThreadPoolExecutor() as pool,
        ):
            for source in (file, opened):
                found = pool.map(lambda source: list(predictor.predict_iter(iter([source] * 4))), [source] * 8)
                assert list(found) == [expected] * 8


def test_no_image_is_kept_when_it_is_answered(predictor):
    """Nor until garbage is collected, which servers put off."""

    class Frame(np.ndarray):
        pass

    gc.disable()
    try:
        frame = np.zeros((40, 40, 3), np.uint8).view(Frame)
        still = weakref.ref(frame)
        predictor.predict(frame)
        del frame
        assert still() is None
    finally:
        gc.enable()


def test_many_classes_are_not_all_printed():
    scores = {f"class {number}": 2.0**-number for number in range(1, 1001)}
    text = repr(Prediction("class 1", 0.5, scores))
    assert text.startswith("Prediction(label='class 1', score=0.5, scores={'class 1': 0.5, 'class 2': 0.25, ")
    assert text.endswith(", ... 990 more})")
    assert repr(Prediction("a", 1.0, {"a": 1.0})) == "Prediction(label='a', score=1, scores={'a': 1})"


def test_it_works_whatever_torch_was_told_before(tmp_path):
    (image,) = pictures(1)
    with torch.inference_mode():
        predictor = Predictor.from_checkpoint(checkpoint(tmp_path / "model.safetensors"), device="cpu")
        expected = predictor.predict(image)
    assert {predictor.explain(image, method=method).prediction.label for method in METHODS} == {expected.label}
    torch.set_default_dtype(torch.float64)
    try:
        assert predictor.predict(image) == expected
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system starts processes another way")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_gets_what_its_parent_gets(predictor):
    """Of OpenMP's threads it has none but its own: it would wait for the others for ever."""
    (image,) = pictures(1)
    expected, threads = predictor.predict(image), torch.get_num_threads()
    torch.set_num_threads(2)
    torch.ones(2**20).exp()
    if not (child := os.fork()):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)  # ends it
        torch.ones(2**20).exp()
        os._exit(abs(predictor.predict(image).score - expected.score) > 1e-5)
    torch.set_num_threads(threads)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "error", [ConnectionError("reset"), ValueError("I/O operation on closed file"), TypeError("x")]
)
def test_a_file_that_cannot_be_read_is_an_image_error(predictor, error):
    class Stream:
        def read(self, size=-1):
            raise error

    for ask in (predictor.predict, predictor.explain):
        with pytest.raises(ImageError, match=f"damaged image \\({error}\\)"):
            ask(Stream())


def test_bfloat16_agrees_on_the_label(tmp_path):
    path = checkpoint(tmp_path / "model.safetensors", scale=0.3)
    exact = Predictor.from_checkpoint(path, device="cpu")
    fast = Predictor.from_checkpoint(path, device="cpu", precision="bfloat16")
    images = pictures(200)
    a, b = list(exact.predict_iter(images)), list(fast.predict_iter(images))
    assert [p.label for p in a] == [p.label for p in b]  # pyright: ignore
    differences = [abs(p.score - q.score) for p, q in zip(a, b, strict=True)]  # pyright: ignore
    assert 0 < max(differences) < 0.02  # another computation, to two digits
    head = exact.model.head.weight.data
    head[1:] = head[0] + 2e-3 * torch.randn(2, head.shape[1])  # three classes that are one in so few digits
    fast.model.load_state_dict(exact.model.state_dict())
    a, b = list(exact.predict_iter(images)), list(fast.predict_iter(images))
    assert len({p.label for p in a}) > 1  # pyright: ignore
    assert [p.label for p in a] == [p.label for p in b]  # pyright: ignore


def test_explanation_is_the_map_of_that_pass(predictor):
    image = pictures(1)[0].resize((100, 50))
    explanation = predictor.explain(image)
    assert isinstance(explanation, Explanation)
    pixels = predictor.preprocess.normalize(predictor.preprocess(image)[None])
    logits, maps = attention_map(predictor.model, pixels, method="rollout")
    np.testing.assert_allclose(explanation.grid, maps[0], atol=1e-6)
    torch.testing.assert_close(
        torch.tensor([explanation.prediction.scores[name] for name in NAMES]), logits.softmax(1)[0]
    )
    assert explanation.prediction.scores == pytest.approx(predictor.predict(image).scores, abs=1e-6)
    assert explanation.box == (12.5, 0, 87.5, 50)
    assert explanation.map.shape == (50, 76)  # the pixels of the box, its edges rounded
    assert (explanation.map.min(), explanation.map.max()) == pytest.approx((0, 1), abs=0.05)
    assert explanation.target == explanation.prediction.label
    assert isinstance(explanation.overlay(), Image.Image)


def test_a_large_jpeg_is_explained_as_it_is_predicted(predictor, tmp_path):
    random = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    Image.fromarray(random).save(tmp_path / "a.jpg")
    expected = predictor.predict(tmp_path / "a.jpg").scores
    data = (tmp_path / "a.jpg").read_bytes()
    pipe = io.BytesIO(data)
    pipe.seekable = pipe.seek = lambda *_: False  # pyright: ignore
    for source in (tmp_path / "a.jpg", io.BytesIO(data), pipe):
        explanation = predictor.explain(source)
        assert explanation.prediction.scores == pytest.approx(expected, abs=1e-6)
        assert explanation.image.size == (800, 600)


def test_an_image_of_12_bits_is_shown_as_it_is_seen(predictor, tmp_path):
    grey = np.linspace(0, 255, 30 * 40).reshape(30, 40)
    Image.fromarray((grey * 16).astype(np.uint16)).save(tmp_path / "a.png")
    about = replace(predictor.about, preprocess=replace(predictor.preprocess, white=4080))
    shown = Predictor(predictor.model, about, device="cpu").explain(tmp_path / "a.png").image
    assert np.abs(np.asarray(shown)[..., 0] - grey).max() <= 1


def test_a_model_in_training_is_asked_as_one_that_is_trained(predictor):
    (image,) = pictures(1)
    expected = predictor.predict(image)
    again = Predictor(predictor.model.train(), predictor.about, device="cpu")
    assert not again.model.training
    assert again.predict(image) == expected


def test_explanation_of_a_class(predictor):
    (image,) = pictures(1)
    maps = {name: predictor.explain(image, target=name) for name in NAMES}
    assert all(e.method == CLASS_METHOD and e.target == name for name, e in maps.items())
    assert not np.allclose(maps["cat"].grid, maps["dog"].grid)
    contrast = predictor.explain(image, target="cat", against="dog")
    assert not np.allclose(contrast.grid, maps["cat"].grid)
    assert (contrast.target, contrast.against) == ("cat", "dog")
    assert contrast.caption == f"cat, not dog {contrast.prediction.scores['cat']:.1%} · {CLASS_METHOD}"
    with pytest.raises(ValueError, match="no class 'horse'"):
        predictor.explain(image, target="cat", against="horse")
    assert maps["cat"].caption == f"cat {maps['cat'].prediction.scores['cat']:.1%} · {maps['cat'].method}"
    with pytest.raises(ValueError, match="no class 'horse'; the classes are cat, dog, frog"):
        predictor.explain(image, target="horse")
    with pytest.raises(ValueError, match="method 'magic' is not one of rollout"):
        predictor.explain(image, method="magic")
    with pytest.raises(ImageError, match="nowhere: no such file"):
        predictor.explain("nowhere")


def test_a_class_is_known_by_either_way_to_write_an_accent(predictor):
    """As two characters, which macOS makes of one, or as one; and an empty name is a name."""
    about = replace(predictor.about, class_names=("cafe\u0301", "", "na\u00efve"))
    (image,), predictor = pictures(1), Predictor(predictor.model, about, device="cpu")
    for name, called in (("caf\u00e9", "cafe\u0301"), ("nai\u0308ve", "na\u00efve"), ("", "")):
        explanation = predictor.explain(image, target=name)
        assert explanation.target == called
        assert explanation.caption.startswith(called)
    with pytest.raises(ValueError, match="target and against are both"):
        predictor.explain(image, target="caf\u00e9", against="cafe\u0301")


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1), (7, 2999)])
def test_a_map_is_as_large_as_what_the_model_saw_of_a_thin_line(size, predictor):
    explanation = predictor.explain(Image.new("RGB", size))
    assert explanation.map.shape == explanation.image.crop(explanation.box).size[::-1]


def test_no_maps_are_not_measured(predictor):
    with pytest.raises(ValueError, match="score_maps measures maps: name the method"):
        next(predictor.classify([pictures(1)], score_maps=True))


def test_a_class_is_not_set_against_itself(predictor):
    (image,) = pictures(1)
    with pytest.raises(ValueError, match="target and against are both 'cat'; a class can only be"):
        predictor.explain(image, target="cat", against="cat")
    label = predictor.predict(image).label
    with pytest.raises(ValueError, match=f"against is '{label}', which is the predicted class; name another one"):
        predictor.explain(image, against=label)


def test_a_notebook_shows_one_line_or_the_picture(tmp_path):
    path = checkpoint(tmp_path / "model.safetensors")
    predictor = Predictor.from_checkpoint(path, device="cpu")
    assert repr(predictor) == f"<Predictor {path}: 3 classes, 16 x 24 pixels, cpu>"
    direct = Predictor(predictor.model, predictor.about, device="cpu")
    assert repr(direct) == "<Predictor: 3 classes, 16 x 24 pixels, cpu>"
    explanation = predictor.explain(pictures(1)[0], target="cat", against="dog")
    assert repr(explanation) == f"<Explanation {explanation.caption}: 2 x 3 patches>"
    with Image.open(io.BytesIO(explanation._repr_png_() or b"")) as shown:
        assert shown.format == "PNG"
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(explanation.overlay()))


def test_what_cannot_be_built_is_said_in_one_line(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "model.safetensors")
    for options, message in {
        ("device", "gpu"): "no device 'gpu'",
        ("device", None): "no device None; use auto, cpu, cuda",
        ("device", "cuda:77"): "device 'cuda:77' cannot be used",
        ("device", "meta"): "device 'meta' cannot be used: .*; use auto, cpu, cuda",  # takes models, computes nothing
        ("device", "hpu"): "device 'hpu' cannot be used: .*; use auto, cpu, cuda",  # belongs to a package of its own
        ("precision", "int3"): "precision must be auto, float32 or bfloat16, got 'int3'",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            Predictor.from_checkpoint(path, **dict([options]))  # pyright: ignore
        assert "\n" not in str(caught.value)
    with pytest.raises(
        CheckpointError, match=r"five\.safetensors: image files have 1 or 3 channels, the model expects 5"
    ):
        Predictor.from_checkpoint(checkpoint(tmp_path / "five.safetensors", channels=5))
    monkeypatch.setattr("vit.predictor.SHIPPED", tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: the weights that come with the code are missing"):
        Predictor.from_checkpoint()


def test_a_folder_or_a_name_of_timm_is_a_checkpoint_too(tmp_path, monkeypatch):
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=3, depth=1, num_classes=3)
    save_for_hf(theirs, str(tmp_path), model_config={"label_names": list(NAMES)}, safe_serialization=True)
    found = Predictor.from_checkpoint(tmp_path, device="cpu")
    assert found.class_names == NAMES
    with torch.inference_mode():
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(found.model(images), theirs.eval()(images), rtol=0, atol=1e-5)
    with pytest.raises(
        CheckpointError, match=r"vit_tiny_patch99: neither a file or folder nor the name of a timm model"
    ):
        Predictor.from_checkpoint("vit_tiny_patch99")
    weights = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: theirs)  # without a download
    monkeypatch.setattr("vit.pretrained.load_weights", lambda model, **more: model.load_state_dict(weights))
    assert Predictor.from_checkpoint("vit_tiny_patch16_224", device="cpu").class_names == ("0", "1", "2")


def test_a_model_that_gives_no_numbers_is_an_error(predictor):
    def broken(model, images, ask):
        return model(images).detach(), torch.full((len(images), 7), torch.nan)

    (image,) = pictures(1)
    with pytest.MonkeyPatch.context() as patch:  # scores that are numbers, and a map that is none
        patch.setitem(METHODS, "last", broken)
        (batch,) = predictor.classify([[image]], method="last", score_maps=True)
        assert "no number" in str(batch.errors[0])
        assert len(batch.scores) == len(batch.grids) == 0
        with pytest.raises(ImageError, match="no number"):
            predictor.explain(image, method="last")
    predictor.model.head.weight.data[0] = torch.nan
    (result,) = predictor.predict_iter([image])
    assert isinstance(result, ImageError)
    assert "no number" in str(result)
    for method in METHODS:
        with pytest.raises(ImageError, match="the model gives no number"):
            predictor.explain(image, method=method)


def test_a_map_score_takes_34_passes():
    """As its option says: 16 steps and the whole image, in two orders."""
    predictor, seen = Predictor.from_checkpoint(device="cpu"), []
    pixels = torch.stack([predictor.preprocess.load(image) for image in pictures(3)])
    scores, grids = predictor.mapped(pixels, "rollout")
    predictor.model.register_forward_hook(lambda model, images, output: seen.append(len(output)))
    predictor.map_scores(pixels, grids, scores.argmax(1))
    assert sum(seen) == 3 * 34


def test_any_kind_of_path_is_named(tmp_path):
    (tmp_path / "folder.jpg").mkdir()
    with os.scandir(tmp_path) as entries, pytest.raises(ImageError, match=r"folder\.jpg: a folder, not an image file$"):
        Predictor.from_checkpoint(device="cpu").predict(next(entries))  # type: ignore[arg-type]


def test_grey_model(tmp_path):
    predictor = Predictor.from_checkpoint(checkpoint(tmp_path / "grey.safetensors", channels=1))
    (image,) = pictures(1)
    assert predictor.predict(image) == predictor.predict(image.convert("L"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system starts processes another way")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_while_threads_decode_can_decode():
    image = pictures(1)[0]
    with ExitStack() as held:
        for lock in (*preprocess._turns, preprocess._one_large):
            held.enter_context(lock)
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            open_image(image)
            os._exit(preprocess._one_large.locked())
        assert os.waitpid(child, 0)[1] == 0


def test_batches():
    assert list(batches(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]
    assert list(batches([], 2)) == []


def test_names_from_the_package():
    assert (vit.Predictor, vit.Prediction, vit.Explanation) == (Predictor, Prediction, Explanation)
