"""iRPE's operators as one C++/CUDA extension.

`rpe_ops.rpe_index` contains the gather and the bucket sum, and `rpe_ops.reference` their definitions in plain PyTorch.
`rpe_ops.attention` computes a whole attention on a CPU. On a GPU, `attention` of the module `rpe_ops.rows` does, which
has to be imported explicitly; `rpe_ops.rows_take` returns for which calls irpe.py uses it.

The import raises ImportError and prints the command to rebuild if the extension was built for another PyTorch or from
another version of these files. It raises ModuleNotFoundError only if the package is not installed at all.
"""

import json
from pathlib import Path

import torch

from ._version import __version__

REBUILD = "pip install --no-build-isolation --no-deps ./rpe_ops (from the repository's root)"


def _load() -> bool:
    """Load the compiled operators. Returns whether they include the CUDA kernels."""
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

from .blockwise import ATTENTION, attention, attention_takes, rows_take  # noqa: E402  This import needs the loaded operators.
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
