"""--compile: the same results, the same checkpoints, and few compilations."""

import json
import shutil

import pytest
import timm
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import main
from conftest import TINY, finish, parse, small, start
from fill import fill_state_dict, image
from irpe import get_rpe_config
from rpe_models import create_model
from rpe_vision_transformer import equip_irpe
from runtime import load_checkpoint


class Graphs(list):
    """A backend of torch.compile that keeps what it is given and runs it as it is."""

    def __call__(self, graph, inputs):
        self.append(graph)
        return graph


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile makes, which then run without a compiler."""
    graphs, compile = Graphs(), torch.compile
    torch._dynamo.reset()  # other tests' graphs count towards its limit
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, **options, backend=graphs))
    yield graphs
    torch._dynamo.reset()


@pytest.fixture
def aot(monkeypatch):
    """torch.compile traces backward passes too, and runs the graphs without a compiler."""
    compile = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, **options, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def run(data_path, *flags):
    return main.main(
        parse(*small(data_path, "--model-kwargs", "depth=1", "--batch-size", 7, "--mixup", 0, "--cutmix", 0, *flags))
    )


def weights_of(folder):
    checkpoint = load_checkpoint(folder / "checkpoint.pth")
    return [checkpoint["model"], checkpoint["model_ema"]]


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_compiled_run_trains_as_a_plain_one(image_root, tmp_path, monkeypatch):
    monkeypatch.setattr(main, "evaluate", lambda *args: {"loss": 1.0, "acc1": 50.0, "acc5": 100.0})
    for name, flags in (("compiled", ["--compile"]), ("plain", [])):
        run(image_root, "--output_dir", tmp_path / name, "--drop-path", 0, "--model-ema-decay", 0.5, *flags)
    names = list(create_model(TINY, img_size=32, depth=1).state_dict())
    for compiled, plain in zip(weights_of(tmp_path / "compiled"), weights_of(tmp_path / "plain"), strict=True):
        assert list(compiled) == list(plain) == names
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)


def test_a_compiled_run_that_was_interrupted_goes_on_to_the_bit(image_root, tmp_path, graphs):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    run(image_root, "--compile", "--drop", 0.1, "--epochs", 2, "--output_dir", straight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main, "print_once", interrupt_after_the_first_epoch)
        with pytest.raises(KeyboardInterrupt):
            run(image_root, "--compile", "--drop", 0.1, "--epochs", 2, "--output_dir", halves)
    run(image_root, "--compile", "--drop", 0.1, "--epochs", 2, "--output_dir", halves, "--resume", "auto")
    torch.testing.assert_close(weights_of(straight), weights_of(halves), rtol=0, atol=0)


def interrupt_after_the_first_epoch(text):
    if text.startswith("Max accuracy"):
        raise KeyboardInterrupt


def test_checkpoints_of_compiled_and_plain_runs_take_each_others_place(image_root, tmp_path, graphs):
    for name, first, second in (("one", ["--compile"], []), ("other", [], ["--compile"])):
        run(image_root, *first, "--output_dir", tmp_path / name)
        run(image_root, *second, "--output_dir", tmp_path / name, "--resume", "auto", "--epochs", 2)
    assert graphs
    torch.testing.assert_close(weights_of(tmp_path / "one"), weights_of(tmp_path / "other"), rtol=1e-3, atol=1e-5)


def test_evaluation_compiles_once_for_batches_of_all_sizes(image_root, tmp_path, graphs):
    # 24 images in batches of 7, 7, 7 and 3
    stats = run(image_root, "--eval", "--compile", "--output_dir", tmp_path)
    assert len(graphs) == 1 + 1  # the first is the check of the compiler
    assert json.loads((tmp_path / "eval.json").read_text()) == stats
    assert stats == pytest.approx(run(image_root, "--eval"), rel=1e-5)


def test_training_evaluation_and_a_teacher_are_a_graph_each_for_all_epochs(image_root, tmp_path, graphs):
    teacher = create_model(TINY, num_classes=3, img_size=32)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    run(
        image_root,
        "--compile",
        "--epochs",
        2,
        "--model",
        "deit_tiny_distilled_patch16_224",
        "--distillation-type",
        "soft",
        "--teacher-model",
        TINY,
        "--teacher-path",
        tmp_path / "teacher.pth",
    )
    assert len(graphs) == 1 + 3  # the first is the check of the compiler


@pytest.mark.parametrize(
    ("method", "rpe_on"),
    [("product", "qkv"), ("euc", "qkv"), ("cross", "q"), ("cross", "k"), ("cross", "v"), ("cross", "qkv")],
)
@pytest.mark.usefixtures("aot")
def test_an_equipped_deit_is_one_graph(method, rpe_on):
    model = timm.create_model("deit_tiny_patch16_224", img_size=48, depth=2, embed_dim=16, num_heads=2, num_classes=3)
    equip_irpe(model, get_rpe_config(method=method, rpe_on=rpe_on))
    model.load_state_dict(fill_state_dict(model.state_dict()))
    x = image(1, (2, 3, 48, 48))
    expected = model(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    model.compile(fullgraph=True)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), list(model.parameters())), gradients)


@pytest.mark.usefixtures("aot")
def test_a_compiled_model_in_distributed_data_parallel_has_the_same_gradients():
    model = create_model(TINY, img_size=32, num_classes=3, depth=1)
    x = image(1, (2, 3, 32, 32))
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    main.compile_model(parse("--compile"), model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        DistributedDataParallel(model)(x).square().sum().backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], list(expected))


def test_an_environment_that_cannot_compile_is_one_sentence(image_root):
    status, _, err = finish(start("main.py", *small(image_root, "--compile"), CXX="/nowhere/g++"))
    assert status == 1
    assert err.count("error: ") == 1 and "Traceback" not in err
    assert "--compile cannot be used" in err and "/nowhere/g++" in err and "leave --compile out" in err


def test_processes_that_compile_wait_longer_for_each_other():
    assert [
        main.runtime.step_timeout(parse(*flags)) for flags in ([], ["--compile"], ["--compile", "--step-timeout", 900])
    ] == [60, 600, 900]
