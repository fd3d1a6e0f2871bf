"""What a benchmark ran on."""

import os
import platform
from pathlib import Path


def machine(device):
    """The processor's (and, with `device` "cuda", the GPU's) name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    if device == "cpu":
        return name
    import torch  # which takes seconds

    return f"{torch.cuda.get_device_name()} ({name})"
