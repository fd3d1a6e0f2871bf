"""Build rpe_ops against the installed PyTorch.

    python setup.py install --user
    pip install --no-build-isolation --no-deps ./rpe_ops     # the same, from the repository's root

The build always contains the CPU kernels. It contains the CUDA kernels if there is a CUDA toolkit and either a GPU or
FORCE_CUDA=1. CUDA_HOME or the nvcc on PATH determines the toolkit, and TORCH_CUDA_ARCH_LIST the architectures.
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.install import install

try:
    import torch
except ModuleNotFoundError:
    sys.exit(
        "rpe_ops must be built against the PyTorch that it runs with: install PyTorch first, then run "
        "pip install --no-build-isolation --no-deps ./rpe_ops"
    )

os.chdir(Path(__file__).resolve().parent)  # The paths of the sources are relative to this folder.
VERSION = re.search(r'"(.+)"', Path("python/_version.py").read_text())[1]


def find_cuda_home() -> str | None:
    """The folder of the CUDA toolkit, or None if there is none. Sets CUDA_HOME if it finds the folder through nvcc.

    In order of preference: CUDA_HOME, the folder that the nvcc on PATH reports (nvcc itself may be a wrapper), and the
    usual places, which PyTorch knows.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or None
    if home is None and (nvcc := shutil.which("nvcc")):
        dry_run = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True)
        if top := re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE):
            home = str(Path(top[1].strip()).resolve())
    if home:
        os.environ["CUDA_HOME"] = home
    from torch.utils import cpp_extension  # The import reads CUDA_HOME and searches the usual places.

    return cpp_extension.CUDA_HOME


def want_cuda() -> bool:
    """Whether to build the CUDA kernels. Sets CUDA_HOME and, without a GPU, TORCH_CUDA_ARCH_LIST for PyTorch's tools.

    Ends the program with a message if FORCE_CUDA=1 and the toolkit or a PyTorch with CUDA is missing.
    """
    forced = os.environ.get("FORCE_CUDA", "0") == "1"
    if not (forced or torch.cuda.is_available()):
        return False
    home = find_cuda_home()
    if torch.version.cuda and home:
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # No GPU tells its architecture.
        return True
    missing = "a CUDA toolkit (set CUDA_HOME)" if torch.version.cuda else "a PyTorch with CUDA"
    if forced:
        sys.exit(f"FORCE_CUDA=1 needs {missing}, but there is none.")
    print(f"rpe_ops: building for the CPU only, because CUDA kernels need {missing}.", file=sys.stderr)
    return False


CUDA = want_cuda()
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402  The import reads CUDA_HOME.


class Build(BuildExtension):
    """PyTorch's build, which also records the versions in build.json; `import rpe_ops` refuses other versions."""

    def finalize_options(self) -> None:
        """Compile everything again, because build/ may contain objects for another PyTorch."""
        super().finalize_options()
        self.force = True

    def run(self) -> None:
        """Build the extension and write build.json next to it."""
        super().run()
        stamp = {"torch": torch.__version__, "version": VERSION, "cuda": CUDA}
        Path(self.get_ext_fullpath("rpe_ops._C")).with_name("build.json").write_text(json.dumps(stamp))


class Install(install):
    """`setup.py install`, for which `--user` in a virtual environment means this environment.

    Python ignores a user's own packages there.
    """

    def finalize_options(self) -> None:
        """Ignore `--user` where Python would not find what it installs."""
        if self.user and not site.ENABLE_USER_SITE:
            self.user = 0
        super().finalize_options()


def extension() -> Extension:
    """The extension module with the sources and compiler flags for this build."""
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
    package_dir={"rpe_ops": "python"},  # so that no folder of the source tree can be imported as rpe_ops
    zip_safe=False,
    ext_modules=[extension()],
    cmdclass={"build_ext": Build.with_options(use_ninja=False, no_python_abi_suffix=True), "install": Install},
)
