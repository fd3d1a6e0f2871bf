"""The `device` fixture, which runs a test on the CPU and on the GPU, and the marker `slow`."""

import pytest
import rpe_ops
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes many seconds and about 9 GB of memory")


def _cuda():
    reason = (
        "needs a GPU, but PyTorch finds none"
        if not torch.cuda.is_available()
        else "needs an rpe_ops built with CUDA kernels"
        if not rpe_ops.has_cuda
        else None
    )
    return pytest.param("cuda", marks=pytest.mark.skipif(reason is not None, reason=reason or ""))


@pytest.fixture(params=["cpu", _cuda()])
def device(request):
    return request.param
