"""Generated images, tars of them, parsed flags and launched processes for the tests."""

import argparse
import contextlib
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # threads that wait for each other make small models slow on a machine that does more
# A shell starts what runs in the background deaf to SIGINT, which the programs that the tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
PROJECT = Path(__file__).parent.parent
sys.path.insert(0, str(PROJECT))

PATIENCE = 1200  # seconds after which a process counts as hanging, which a busy machine must not look like
TINY = "deit_tiny_patch16_224_ctx_product_50_shared_k"


@pytest.fixture(params=["rpe_ops", "torch"])
def operators(request, monkeypatch):
    """Run the test with the extension and with PyTorch's own operators."""
    import irpe

    if request.param == "rpe_ops" and not irpe.HAS_RPE_OPS:
        pytest.skip("the extension rpe_ops is not installed; make builds it")
    monkeypatch.setattr(irpe, "HAS_RPE_OPS", request.param == "rpe_ops")


def write_images(folder, classes=("ant", "bee", "cat"), count=8, size=40, seed=0):
    """Class folders of random images, brighter from class to class, with oblong, grey and nested ones among them."""
    rs = np.random.RandomState(seed)
    for number, name in enumerate(classes):
        for i in range(count):
            path = Path(folder, name, "more" if i == 5 else "", f"{i}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rs.randint(0, 60, (size + 4 * i, size, 3)) + 190 * number // max(1, len(classes) - 1)
            image = Image.fromarray(pixels.astype(np.uint8))
            (image.convert("L") if i == 3 else image).save(path)


def write_tar(path, folder, arcname=""):
    """A tar of the folder's content, its members in an order of their own."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(Path(folder).rglob("*"), key=lambda file: (file.name, str(file))):
            tar.add(file, Path(arcname, file.relative_to(folder)), recursive=False)


@pytest.fixture(scope="session")
def image_root(tmp_path_factory):
    """A data path with train and val, as folders and as tars: three classes of eight images each."""
    root = tmp_path_factory.mktemp("image_root")
    for seed, split in enumerate(("train", "val")):
        write_images(root / split, seed=seed)
        write_tar(root / f"{split}.tar", root / split)
    return root


def parse(*flags):
    """Arguments of main.py."""
    from main import get_args_parser

    return argparse.ArgumentParser(parents=[get_args_parser()]).parse_args([str(flag) for flag in flags])


def small(data_path, *flags):
    """Flags of a run on the CPU that takes a second."""
    return [
        "--device",
        "cpu",
        "--data-set",
        "FOLDER",
        "--data-path",
        data_path,
        "--model",
        TINY,
        "--input-size",
        32,
        "--batch-size",
        8,
        "--num_workers",
        0,
        "--epochs",
        1,
        *flags,
    ]


@pytest.fixture
def like_windows(monkeypatch):
    """Without the signals and the groups of processes that Windows lacks."""
    for module, name in ((signal, "SIGUSR1"), (signal, "SIGUSR2"), (signal, "SIGHUP"), (os, "setpgid")):
        monkeypatch.delattr(module, name)
    monkeypatch.setattr(platform, "system", lambda: "Windows")


@pytest.fixture(scope="session")
def trained(image_root, tmp_path_factory):
    """checkpoint.pth, beside its log.txt, of a run of one epoch; for reading only."""
    from main import main

    path = tmp_path_factory.mktemp("trained")
    main(parse(*small(image_root, "--output_dir", path)))
    return path / "checkpoint.pth"


def start(*command, **environment):
    """Start Python with one thread in the project's folder; its output is captured.

    That the compiled rpe_ops is not there, which a user is told, is no matter of these tests.
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:the extension rpe_ops", **environment}
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=PROJECT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def free_port():
    """A port that stays free until it is used: it is below those that Linux gives to all programs' connections."""
    while True:
        port = 10000 + secrets.randbelow(22000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("", port))
            return port


TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]


def launcher(world_size, *flags):
    """Start of a command under torch.distributed.launch."""
    return ["-m", "torch.distributed.launch", f"--nproc_per_node={world_size}", f"--master_port={free_port()}", *flags]


def start_processes(world_size, *command):
    """Start the command once per process as a launcher would, but with outputs of their own."""
    port = free_port()
    return [
        start(
            *command,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
        )
        for rank in range(world_size)
    ]


def altered(change):
    """main.py's program with a change before it runs."""
    return (
        "-c",
        f"import os, sys, time, main, runtime\n{change}\nruntime.run(main.main, runtime.ArgumentParser("
        "parents=[main.get_args_parser()]).parse_args())",
    )


def finish(process):
    """(exit status, standard output, standard error)"""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.terminate()
    return process.returncode, out, err
