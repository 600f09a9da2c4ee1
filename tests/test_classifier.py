"""The system learns, measures what scikit-learn measures, and keeps what a checkpoint must hold."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer
from sklearn import metrics
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from data.datamodule import Batch, ImageDataModule
from vit.calibration import Temperature
from vit.checkpoint import load_checkpoint
from vit.classifier import BalancedAccuracy, ViTClassifier, compiled, compiler_fault

CLASSES = tuple("abcdefg")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no .val_dataloader"),
]


def classifier(kind: type[ViTClassifier] = ViTClassifier, **change: Any) -> ViTClassifier:
    torch.manual_seed(0)
    settings = {
        "image_size": (8, 8),
        "class_names": CLASSES,
        "mean": (0.5,),
        "std": (0.25,),
        "patch_size": 2,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
    }
    return kind(**{**settings, **change})


def trainer(tmp_path: Path, **change: Any) -> Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**settings, **change})


def batch_of(count: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    labels = torch.randint(0, len(CLASSES), (count,), generator=generator)
    return Batch(images, labels, torch.arange(count), 0)


def loader(*batches: Batch) -> DataLoader:
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def parts(batch: Batch, size: int) -> list[Batch]:
    """A set in batches, of which the last is smaller."""
    pieces = zip(batch.images.split(size), batch.labels.split(size), batch.indices.split(size), strict=True)
    return [Batch(*piece, 0) for piece in pieces]


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Guo et al. 2017, eq. 3, with 15 bins, straight from the definition."""
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((confidence * 15).astype(int), 14)
    return sum(
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)
    )


def logits_of(model: ViTClassifier, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images)


