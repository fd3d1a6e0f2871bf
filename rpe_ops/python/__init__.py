"""iRPE's operators as one C++/CUDA extension: `rpe_ops.rpe_index` holds the gather and the bucket sum,
`rpe_ops.reference` their definition, and `rpe_ops.attention` computes whole attentions on a CPU,
`rpe_ops.rows.attention` on a GPU if IRPE_ATTENTION=rows is in the environment.

Importing raises ImportError, with the command to rebuild, when the build belongs to another PyTorch or to another
version of these files; ModuleNotFoundError only when the package is not installed at all.
"""

import json
from pathlib import Path

import torch

from ._version import __version__

REBUILD = "pip install --no-build-isolation --no-deps ./rpe_ops (from the repository's root)"


def _load() -> bool:
    """Load the compiled operators; True when they include the CUDA kernels."""
    folder = Path(__file__).parent
    try:
        build = json.loads((folder / "build.json").read_text())
    except FileNotFoundError:
        raise ImportError(f"rpe_ops in {folder} has not been built; build it with: {REBUILD}") from None
    for what, built_for, found in (
        ("PyTorch", build["torch"], torch.__version__),
        ("rpe_ops", build["version"], __version__),
    ):
        if built_for != found:
            raise ImportError(
                f"rpe_ops was built for {what} {built_for} but this is {what} {found}; rebuild it with: {REBUILD}"
            )
    try:
        torch.ops.load_library(folder / "_C.so")
    except OSError as error:
        raise ImportError(f"rpe_ops could not load its library ({error}); rebuild it with: {REBUILD}") from None
    return build["cuda"]


has_cuda = _load()

from .blockwise import ATTENTION, attention, attention_takes, rows_take  # noqa: E402  needs the loaded operators
from .rpe_index import RPEIndexFunction, rpe_bucket_sum, validate_index  # noqa: E402

__all__ = [
    "ATTENTION",
    "RPEIndexFunction",
    "__version__",
    "attention",
    "attention_takes",
    "has_cuda",
    "rows_take",
    "rpe_bucket_sum",
    "validate_index",
]
