"""Hostile files and killed runs: ``PILLOW_IMAGES=FOLDER CIFAR10_JPEG=FOLDER python -m benchmarks.predict_robust``.

Three parts, each with ``predict.py`` in processes of its own and the shipped weights: Pillow's own test images; files
with some bytes changed, cut out or repeated; and runs killed (-9) at random moments, each gone on with ``--resume`` and
compared with an uninterrupted run byte for byte.
"""

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.predict_scale import ROOT, watched
from benchmarks.record import record
from vit.preprocess import SUFFIXES, ImageError, open_image
from vit.run import quiet_libraries

ENDINGS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp", "GIF": ".gif", "TIFF": ".tif"}


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pillow", type=Path, default=os.environ.get("PILLOW_IMAGES"), help="[%(default)s]")
    parser.add_argument("--images", type=Path, default=os.environ.get("CIFAR10_JPEG"), help="[%(default)s]")
    parser.add_argument("--mutations", type=int, default=2000, help="mutated files [2000]")
    parser.add_argument("--kills", type=int, default=20, help="killed runs, of 1,000 images each [20]")
    options = parser.parse_args(args)
    if options.images is None or options.pillow is None:
        parser.error("--images and --pillow name folders of images")
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            {"what": "Pillow's test images", **hostile(f"{options.pillow}/**", Path(folder))},
            {"what": "mutated files", **mutated_files(options.mutations, Path(folder))},
            {"what": "killed and resumed", **killed(options.images, options.kills, Path(folder))},
        ]
    table = Table("what", "figures")
    for row in rows:
        table.add_row(row["what"], ", ".join(f"{key} {value}" for key, value in row.items() if key != "what"))
    Console().print(table)
    print(record("predict_robust", rows))


def hostile(source: str, folder: Path) -> dict[str, object]:
    """What predict.py makes of files that nobody can trust."""
    out = folder / "hostile.jsonl"
    begin = time.perf_counter()
    code, memory, cpu, said = watched(["predict.py", source, "--recursive", "--device", "cpu", "--out", str(out)])
    seconds = time.perf_counter() - begin
    records = [json.loads(line) for line in out.read_bytes().splitlines()]
    return {
        "records": len(records),
        "classified": sum("predictions" in record for record in records),
        "refused": sum("error" in record for record in records),
        "exit": code,
        "tracebacks": said.count("Traceback"),
        "lines on standard error": len(said.splitlines()),
        "seconds": round(seconds, 1),
        "CPU seconds": round(cpu, 1),
        "peak memory, MB": round(memory / 1024),
    }


def mutated_files(count: int, folder: Path) -> dict[str, object]:
    """The mutated files through predict.py; and each of them opened alone, for the time it takes."""
    (folder / "mutated").mkdir()
    slowest = 0.0
    for i, (ending, data) in enumerate(islice(mutations(seed=0), count)):
        (folder / "mutated" / f"{i:05}{ending}").write_bytes(data)
        begin = time.perf_counter()
        with quiet_libraries(), suppress(ImageError):
            open_image(io.BytesIO(data))
        slowest = max(slowest, time.perf_counter() - begin)
    return {"slowest file, s": round(slowest, 3), **hostile(str(folder / "mutated"), folder)}


def mutations(seed: int) -> Iterator[tuple[str, bytes]]:
    """Endless damaged image files with their endings: some bytes of a small picture changed, cut out or repeated."""
    rng = random.Random(seed)
    y, x = np.mgrid[:60, :60]
    picture = Image.fromarray(np.stack([4 * x, 4 * y, 128 + 90 * np.sin(x / 3) * np.cos(y / 4)], -1).astype(np.uint8))
    options = {"GIF": {"save_all": True, "append_images": [picture.rotate(90)]}, "TIFF": {"compression": "tiff_lzw"}}
    whole: list[tuple[str, bytes]] = []
    for format, ending in ENDINGS.items():
        picture.save(file := io.BytesIO(), format, **options.get(format, {}))
        whole.append((ending, file.getvalue()))
    while True:
        for ending, original in whole:
            data = bytearray(original)
            for _ in range(rng.randint(1, 8)):
                at = rng.randrange(min(len(data), 200) if rng.random() < 0.5 else len(data))  # headers matter most
                match rng.randrange(3):
                    case 0:
                        data[at] = rng.randrange(256)
                    case 1:
                        del data[at : at + rng.randint(1, 20)]
                    case 2:
                        data[at:at] = data[at : at + rng.randint(1, 20)]
            yield ending, bytes(data)


def killed(images: Path, kills: int, folder: Path) -> dict[str, object]:
    """Runs killed once their file has a random size, then gone on with; half of them JSONL, half CSV."""
    paths = [str(p) for p in sorted(images.rglob("*")) if p.suffix.lower() in SUFFIXES]
    (folder / "paths").write_text("\n".join(paths[:: max(1, len(paths) // 1000)][:1000]))
    rng = random.Random(0)
    equal, torn, shares = 0, 0, []
    for ending in ("jsonl", "csv"):
        finish(start(folder, folder / f"whole.{ending}"))
        whole = (folder / f"whole.{ending}").read_bytes()
        for _ in range(kills // 2):
            out, partial = folder / f"out.{ending}", folder / f"out.{ending}.partial"
            while True:  # until one was killed before it was done
                process = start(folder, out)
                size = rng.randrange(len(whole))
                while process.poll() is None and not (partial.exists() and partial.stat().st_size >= size):
                    time.sleep(0.001)
                time.sleep(rng.random() * 0.02)  # somewhere inside a batch
                process.kill()
                if process.wait() == -signal.SIGKILL and partial.exists():  # else: killed behind its last step
                    break
                out.unlink()
            left = partial.read_bytes()
            shares.append(len(left) / len(whole))
            torn += not left.endswith(b"\n")
            finish(start(folder, out, "--resume"))
            equal += out.read_bytes() == whole
            out.unlink()
    return {
        "kills": len(shares),
        "equal to an uninterrupted run": equal,
        "records torn": torn,
        "share there when killed": f"{min(shares):.0%} to {max(shares):.0%}",
    }


def start(folder: Path, out: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "predict.py", "-", "--device", "cpu", "--batch-size", "32", "--out", str(out), *options]
    with (folder / "paths").open("rb") as paths:
        return subprocess.Popen(command, cwd=ROOT, stdin=paths, stderr=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise RuntimeError(f"predict.py ended with {process.returncode}")


if __name__ == "__main__":
    main()
