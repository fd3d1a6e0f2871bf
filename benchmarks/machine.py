"""The machine that a benchmark ran on."""

import os
import platform
from pathlib import Path


def machine(device: str) -> str:
    """The processor's name and number of cores and, if `device` is "cuda", the GPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    if device == "cpu":
        return name
    import torch  # Importing it takes seconds.

    return f"{torch.cuda.get_device_name()} ({name})"
