"""The import of rpe_ops, its error messages, and builds of its sources."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rpe_ops
import torch

SOURCE = Path(__file__).resolve().parents[1]
REPOSITORY = SOURCE.parent


def python(code, cwd, *flags, **env):
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


@pytest.mark.parametrize("folder", [".", "rpe_ops", "rpe_ops/python"])
def test_import_finds_the_installed_package_from_every_folder(folder):
    done = python("import rpe_ops.rpe_index; print(rpe_ops.rpe_index.__file__)", REPOSITORY / folder)
    assert done.stdout.strip() == rpe_ops.rpe_index.__file__, done.stderr


def test_source_folder_cannot_be_imported_as_the_package():
    no_installed_packages = "-S"
    done = python("from rpe_ops.rpe_index import rpe_index", REPOSITORY, no_installed_packages, PYTHONPATH="")
    assert "ModuleNotFoundError: No module named 'rpe_ops" in done.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"torch": "2.0.0"},
            f"was built for PyTorch 2.0.0 but this is PyTorch {torch.__version__}; rebuild it with: pip",
        ),
        (
            {"version": "0.9"},
            f"was built for rpe_ops 0.9 but this is rpe_ops {rpe_ops.__version__}; rebuild it with: pip",
        ),
        (None, "has not been built; build it with: pip"),
    ],
)
def test_import_of_an_outdated_build_prints_how_to_rebuild(change, sentence, tmp_path):
    package = shutil.copytree(Path(rpe_ops.__file__).parent, tmp_path / "rpe_ops")
    stamp = package / "build.json"
    if change is None:
        stamp.unlink()
    else:
        stamp.write_text(json.dumps(json.loads(stamp.read_text()) | change))
    done = python("import rpe_ops.rpe_index", tmp_path, PYTHONPATH=str(tmp_path))
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: rpe_ops ") and sentence in last_line


def test_import_of_a_broken_library_prints_how_to_rebuild(tmp_path):
    package = shutil.copytree(Path(rpe_ops.__file__).parent, tmp_path / "rpe_ops")
    (package / "_C.so").write_bytes(b"not a library")
    done = python("import rpe_ops.rpe_index", tmp_path, PYTHONPATH=str(tmp_path))
    last_line = done.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: rpe_ops could not load its library")
    assert "rebuild it with: pip" in last_line


@pytest.mark.skipif(rpe_ops.has_cuda, reason="needs a build without CUDA kernels")
def test_cuda_call_of_a_cpu_build_prints_how_to_rebuild():
    call_on_cuda = torch.ops.rpe_ops.rpe_index.default._op_dk
    with pytest.raises(NotImplementedError, match="rpe_index: rpe_ops was built without CUDA kernels; rebuild it"):
        call_on_cuda(torch._C.DispatchKey.CUDA, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, dtype=torch.int32))


def run(*command, **env):
    done = subprocess.run(command, cwd=SOURCE, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_cuda_sources_compile_for_sm_80_and_sm_90(tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if nvcc is None:
        pytest.skip("needs nvcc on PATH or in CUDA_HOME")
    if torch.version.cuda is None:  # This PyTorch lacks its CUDA headers, so only the kernels can be compiled.
        archs = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
        include = Path(torch.__file__).with_name("include")
        run(nvcc, "-std=c++17", *archs, f"-I{include}", "-c", "csrc/cuda_kernels.cu", "-o", str(tmp_path / "kernels.o"))
        return
    run(
        sys.executable,
        "setup.py",
        "build_ext",
        f"--build-lib={tmp_path}",
        f"--build-temp={tmp_path / 'objects'}",
        FORCE_CUDA="1",
        TORCH_CUDA_ARCH_LIST="8.0;9.0",
    )
    assert json.loads((tmp_path / "rpe_ops" / "build.json").read_text())["cuda"]
    done = python(f"import torch; torch.ops.load_library({str(tmp_path / 'rpe_ops' / '_C.so')!r})", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_emulated_cuda_kernels_are_correct(sanitizer, tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "emulated_gpu"
    include = Path(torch.__file__).with_name("include")  # It contains the half types.
    run(
        compiler,
        "-std=c++20",
        "-O1",
        "-g",
        f"-fsanitize={sanitizer}",
        "-pthread",
        "-Icsrc",
        f"-isystem{include}",
        "tests/emulated_gpu.cpp",
        "-o",
        str(program),
    )
    run(str(program))
