"""Images a second on the CPU of the exported ONNX file beside PyTorch, both giving logits, probabilities and map.

``python -m benchmarks.onnx_speed`` writes benchmarks/results/onnx_speed.json. Both run in turns with the same number of
threads, so that a busy machine is busy for both.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import onnxruntime
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import record
from vit.checkpoint import Checkpoint
from vit.export import OUTPUTS, Explained, export_onnx
from vit.memory import keep_freed_memory
from vit.model import VisionTransformer
from vit.preprocess import Preprocess

MODELS = {
    "ViT-Ti/16 at 224": {"image_size": 224, "patch_size": 16, "embed_dim": 192, "num_heads": 3},
    "configs/cifar10_cpu.yaml": {
        **{"image_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 10},
        **{"pool": "mean", "stem": "conv", "qk_norm": True, "rope": True},
    },
}


def rates(runs: dict[str, Callable[[], object]], images: int, repeats: int) -> dict[str, float]:
    """Images a second of each run: the median over repeats, taken in turns, the second of two in a row.

    During the first the other's threads come to rest, which wait for more work in a loop.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in list(runs.items())[:: 1 if repeat % 2 else -1]:
            run()
            started = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - started)
    return {name: images / statistics.median(found) for name, found in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="timed batches of each (default: 10)")
    args = parser.parse_args()
    keep_freed_memory()  # as predict.py does
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    rows = []
    for name, arguments in MODELS.items():
        torch.manual_seed(0)
        model = VisionTransformer(**arguments).eval()
        names = tuple(map(str, range(model.num_classes)))
        preprocess = Preprocess(image_size=model.image_size, mean=(0.5,) * 3, std=(0.25,) * 3)
        about = Checkpoint(architecture=model.architecture, class_names=names, preprocess=preprocess)
        explained = Explained(model, about).eval()
        with TemporaryDirectory() as folder:
            differences = export_onnx(model, about, path := Path(folder, "model.onnx"))
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        for batch in (1, 16):
            pixels = torch.randint(256, (batch, 3, *model.image_size), dtype=torch.uint8)
            feed = {"pixels": pixels.numpy()}
            runs = {
                "onnxruntime": lambda session=session, feed=feed: session.run(list(OUTPUTS), feed),
                "pytorch": torch.inference_mode()(lambda explained=explained, pixels=pixels: explained(pixels)),
            }
            rows.append({"model": name, "batch": batch, **rates(runs, batch, args.repeats), "difference": differences})
    table = Table("model", "batch", "ONNX Runtime, images/s", "PyTorch, images/s", "ratio")
    for row in rows:
        ours, theirs = row["pytorch"], row["onnxruntime"]
        table.add_row(row["model"], str(row["batch"]), f"{theirs:.0f}", f"{ours:.0f}", f"{theirs / ours:.2f}")
    Console().print(table)
    print("written to", record("onnx_speed", rows, repeats=args.repeats, onnxruntime=onnxruntime.__version__))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
