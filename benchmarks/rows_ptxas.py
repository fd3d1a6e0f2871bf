"""Print the registers, spills and shared memory of the kernels of attention by rows: `python benchmarks/rows_ptxas.py`.

Triton compiles the kernels that a call would launch, and its assembler ptxas reports the resources. No GPU is needed.
"""

import argparse
import concurrent.futures
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from rpe_ops import rows
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "DeiT-with-iRPE"))
from irpe import row_layout

TARGETS = {80: "A100", 90: "H100"}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
PLACES = ("k", "qkv")
CHANNELS = (32, 64, 128)  # The kernels pad 48 channels to 64, and 96 to 128.
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def launches(
    dtype: torch.dtype,
    channels: int,
    places: str,
    masked: bool,
    dropout_p: float,
    height: int = 14,
    width: int = 14,
    bias: bool = False,
) -> dict[str, tuple[triton.JITFunction, rows.Tile, dict[str, Any]]]:
    """{kernel: (function, tile, arguments)} of the launches of a forward and a backward pass, none of which runs."""
    found = {}

    def record(kernel: triton.JITFunction, grid: Any, options: rows.Tile, arguments: list) -> None:
        name = kernel.fn.__name__.removesuffix("_kernel")
        # The first launch of a kernel counts: the forward and the backward pass compile the product in the same way.
        found.setdefault(name, (kernel, options, dict(zip(kernel.arg_names, arguments, strict=True))))

    rows.forget_launches()
    launch, rows._launch = rows._launch, record
    try:
        # As in DeiT-S, q, k and v are views of one tensor with a class token. Both axes have seven classes of offsets.
        q, k, v = torch.zeros(2, height * width + 1, 3, 6, channels, dtype=dtype, requires_grad=True).permute(
            2, 0, 3, 1, 4
        )
        index = [torch.arange(1 - size, size).clamp(-3, 3) + 3 for size in (height, width)]
        layout = row_layout((index[0][:, None] * 7 + index[1])[None], 1, 50)
        shapes = ((50,), (50,), ()) if bias else ((channels, 50), (channels, 50), (50, channels))
        tables = [
            [torch.zeros(1, *shape, requires_grad=True)] * (place in places)
            for place, shape in zip("qkv", shapes, strict=True)
        ]
        mask = torch.zeros(2, 1, 1, height * width + 1, dtype=torch.bool) if masked else None
        rows.attention(q, k, v, *tables, *layout, bias, mask, dropout_p).sum().backward()
    finally:
        rows._launch = launch
        rows.forget_launches()
    return found


def specialised(kernel: triton.JITFunction, arguments: dict[str, Any]) -> tuple[dict, dict, dict]:
    """(types, constants, alignments) of the arguments in Triton's form. Triton compiles a kernel for each of these."""
    signature, constants, aligned = {}, {}, {}
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        tensor, special = isinstance(value, torch.Tensor), isinstance(value, int) and not parameter.do_not_specialize
        if name.isupper() or (special and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = TYPES[value.dtype] if tensor else "fp32" if isinstance(value, float) else "i32"
        if (tensor and value.data_ptr() % 16 == 0) or (special and value % 16 == 0):
            aligned[parameter.num,] = [["tt.divisibility", 16]]
    return signature, constants, aligned


def compiled(kernel: triton.JITFunction, options: rows.Tile, arguments: dict[str, Any], arch: int) -> CompiledKernel:
    """Compile the kernel of a launch for compute capability `arch`, for example 90."""
    return triton.compile(
        ASTSource(kernel, *specialised(kernel, arguments)),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": options.num_warps, "num_stages": options.num_stages},
    )


def resources(program: CompiledKernel, arch: int) -> tuple[int, int, int]:
    """(registers per thread, spilled bytes, bytes of shared memory per block)"""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(program.asm["ptx"])
        report = subprocess.run(
            [
                triton.knobs.nvidia.ptxas.path,
                "-v",
                f"-arch=sm_{arch}{'a' if arch >= 90 else ''}",
                str(ptx),
                "-o",
                str(ptx.with_suffix(".cubin")),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill", report))), program.metadata.shared


def measure(case: tuple[int, str, int, str, bool]) -> list[str]:
    """The table's lines for one case: (arch, type, channels, places, whether there are a mask and dropout)."""
    arch, dtype, channels, places, masked = case
    dropout_p = 0.1 if masked else 0.0
    lines = []
    for name, (kernel, options, arguments) in launches(DTYPES[dtype], channels, places, masked, dropout_p).items():
        registers, spilled, shared = resources(compiled(kernel, options, arguments, arch), arch)
        lines.append(
            f"sm_{arch} {dtype:9}{channels:4}  {places:4} {'mask, dropout' if masked else '':14}{name:8}"
            f"{options.own:5} x {options.other:3}{options.num_warps:6}{options.num_stages:7}{registers:10}"
            f"{spilled:8}{shared:8}"
        )
    return lines


def main(args: argparse.Namespace) -> None:
    """Compile all cases and print the table."""
    print(
        f"Triton {triton.__version__}; tiles of own x other tokens; spilled and shared are bytes\n"
        f"arch  type  channels  on{'':20}kernel    tile   warps stages registers spilled  shared"
    )
    cases = list(itertools.product(args.arch, args.dtype, args.channels, args.places, (False, True)))
    with concurrent.futures.ProcessPoolExecutor(args.processes) as pool:
        for lines in pool.map(measure, cases):
            print("\n".join(lines), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=list(TARGETS),
        default=list(TARGETS),
        help="compute capabilities, such as 90 for sm_90",
    )
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="types of q, k and v")
    parser.add_argument("--channels", type=int, nargs="+", default=list(CHANNELS), help="channels per head")
    parser.add_argument("--places", nargs="+", default=list(PLACES), help="where iRPE is applied, such as k or qkv")
    parser.add_argument("--processes", type=int, default=2, help="number of processes")
    main(parser.parse_args())
