"""What to compute on: the device of a name, what it is called, and whether it has bfloat16."""

import platform

import torch

DEVICES = "use auto, cpu, cuda or cuda:NUMBER"


def device_of(name: str) -> torch.device:
    """The device of a name; ``auto``: a GPU where there is one that torch can use, or else the processor.

    Raises:
        ValueError: If there is no such kind; one that is known may still not be there.
    """
    if name == "auto":
        device = torch.accelerator.current_accelerator(check_available=True)
        return device if device and device.type != "mps" else torch.device("cpu")  # a Mac's: never tried here
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"no device {name!r}; {DEVICES}") from error


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's kind and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} {platform.machine()}, {threads} thread{'s' * (threads != 1)}"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware, and so faster than float32."""
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # or the first one would be asked
        return torch.cuda.is_bf16_supported(including_emulation=False)
