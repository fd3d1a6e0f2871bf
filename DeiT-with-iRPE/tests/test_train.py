"""Training: what it writes, how it resumes, and that each option changes what it should."""

import argparse
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch.utils.data import DataLoader, TensorDataset

import main
import runtime
from checkpoint import finetune_from
from conftest import TINY, finish, launcher, parse, small, start, write_images
from engine import train_one_epoch
from fill import fill_state_dict, image
from losses import DistillationLoss
from rpe_models import create_model
from runtime import UserError, load_checkpoint

DISTILLED = "deit_tiny_distilled_patch16_224"


def run(data_path, *flags):
    return main.main(parse(*small(data_path, *flags)))


def same(first, second):
    """Whether two nested containers of tensors are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


# A whole run


def test_training_writes_the_published_log_and_checkpoint(image_root, tmp_path):
    test = run(image_root, "--output_dir", tmp_path, "--epochs", 2)
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    names = ["train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"]
    assert [list(line) for line in lines] == [names] * 2 and [line["epoch"] for line in lines] == [0, 1]
    assert {f"test_{name}": value for name, value in test.items()} == {k: lines[1][k] for k in names[2:5]}
    files = sorted(set(os.listdir(tmp_path)) - {".lock"})
    assert files == ["checkpoint.previous.pth", "checkpoint.pth", "log.txt", "tensorboard"]
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth")
    assert list(checkpoint) == [
        "model",
        "optimizer",
        "lr_scheduler",
        "epoch",
        "model_ema",
        "scaler",
        "args",
        "max_accuracy",
        "classes",
    ]
    assert checkpoint["classes"] == ["ant", "bee", "cat"]
    model = create_model(TINY, num_classes=3, img_size=32)
    assert checkpoint["epoch"] == 1 and checkpoint["args"].batch_size == 8
    assert checkpoint["model"].keys() == checkpoint["model_ema"].keys() == model.state_dict().keys()
    assert lines[0]["n_parameters"] == sum(p.numel() for p in model.parameters())


def test_evaluating_the_checkpoint_gives_what_training_printed(image_root, tmp_path, capsys):
    trained = run(image_root, "--output_dir", tmp_path, "--lr", 0.02, "--warmup-lr", 1e-3)
    printed = capsys.readouterr().out.splitlines()
    assert run(image_root, "--eval", "--resume", tmp_path / "checkpoint.pth") == trained
    line = f"* Acc@1 {trained['acc1']:.3f} Acc@5 {trained['acc5']:.3f} loss {trained['loss']:.3f}"
    assert line in printed and capsys.readouterr().out.splitlines()[-1] == line


def test_training_learns_what_can_be_learned(tmp_path):
    for split, seed in (("train", 0), ("val", 1)):
        write_images(tmp_path / split, ("dark", "bright"), 24, seed=seed)
    test = run(
        tmp_path,
        "--epochs",
        4,
        "--warmup-epochs",
        0,
        "--lr",
        0.03,
        "--aa",
        "none",
        "--color-jitter",
        0,
        "--reprob",
        0,
        "--mixup",
        0,
        "--cutmix",
        0,
        "--drop-path",
        0,
    )
    assert test["acc1"] == 100


def test_a_resumed_run_goes_on_to_the_bit_as_one_that_never_stopped(image_root, tmp_path, monkeypatch):
    flags = [
        "--epochs",
        3,
        "--drop",
        0.1,
        "--num_workers",
        2,
        "--lr",
        0.05,
        "--warmup-epochs",
        1,
        "--clip-grad",
        1,
        "--model-ema-decay",
        0.9,
        "--lr-noise",
        0.1,
    ]
    run(image_root, "--output_dir", tmp_path / "straight", *flags)

    evaluations = iter([main.evaluate])

    def interrupted(*args):
        for evaluate in evaluations:
            return evaluate(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(main, "evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(image_root, "--output_dir", tmp_path / "halves", *flags)
    run(image_root, "--output_dir", tmp_path / "halves", "--resume", tmp_path / "halves" / "checkpoint.pth", *flags)
    straight, halves = (load_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("straight", "halves"))
    assert all(same(straight[key], halves[key]) for key in straight if key != "args")
    logs = [(tmp_path / name / "log.txt").read_text() for name in ("straight", "halves")]
    assert logs[0] == logs[1] and logs[0].count("\n") == 3


def test_optimizer_of_a_released_file_is_taken_over(image_root, trained, tmp_path):
    checkpoint = load_checkpoint(trained)
    del checkpoint["max_accuracy"]
    old_keys = {"params", "lr", "betas", "eps", "weight_decay", "amsgrad", "initial_lr"}  # PyTorch 1.7's AdamW
    for group in checkpoint["optimizer"]["param_groups"]:
        for key in group.keys() - old_keys:
            del group[key]
    for state in checkpoint["optimizer"]["state"].values():
        state["step"] = int(state["step"])
    torch.save(checkpoint, tmp_path / "released.pth")
    ends = []
    for name, file in (("own", trained), ("released", tmp_path / "released.pth")):
        run(image_root, "--output_dir", tmp_path / name, "--resume", file, "--epochs", 2)
        ends.append(load_checkpoint(tmp_path / name / "checkpoint.pth")["model"])
    assert same(*ends)


def test_best_accuracy_is_remembered_by_a_resumed_run(image_root, tmp_path, monkeypatch, capsys):
    for accuracy, flags in ((70.0, []), (50.0, ["--resume", tmp_path / "checkpoint.pth", "--epochs", 2])):
        monkeypatch.setattr(main, "evaluate", lambda *args, a=accuracy: {"loss": 1.0, "acc1": a, "acc5": 100.0})
        run(image_root, "--output_dir", tmp_path, *flags)
        assert "Max accuracy: 70.00%" in capsys.readouterr().out


def test_checkpoint_that_a_new_run_will_replace_is_named(image_root, trained, tmp_path, capsys):
    for more, said in (([], False), ([], True), (["--resume", trained], False)):
        run(image_root, "--output_dir", tmp_path, *more)
        note = f"note: {tmp_path}/checkpoint.pth of an earlier run will be replaced"
        assert (note in capsys.readouterr().out) == said


@pytest.mark.parametrize("flag", ["--repeated-aug", "--no-repeated-aug"])
def test_every_epoch_has_an_order_of_its_own(image_root, monkeypatch, flag):
    orders = []

    def train_one_epoch(model, criterion, run, *args):
        orders.append(tuple(run.loader.sampler))
        return {"loss": 1.0, "lr": 1.0}

    monkeypatch.setattr(main, "train_one_epoch", train_one_epoch)
    run(image_root, "--epochs", 3, flag)
    assert len(set(orders)) == 3


def test_nothing_is_trained_beyond_the_last_epoch(image_root, trained, tmp_path, capsys):
    run(image_root, "--output_dir", tmp_path, "--resume", trained)
    assert "nothing to train" in capsys.readouterr().out and not (tmp_path / "checkpoint.pth").exists()


def test_weights_alone_can_be_evaluated_and_trained_further(image_root, tmp_path, capsys):
    weights = fill_state_dict(create_model(TINY, num_classes=3, img_size=32).state_dict())
    torch.save({"model": weights}, tmp_path / "released.pth")
    run(image_root, "--eval", "--resume", tmp_path / "released.pth")
    run(
        image_root,
        "--resume",
        tmp_path / "released.pth",
        "--start_epoch",
        1,
        "--epochs",
        2,
        "--lr",
        0,
        "--warmup-lr",
        0,
        "--min-lr",
        0,
        "--weight-decay",
        0,
        "--output_dir",
        tmp_path,
    )
    assert "holds weights only" in capsys.readouterr().out
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth")
    assert same(checkpoint["model"], weights) and same(checkpoint["model_ema"], weights) and checkpoint["epoch"] == 1


def test_two_processes_train_under_the_old_launcher_without_use_env(image_root, tmp_path):
    flags = small(image_root, "--output_dir", tmp_path, "--batch-size", 4, "--num_workers", 1)
    status, out, err = finish(start(*launcher(2), "main.py", *flags))
    assert status == 0, err
    assert out.count("* Acc@1") == 1 and "3 steps of 4 x 2 an epoch" in out
    assert (tmp_path / "log.txt").read_text().count("\n") == 1
    assert load_checkpoint(tmp_path / "checkpoint.pth")["args"].world_size == 2


# One epoch


class Recorder(torch.nn.Module):
    """A linear classifier of tiny images that keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(12, 3)
        self.seen = []

    def forward(self, images):
        self.seen.append(images)
        return self.layer(images.flatten(1))