# Learning


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_overfits_one_batch(tmp_path, optimizer):
    batch = batch_of(16)
    model = classifier(optimizer=optimizer, lr=1e-2, weight_decay=0.0)
    trainer(tmp_path, max_epochs=1).fit(model, loader(*[batch] * 120))
    logits = logits_of(model, batch.images)
    assert torch.equal(logits.argmax(-1), batch.labels)
    assert F.cross_entropy(logits, batch.labels) < 0.1


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_smoothed_cross_entropy(tmp_path, smoothing):
    batch, model = batch_of(16), classifier(label_smoothing=smoothing)
    log_p = logits_of(model, batch.images).log_softmax(-1)
    right = log_p.gather(1, batch.labels[:, None]).mean()
    expected = -(1 - smoothing) * right - smoothing * log_p.mean()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model.train(), loader(batch))
    assert float(run.callback_metrics["train/loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_learning_rate_ends_near_zero_after_its_peak(tmp_path):
    model, rates = classifier(lr=0.5, warmup=0.25, schedule="linear"), []
    model.on_train_batch_end = lambda *_: rates.append(model.trainer.optimizers[0].param_groups[0]["lr"])  # type: ignore
    trainer(tmp_path, max_epochs=2).fit(model, loader(*[batch_of(4)] * 4))
    # After each step the rate of the next: 2 steps of warm-up, the peak at the third, 0 after the last.
    assert rates == pytest.approx([0.5 * x for x in (2 / 3, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0)])


def test_layer_decay_reaches_the_optimiser(tmp_path):
    model = classifier(lr=0.01, optimizer="adamw", layer_decay=0.5)
    (run := trainer(tmp_path, max_steps=1)).fit(model, loader(batch_of(4)))
    rates = {group["initial_lr"] for group in run.optimizers[0].param_groups}
    assert rates == {0.01, 0.01 / 2, 0.01 / 4, 0.01 / 8}  # head, two blocks, embedding


def test_endless_run_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"give trainer.max_epochs or trainer.max_steps"):
        trainer(tmp_path, max_epochs=-1).fit(classifier(), loader(batch_of(4)))


def test_stochastic_depth_draws_by_step(tmp_path):
    """Not by the state that earlier draws have left."""
    results = []
    for noise in (0, 1):
        model = classifier(drop_path_rate=0.5, depth=4)
        torch.manual_seed(noise)
        trainer(tmp_path, max_epochs=1).fit(model, loader(*[batch_of(8)] * 3))
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(*results)


# Resolution


class Stepped(ViTClassifier):
    """A classifier at a step of our choice."""

    step = 0

    @property
    def global_step(self) -> int:
        return self.step


def test_resolution_follows_its_schedule():
    model = classifier(Stepped, resolution=[(0.6, 0.75), (0.3, 0.5)], image_size=(8, 16))
    model.total_steps = 10
    images, sizes = torch.randn(2, 1, 8, 16), []
    for model.step in range(11):  # type: ignore[misc]
        scaled = model.rescale(images)
        sizes.append(tuple(scaled.shape[2:]))
        assert model(scaled).shape == (2, len(CLASSES))
    assert sizes == [(4, 8)] * 3 + [(6, 12)] * 3 + [(8, 16)] * 5


def test_compiled_network_is_the_same_function_of_the_same_weights(monkeypatch):
    """Traced and called in PyTorch, so that no compiler is needed here."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = classifier(drop_path_rate=0.2).train()
    names, images = set(model.state_dict()), torch.randn(2, 1, 8, 8)
    outputs = []
    for network in (model.vit, compiled(model.vit)):
        torch.manual_seed(1)
        outputs.append(network(images))
        outputs.append(torch.autograd.grad(outputs[-1].square().sum(), model.vit.head.weight)[0])
    torch.testing.assert_close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[3])
    assert set(model.state_dict()) == names


def test_a_machine_that_cannot_compile_says_so_and_trains_on(tmp_path, monkeypatch, capsys):
    """As torch does it where no C++ compiler is found."""
    fault = "InvalidCxxCompiler: No working C++ compiler found in ('g++',)"

    def compile(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{fault}\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", compile)
    model, module = classifier(compile=True), LightningDataModule.from_datasets()
    for name, value in (("train_dataloader", lambda: loader(batch_of(8))), ("compile", True)):
        setattr(module, name, value)
    trainer(tmp_path, max_steps=1).fit(model, datamodule=module)
    assert model.network is model.vit
    assert vars(module)["compile"] is False  # nor is the augmentation
    assert capsys.readouterr().err == f"going on without model.compile, which fails here: {fault}\n"


@pytest.fixture
def usual_compiler():
    """Its settings, which are as they were after the test."""
    from torch._inductor import config

    with config.patch({"cpp.simdlen": None}):
        yield config
    torch.compiler.reset()


@pytest.mark.parametrize("cure", [True, False])
def test_code_that_computes_something_else_is_not_trained_with(cure, monkeypatch, usual_compiler):
    config = usual_compiler

    def compile(function: Any) -> Any:
        wrong = not cure or config.cpp.simdlen != 256
        return lambda *given: function(*given) * (torch.nan if wrong else 1)

    monkeypatch.setattr(torch, "compile", compile)
    assert compiler_fault(torch.device("cpu")) == (None if cure else "what is compiled computes something else")
    assert config.cpp.simdlen == 256


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.usefixtures("usual_compiler")
def test_compiled_gradients_are_those_of_the_plain_model():
    """In 16 bits and in the shape of the CIFAR-10 recipe, where a compiler's mistake ended a run."""
    assert compiler_fault(torch.device("cpu")) is None
    shape = {"image_size": (16, 16), "embed_dim": 32, "depth": 1, "num_heads": 1}
    model = classifier(**shape, pool="mean", qk_norm=True, rope=True).vit.train()
    images, gradients = torch.randn(8, 1, 16, 16), []
    for network in (model, compiled(model)):
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(network(images).float(), torch.arange(8) % 7)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    largest = max(gradient.abs().max() for gradient in gradients[0])
    for expected, found in zip(*gradients, strict=True):
        assert (found - expected).abs().max() < 0.05 * largest


def test_small_images_are_means_of_large_ones():
    """Antialiased: no detail aliases into them. Halving an even ramp gives the mean of each pair of pixels."""
    model = classifier(Stepped, resolution=[(1.0, 0.5)])
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    torch.testing.assert_close(model.rescale(ramp)[..., 1:-1], (ramp[..., ::2] + 0.5)[..., ::2, 1:-1])
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    assert model.rescale(stripes)[..., 1:-1].abs().max() < 0.3
    model = classifier(Stepped, resolution=[(1.0, 0.25)], image_size=(16, 16))
    stripes = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(4).expand(1, 1, 16, 16)  # of which two of four would be seen
    assert model.rescale(stripes)[..., 1:-1].abs().max() < 0.3


@pytest.mark.parametrize(
    ("resolution", "message"),
    [
        ([(0.5, 0.4)], "3 is not a multiple of patch size 2"),
        ([(1.5, 0.5)], r"must be in \(0, 1\], got \(1.5, 0.5\)"),
        ([(0.5, 0)], r"must be in \(0, 1\], got \(0.5, 0.0\)"),
    ],
)
def test_resolution_that_cannot_be(resolution, message):
    with pytest.raises(ValueError, match=message):
        classifier(resolution=resolution)


# Measuring


@pytest.fixture
def measured() -> tuple[ViTClassifier, Batch, np.ndarray]:
    """A model with opinions, 37 images and the model's probabilities of them; only training smooths labels."""
    model, batch = classifier(label_smoothing=0.3), batch_of(37)
    torch.nn.init.normal_(model.vit.head.weight, std=0.5)
    return model, batch, logits_of(model, batch.images).double().softmax(-1).numpy()


@pytest.mark.parametrize("size", [8, 37, 1])
def test_validation_measures_what_scikit_learn_does(tmp_path, measured, size):
    model, batch, probabilities = measured
    empty = Batch(batch.images[:0], batch.labels[:0], batch.indices[:0], 0)  # of a rank with nothing to do
    (found,) = trainer(tmp_path).validate(model, loader(*parts(batch, size), empty), verbose=False)
    labels = batch.labels.numpy()
    everything = list(range(len(CLASSES)))
    present = sorted({*labels.tolist(), *probabilities.argmax(1).tolist()})
    assert found == pytest.approx(
        {
            "val/acc": metrics.accuracy_score(labels, probabilities.argmax(1)),
            "val/balanced_acc": metrics.recall_score(
                labels,
                probabilities.argmax(1),
                labels=present,
                average="macro",
                zero_division=0,  # type: ignore[arg-type]
            ),
            "val/acc5": metrics.top_k_accuracy_score(labels, probabilities, k=5, labels=everything),
            "val/loss": metrics.log_loss(labels, probabilities, labels=everything),
            "val/ece": calibration_error(probabilities, labels),
            "val/ece_calibrated": calibration_error(probabilities, labels),  # by a temperature of 1
        },
        abs=5e-6,
    )
    assert 0 < found["val/acc"] < found["val/acc5"] < 1
    assert model.temperature == 1  # fitted in training only


def test_a_class_without_images_does_not_count():
    named, labels = torch.tensor([0, 2, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 1])
    metric = BalancedAccuracy(4)
    metric.update(torch.nn.functional.one_hot(named, 4).float(), labels)
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        wanted = metrics.balanced_accuracy_score(labels, named)
    assert metric.compute().item() == pytest.approx(wanted)


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


@pytest.mark.parametrize("deterministic", [False, True])
def test_many_classes_take_no_table_of_pairs(deterministic):
    """Neither for a batch nor, where sums are made in a fixed order, for each image."""
    names = tuple(map(str, range(300)))
    model, batch = classifier(class_names=names), batch_of(8)
    scores = logits_of(model, batch.images).softmax(-1)
    torch.use_deterministic_algorithms(deterministic)
    try:
        with Largest() as largest:
            model.val_metrics.update(scores, batch.labels)
            found = model.val_metrics.compute()
            assert largest.numbers < 10 * len(names)
            assert model.confusion_matrix is not None
            model.confusion_matrix.update(batch.labels, batch.labels)
            assert largest.numbers == len(names) ** 2
    finally:
        torch.use_deterministic_algorithms(False)
    assert 0 <= found["val/balanced_acc"] <= 1
    assert model.confusion_matrix.compute().diagonal().sum() == 8


@pytest.mark.parametrize(("what", "stage"), [("test", "test"), ("validate", "val")])
def test_a_measurement_is_of_calibrated_probabilities_too(tmp_path, measured, what, stage):
    model, batch, probabilities = measured
    model.temperature.fill_(2.5)
    (found,) = getattr(trainer(tmp_path), what)(model, loader(*parts(batch, 8)), verbose=False)
    labels, softer = batch.labels.numpy(), probabilities**0.4
    assert found[f"{stage}/acc"] == pytest.approx(metrics.accuracy_score(labels, probabilities.argmax(1)))
    assert found[f"{stage}/ece"] == pytest.approx(calibration_error(probabilities, labels), abs=1e-6)
    softer = softer / softer.sum(1, keepdims=True)
    assert found[f"{stage}/ece_calibrated"] == pytest.approx(calibration_error(softer, labels), abs=1e-6)


@pytest.mark.parametrize("count", [2, 5])
def test_so_few_classes_have_no_top_five(tmp_path, count):
    model, batch = classifier(class_names=CLASSES[:count]), batch_of(8)
    batch = batch._replace(labels=batch.labels % count)
    assert "val/acc5" not in trainer(tmp_path).validate(model, loader(batch), verbose=False)[0]


@pytest.mark.parametrize("what", ["test", "validate"])
def test_a_measurement_counts_what_was_taken_for_what(tmp_path, measured, what):
    model, batch, probabilities = measured
    model.confusion = None
    for _ in range(2):  # the second counts from nothing
        getattr(trainer(tmp_path), what)(model, loader(*parts(batch, 8)), verbose=False)
    expected = metrics.confusion_matrix(batch.labels.numpy(), probabilities.argmax(1), labels=range(len(CLASSES)))
    assert model.confusion is not None
    assert model.confusion.tolist() == expected.tolist()


def test_metrics_start_afresh_each_epoch_and_temperature_is_the_best(tmp_path):
    model, batch = classifier(lr=0.01), batch_of(37)
    run = trainer(tmp_path, max_epochs=3)
    run.fit(model, loader(batch_of(16, seed=1)), loader(*parts(batch, 8)))
    logits = logits_of(model, batch.images)
    expected = Temperature()
    expected.update(logits, batch.labels)
    assert float(model.temperature) == pytest.approx(float(expected.compute()), rel=1e-4)
    assert float(model.temperature) != 1
    assert float(run.callback_metrics["val/loss"]) == pytest.approx(
        float(F.cross_entropy(logits, batch.labels)), rel=1e-5
    )


# What is kept


@pytest.fixture
def saved(tmp_path) -> tuple[ViTClassifier, Path]:
    model, run = classifier(resolution=[(0.5, 0.5)]), trainer(tmp_path, max_epochs=1)
    run.fit(model, loader(batch_of(8)), loader(batch_of(9, seed=1)))
    run.save_checkpoint(tmp_path / "run.ckpt")
    return model, tmp_path / "run.ckpt"


def plain(value: Any) -> bool:
    """Whether it is numbers, texts and containers of them."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(plain, value))
    return value is None or type(value) in (bool, int, float, str)


def test_checkpoint_is_tensors_and_plain_data(saved):
    raw = torch.load(saved[1], weights_only=True)
    assert plain(raw["vit"])
    assert plain(dict(raw["hyper_parameters"]))
    json.dumps(raw["vit"], allow_nan=False)
    assert raw["hyper_parameters"]["embed_dim"] == 16


def test_checkpoint_gives_the_same_model_and_says_what_it_is(saved):
    model, path = saved
    loaded, about = load_checkpoint(path)
    images = batch_of(5).images
    with torch.no_grad():
        assert torch.equal(loaded(images), logits_of(model, images))
    assert about.class_names == CLASSES
    assert about.preprocess == model.preprocess
    assert about.temperature == float(model.temperature)
    assert about.metrics.keys() == {"val/acc", "val/acc5", "val/balanced_acc", "val/ece", "val/loss"}
    assert (about.training["steps"], about.training["devices"]) == (1, 1)
    assert about.training["torch"] == str(torch.__version__)
    checkpoint: dict[str, Any] = {"state_dict": {"temperature": torch.tensor(9.0)}}  # as where weights are averages
    model.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"]["temperature"] == model.temperature
    assert model.about().metrics == about.metrics
    model.validated = 0  # as if they had been trained on since
    assert model.about().metrics == {}


def test_minutes_are_those_of_all_parts_of_a_run(saved, tmp_path):
    raw = torch.load(saved[1], weights_only=True)
    raw["vit"]["training"]["minutes"] = 7.0
    torch.save(raw, saved[1])
    model, run = classifier(resolution=[(0.5, 0.5)]), trainer(tmp_path, max_epochs=2)
    run.fit(model, loader(batch_of(8)), loader(batch_of(9, seed=1)), ckpt_path=saved[1], weights_only=True)
    assert 7 <= model.about().training["minutes"] < 8


@pytest.mark.parametrize("measured", ["model", "data"])
def test_a_training_behind_a_measurement_begins_at_its_own_beginning(tmp_path, measured):
    """Whether it is of the model or with the data module to which the checkpoint was given."""

    class Recorder(ViTClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            seen.append((batch.epoch, int(batch.indices[0])))
            return super().training_step(batch, batch_idx)

    seen: list[tuple[int, int]] = []
    facts = {"class_names": tuple("0123456789"), "mean": (0.3,), "std": (0.4,)}
    images = ImageDataModule(dataset="digits", batch_size=400)
    model = classifier(Recorder, **facts)
    (run := trainer(tmp_path, max_epochs=2, limit_val_batches=0)).fit(model, images)
    run.save_checkpoint(tmp_path / "run.ckpt")
    whole = seen.copy()
    run.test(model, images, ckpt_path=tmp_path / "run.ckpt", weights_only=True, verbose=False)
    seen.clear()
    if measured == "data":
        trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(classifier(Recorder, **facts), images)
        assert seen == whole
        assert images.preprocess.mean == tuple(images.mean)
    else:
        images = ImageDataModule(dataset="digits", batch_size=200)
        trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(model, images)
        assert len(seen) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embed_dim": 32}, "embed_dim 16, this one 32"),
        ({"class_names": tuple("gfedcb")}, "class 0 is a, here it is g, of 7 classes and of 6"),
    ],
)
def test_checkpoint_of_another_model_is_refused(tmp_path, saved, change, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).validate(
            classifier(**change), loader(batch_of(4)), ckpt_path=saved[1], weights_only=True, verbose=False
        )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_all_blocks_of_a_model_that_is_shared_out_are_compiled(tmp_path, monkeypatch):
    """At every size of the images; they are compiled one by one, each for its rate of stochastic depth."""
    graphs: list[Any] = []
    settings: dict[str, Any] = {"backend": lambda graph, inputs: graphs.append(graph) or graph.forward}
    monkeypatch.setattr(torch, "compile", partial(torch.compile, **settings))
    torch.compiler.reset()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        vit = classifier(depth=10, drop_path_rate=0.1).vit.train()
        mesh = init_device_mesh("cpu", (1,))
        for part in (*vit.blocks, vit):
            fully_shard(part, mesh=mesh)
        network, counts = compiled(vit), []
        for size in (8, 6, 4):
            network(torch.randn(2, 1, size, size)).sum().backward()
            counts.append(len(graphs) - sum(counts))
    finally:
        torch.distributed.destroy_process_group()
        torch.compiler.reset()
    assert min(counts) >= 10  # torch stops at 8, unless told (which timm.optim does as it is imported)
