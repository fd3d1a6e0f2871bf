"""Builds rpe_ops against the installed PyTorch: `python setup.py install --user`, or from the repository's root
`pip install --no-build-isolation --no-deps ./rpe_ops`.

CPU kernels always; CUDA kernels when a GPU and a toolkit are there, or a toolkit and FORCE_CUDA=1. The toolkit is
CUDA_HOME or that of the nvcc on PATH; TORCH_CUDA_ARCH_LIST picks the architectures.
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.install import install

try:
    import torch
except ModuleNotFoundError:
    sys.exit(
        "rpe_ops is built against the PyTorch it runs with: install PyTorch first, then run "
        "pip install --no-build-isolation --no-deps ./rpe_ops"
    )

os.chdir(Path(__file__).resolve().parent)  # paths of sources are relative
VERSION = re.search(r'"(.+)"', Path("python/_version.py").read_text())[1]


def find_cuda_home() -> str | None:
    """The toolkit's folder: CUDA_HOME, what the nvcc on PATH says of itself (it may be a wrapper), or a usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or None
    if home is None and (nvcc := shutil.which("nvcc")):
        dry_run = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True)
        if top := re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE):
            home = str(Path(top[1].strip()).resolve())
    if home:
        os.environ["CUDA_HOME"] = home
    from torch.utils import cpp_extension  # reads CUDA_HOME, and knows the usual places

    return cpp_extension.CUDA_HOME


def want_cuda() -> bool:
    """Whether to build the CUDA kernels; sets CUDA_HOME and, without a GPU, the architectures for PyTorch's tools."""
    forced = os.environ.get("FORCE_CUDA", "0") == "1"
    if not (forced or torch.cuda.is_available()):
        return False
    home = find_cuda_home()
    if torch.version.cuda and home:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # there is no GPU to ask
        return True
    missing = "a CUDA toolkit (set CUDA_HOME)" if torch.version.cuda else "a PyTorch with CUDA"
    if forced:
        sys.exit(f"FORCE_CUDA=1 needs {missing}, and there is none.")
    print(f"rpe_ops: there is not {missing}: building for the CPU alone.", file=sys.stderr)
    return False


CUDA = want_cuda()
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402  reads CUDA_HOME


class Build(BuildExtension):
    """Also records what was built against what; `import rpe_ops` refuses any other combination."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # objects of another PyTorch may lie in build/

    def run(self):
        super().run()
        stamp = {"torch": torch.__version__, "version": VERSION, "cuda": CUDA}
        Path(self.get_ext_fullpath("rpe_ops._C")).with_name("build.json").write_text(json.dumps(stamp))


class Install(install):
    """In a virtual environment, where Python ignores a user's own packages, `--user` installs into the environment."""

    def finalize_options(self):
        if self.user and not site.ENABLE_USER_SITE:
            self.user = 0
        super().finalize_options()


def extension():
    sources = ["csrc/rpe_ops.cpp", "csrc/cpu.cpp"] + (["csrc/cuda.cpp", "csrc/cuda_kernels.cu"] if CUDA else [])
    cxx = ["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", "-fvisibility=hidden"]
    return (CUDAExtension if CUDA else CppExtension)(
        "rpe_ops._C",
        sources,
        include_dirs=["csrc"],
        define_macros=[("RPE_OPS_CUDA", None)] if CUDA else [],
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3"]},
        py_limited_api=True,
    )


setup(
    name="rpe_ops",
    version=VERSION,
    description="The gather and the bucket sum of image relative position encoding (iRPE) for PyTorch",
    python_requires=">=3.10",
    packages=["rpe_ops"],
    package_dir={"rpe_ops": "python"},  # no folder of the source tree can be imported as rpe_ops
    zip_safe=False,
    ext_modules=[extension()],
    cmdclass={"build_ext": Build.with_options(use_ninja=False, no_python_abi_suffix=True), "install": Install},
)