def epoch_of(model, count=4, loss_scaler=None, images=None, **options):
    images = image(1, (count, 3, 2, 2)) if images is None else images
    loader = DataLoader(TensorDataset(images, torch.arange(count) % 3), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    criterion = DistillationLoss(torch.nn.CrossEntropyLoss(), None, "none", 0.5, 1.0)
    scaler = loss_scaler or torch.amp.GradScaler("cpu", enabled=False)
    flags = argparse.Namespace(output_dir="", save_every=0, epochs=6, seed=0)
    run = runtime.Run(flags, runtime.Job(), runtime.RunLog(""), None, loader, epoch=5)
    return train_one_epoch(model, criterion, run, optimizer, torch.device("cpu"), scaler, **options)


def test_train_loss_is_the_mean_over_the_steps():
    torch.manual_seed(0)
    model, images, targets = Recorder(), image(1, (4, 3, 2, 2)), torch.arange(4) % 3
    weight, bias = (p.detach().clone().requires_grad_() for p in model.layer.parameters())
    losses = []
    for step in range(2):
        part = slice(2 * step, 2 * step + 2)
        loss = F.cross_entropy(images[part].flatten(1) @ weight.T + bias, targets[part])
        grads = torch.autograd.grad(loss, [weight, bias])
        weight, bias = ((p - g).detach().requires_grad_() for p, g in zip((weight, bias), grads, strict=True))
        losses.append(loss.item())
    assert epoch_of(model) == pytest.approx({"loss": sum(losses) / 2, "lr": 1.0})
    assert torch.allclose(model.layer.weight, weight)


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_bounds_the_step(scaled):
    steps = []
    for max_norm in (None, 0.01):
        torch.manual_seed(0)
        model = Recorder()
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        epoch_of(model, count=2, max_norm=max_norm, loss_scaler=torch.amp.GradScaler("cpu", enabled=scaled))
        steps.append((torch.cat([p.detach().flatten() for p in model.parameters()]) - before).norm().item())
    assert steps[0] > 0.1 and steps[1] == pytest.approx(0.01, rel=1e-3)


def test_gradients_that_are_finite_at_no_scale_stop_training():
    model = Recorder()
    model.layer.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(UserError, match="not finite in float16 at any scale.*bfloat16"):
        epoch_of(model, count=80, loss_scaler=torch.amp.GradScaler("cpu", enabled=True))
    overflowing = Recorder()
    before = overflowing.layer.bias.detach().clone()
    epoch_of(overflowing, count=60, loss_scaler=torch.amp.GradScaler("cpu", init_scale=2.0**120, enabled=True))
    assert not torch.equal(overflowing.layer.bias, before)  # a scale that is too high comes down and training continues


def test_mixup_reaches_the_model_and_the_loss():
    model, images = Recorder(), image(1, (4, 3, 2, 2))
    with pytest.raises(TypeError):  # soft targets do not fit this criterion's class ids
        epoch_of(model, mixup_fn=lambda x, y: (x * 0, None))
    mixup = Mixup(1.0, 0.0, num_classes=3, label_smoothing=0.0)
    model = Recorder()
    epoch_of(model, mixup_fn=mixup)
    assert not torch.equal(torch.cat(model.seen), images)
    assert torch.allclose(torch.cat(model.seen).sum(), images.sum(), atol=1e-4)  # each batch of two mixes within


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_computes_in_its_type_and_trains_alike(dtype):
    results = []
    for amp_dtype in (torch.float32, dtype):
        torch.manual_seed(0)
        model, types = Recorder(), []
        model.layer.register_forward_hook(lambda module, inputs, output, types=types: types.append(output.dtype))
        scaler = torch.amp.GradScaler("cpu", enabled=amp_dtype == torch.float16)
        results.append(epoch_of(model, loss_scaler=scaler, amp_dtype=amp_dtype)["loss"])
        assert set(types) == {amp_dtype}
    assert results[1] == pytest.approx(results[0], rel=0.05) and results[1] != results[0]


def test_bad_loss_names_epoch_and_step_and_keeps_the_checkpoint(image_root, tmp_path):
    images = image(1, (6, 3, 2, 2))
    images[3] = float("inf")
    with pytest.raises(UserError, match=r"loss is nan at epoch 5, step 1: "):
        epoch_of(Recorder(), count=6, images=images)
    with pytest.raises(UserError, match="loss is nan at epoch 2, step [12]: "):  # the epochs before are warm-up
        run(image_root, "--output_dir", tmp_path, "--epochs", 3, "--warmup-epochs", 1, "--lr", 1e30)
    assert load_checkpoint(tmp_path / "checkpoint.pth")["epoch"] == 1
    assert (tmp_path / "log.txt").read_text().count("\n") == 2


# Moving average


def test_moving_average_follows_its_recursion(image_root, tmp_path):
    flags = ["--output_dir", tmp_path, "--model-ema-decay", 0.75, "--batch-size", 24, "--warmup-lr", 0.01]
    torch.manual_seed(0)
    run(image_root, *flags)
    checkpoint = load_checkpoint(tmp_path / "checkpoint.pth")
    main.seed_everything(0)
    first = main.build_model(parse(*small(image_root)), 3).state_dict()  # one step of 24 images
    for key, value in checkpoint["model"].items():
        assert torch.allclose(checkpoint["model_ema"][key], 0.75 * first[key] + 0.25 * value, atol=1e-6)
    assert not same(checkpoint["model_ema"], checkpoint["model"])
    run(image_root, *flags, "--model-ema-force-cpu")
    assert same(load_checkpoint(tmp_path / "checkpoint.pth")["model_ema"], checkpoint["model_ema"])
    run(image_root, *flags, "--no-model-ema")
    assert load_checkpoint(tmp_path / "checkpoint.pth")["model_ema"] is None


# Distillation


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize("kind", ["none", "soft", "hard"])
def test_distillation_is_the_published_formula(kind):
    cls, dist, teacher, targets = image(1, (4, 5)), image(2, (4, 5)), image(3, (4, 5)), torch.tensor([0, 3, 1, 4])
    loss = DistillationLoss(torch.nn.CrossEntropyLoss(), lambda images: teacher, kind, alpha=0.3, tau=3.0)
    rows = np.arange(4)
    base = -np.log(softmax(cls.double().numpy())[rows, targets]).mean()
    hard = -np.log(softmax(dist.double().numpy())[rows, teacher.argmax(1)]).mean()
    p, q = softmax(teacher.double().numpy() / 3), softmax(dist.double().numpy() / 3)
    soft = 9 * (p * np.log(p / q)).sum() / 20
    expected = {"none": base, "soft": 0.7 * base + 0.3 * soft, "hard": 0.7 * base + 0.3 * hard}[kind]
    assert loss(None, (cls, dist), targets).item() == pytest.approx(expected, rel=1e-5)


def test_distillation_needs_both_heads():
    loss = DistillationLoss(torch.nn.CrossEntropyLoss(), lambda images: None, "hard", 0.5, 1.0)
    with pytest.raises(ValueError, match="set_distilled_training"):
        loss(None, torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="'none', 'soft' or 'hard'"):
        DistillationLoss(None, None, "firm", 0.5, 1.0)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distilled_model_is_trained_with_a_teacher_from_its_file(image_root, tmp_path, kind):
    torch.save({"model": create_model("resnet10t", num_classes=3).state_dict()}, tmp_path / "teacher.pth")
    flags = [
        "--model",
        DISTILLED,
        "--teacher-model",
        "resnet10t",
        "--teacher-path",
        tmp_path / "teacher.pth",
        "--warmup-lr",
        0.01,
        "--batch-size",
        24,
        "--output_dir",
        tmp_path,
        "--distillation-type",
        kind,
    ]
    weights = []
    for alpha in (0, 1):
        run(image_root, *flags, "--distillation-alpha", alpha, "--weight-decay", 0, "--clip-grad", 1)
        weights.append(load_checkpoint(tmp_path / "checkpoint.pth")["model"])
    main.seed_everything(0)
    first = main.build_model(parse(*small(image_root, "--model", DISTILLED)), 3).state_dict()
    changed = [
        [key for key in ("head.weight", "head_dist.weight") if not torch.equal(first[key], after[key])]
        for after in weights
    ]
    assert changed == [["head.weight"], ["head_dist.weight"]]


def test_teacher_of_another_resolution_gets_interpolated_positions(image_root, tmp_path):
    weights = fill_state_dict(create_model("vit_tiny_patch16_224", num_classes=3, img_size=64).state_dict())
    torch.save({"model": weights}, tmp_path / "teacher.pth")
    flags = ["--teacher-model", "vit_tiny_patch16_224", "--teacher-path", tmp_path / "teacher.pth"]
    teacher = main.build_teacher(parse(*flags, "--input-size", 96), 3)
    assert teacher(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    old = weights["pos_embed"][:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    new = F.interpolate(old, size=(6, 6), mode="bicubic", align_corners=False, antialias=True)
    assert torch.allclose(teacher.pos_embed[:, 1:], new.permute(0, 2, 3, 1).flatten(1, 2), atol=1e-5)
    run(image_root, "--model", DISTILLED, *flags, "--distillation-type", "hard")


# Fine-tuning


def test_finetuning_to_another_resolution_interpolates_the_positions(tmp_path, capsys):
    small_model = create_model(TINY, num_classes=3, img_size=64)
    weights = fill_state_dict(small_model.state_dict())
    torch.save({"model": weights}, tmp_path / "c.pth")
    model = main.build_model(parse("--model", TINY, "--input-size", 96, "--finetune", tmp_path / "c.pth"), 3)
    state = model.state_dict()
    assert "positions interpolated from 4×4 to 6×6" in capsys.readouterr().out
    assert all(torch.equal(state[key], weights[key]) for key in weights if key != "pos_embed")
    assert torch.equal(state["pos_embed"][:, 0], weights["pos_embed"][:, 0])
    old = weights["pos_embed"][:, 1:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    new = F.interpolate(old, size=(6, 6), mode="bicubic", align_corners=False, antialias=True)
    assert torch.allclose(state["pos_embed"][:, 1:], new.permute(0, 2, 3, 1).flatten(1, 2), atol=1e-5)


def test_finetuning_to_other_classes_makes_new_heads_and_says_so(image_root, tmp_path, capsys):
    weights = fill_state_dict(create_model(DISTILLED, num_classes=9, img_size=32).state_dict())
    torch.save({"model": weights}, tmp_path / "c.pth")
    model = create_model(DISTILLED, num_classes=3, img_size=32)
    finetune_from(model, tmp_path / "c.pth")
    said = capsys.readouterr().out
    assert "head.weight" in said and "head_dist.weight" in said and "3 classes instead of 9" in said
    state = model.state_dict()
    assert all(torch.equal(state[key], weights[key]) for key in weights if not key.startswith("head"))
    run(image_root, "--model", DISTILLED, "--finetune", tmp_path / "c.pth")


def test_finetuning_may_add_relative_positions_but_nothing_else(tmp_path, capsys):
    plain = create_model("deit_tiny_patch16_224", num_classes=3, img_size=32)
    torch.save(fill_state_dict(plain.state_dict()), tmp_path / "plain.pth")
    model = create_model(TINY, num_classes=3, img_size=32)
    finetune_from(model, tmp_path / "plain.pth")
    assert "lacks 12 tables" in capsys.readouterr().out
    plain.load_state_dict(load_checkpoint(tmp_path / "plain.pth"))
    x = image(1, (2, 3, 32, 32))
    assert torch.allclose(model.eval()(x), plain.eval()(x), atol=1e-5)
    with pytest.raises(UserError, match=r"belongs to another model: 3 missing \(dist_token, head_dist"):
        finetune_from(create_model(DISTILLED, num_classes=3, img_size=32), tmp_path / "plain.pth")
