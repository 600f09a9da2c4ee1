"""What a CIFAR-10 checkpoint is worth on the test images: ``python -m benchmarks.cifar10 --checkpoint FILE``.

Accuracy with and without averaging over the mirrored image, accuracy of each class, calibration error before and after
the temperature, the most frequent confusions, and how many labels bfloat16 changes. Touch it when the model is chosen.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from benchmarks.record import record
from data.sources import load_source
from vit.checkpoint import load_checkpoint
from vit.predictor import Prediction, Predictor

BATCH = 500


def precisions(checkpoint: str, images: list[Path]) -> dict[str, float]:
    """Labels and scores of predict.py, which computes in bfloat16 where that is fast, beside those in float32."""
    fast, exact = (Predictor.from_checkpoint(checkpoint, precision=name) for name in ("bfloat16", "float32"))
    same, difference = 0, 0.0
    for a, b in zip(fast.predict_iter(images), exact.predict_iter(images), strict=True):
        assert isinstance(a, Prediction)
        assert isinstance(b, Prediction)
        same += a.label == b.label
        difference = max(difference, max(abs(a.scores[name] - b.scores[name]) for name in a.scores))
    return {"images": len(images), "same label": same, "largest difference of a score": round(difference, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="vit/weights/cifar10.safetensors", help="default: the shipped weights")
    parser.add_argument("--data", default=os.environ.get("CIFAR10_JPEG", "cifar10"), help="cifar10, or a folder of it")
    parser.add_argument("--name", default="cifar10", help="of the result file")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, about = load_checkpoint(args.checkpoint)
    model.to(device)
    source = load_source(args.data)
    assert source.test is not None
    labels, classes = source.test.labels, len(about.class_names)
    if source.class_names != about.class_names:
        raise SystemExit(f"classes of {args.data} and of {args.checkpoint} differ")

    def logits(flip: bool) -> Tensor:
        parts = []
        with torch.inference_mode():
            for chunk in torch.arange(len(labels)).split(BATCH):
                images = about.preprocess.normalize(source.test.images[chunk].to(device))  # type: ignore[union-attr]
                parts.append(model(images.flip(-1) if flip else images).cpu())
        return torch.cat(parts)

    plain = logits(flip=False)
    averaged = (plain.softmax(1) + logits(flip=True).softmax(1)) / 2
    right = plain.argmax(1) == labels

    def ece(values: Tensor) -> float:
        return float(multiclass_calibration_error(values.softmax(1), labels, classes, n_bins=15))

    rows = [
        {"what": "accuracy", "value": float(right.float().mean())},
        {"what": "accuracy, flip averaged", "value": float((averaged.argmax(1) == labels).float().mean())},
        {"what": "calibration error, raw", "value": ece(plain)},
        {"what": "calibration error, temperature", "value": ece(plain / about.temperature)},
    ]
    rows += [
        {"what": f"accuracy, {name}", "value": float(right[labels == i].float().mean())}
        for i, name in enumerate(about.class_names)
    ]
    pairs = torch.bincount(labels * classes + plain.argmax(1), minlength=classes**2).view(classes, classes)
    pairs.fill_diagonal_(0)
    for place in pairs.flatten().topk(5).indices.tolist():
        was, said = divmod(place, classes)
        rows.append(
            {
                "what": f"{about.class_names[was]} taken for {about.class_names[said]}",
                "value": int(pairs[was, said]) / int((labels == was).sum()),
            }
        )
    table = Table(f"{os.path.basename(args.checkpoint)}, {len(labels):,} test images", "")
    for row in rows:
        table.add_row(row["what"], f"{row['value']:.2%}")
    Console().print(table)
    parameters = sum(p.numel() for p in model.parameters())
    facts: dict[str, Any] = {"parameters": parameters, "temperature": about.temperature}
    facts |= {"metrics": about.metrics, "training": about.training}
    if Path(args.data).is_dir():
        facts["bfloat16"] = precisions(args.checkpoint, sorted(Path(args.data, "test").rglob("*.jpg")))
        print(facts["bfloat16"])
    print(
        record(
            args.name,
            rows,
            images=len(labels),
            data="CIFAR-10 (JPEG copy)" if args.data != "cifar10" else "CIFAR-10",
            **facts,
        )
    )


if __name__ == "__main__":
    main()
