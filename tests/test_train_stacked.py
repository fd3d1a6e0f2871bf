"""train_stacked.py: the results of separate runs up to rounding, bit-identical after a signal or if repeated."""

import json
import math
import signal

import numpy as np
import pytest
import torch
import train_stacked
from PIL import Image
from train_stacked import DecodedImages, StackedGroup, UserError, build_dataset, build_loader, main

import runtime

RECIPE = (
    "--model vit_tiny_patch16_224 --input-size 8 --model-kwargs patch_size=4 embed_dim=16 depth=2 num_heads=2 "
    "--data-set FOLDER --epochs 2 --warmup-epochs 0 --batch-size 8 --min-crop 0.5 --aa none --lr 0.02 "
    "--weight-decay 0.2 --smoothing 0.1 --drop-path 0 --no-model-ema --no-repeated-aug --reprob 0 --mixup 0 --cutmix 0"
)
VARIANTS = {
    "none": "",
    "bias": "--rpe rpe-1.9-product-bias-1-k",
    "cross": "--rpe rpe-20-cross-ctx-0-q",
    "qkv": "--rpe rpe-1.9-product-ctx-1-qkv",
    "fast": "--lr 0.1 --weight-decay 0",
}
SEEDS = (0, 3)
NAMES = [f"{variant}{seed}" for variant in VARIANTS for seed in SEEDS]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of 20 images for training and of 11 for validation, which differ in brightness."""
    root, random = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    for split, count in (("train", 20), ("val", 11)):
        for label in range(2):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(0, 150, (8, 10, 3)) + 40 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    return root


def commands(data, out, more="--device cpu --amp-dtype float32 --num_workers 0", variants=VARIANTS, seeds=SEEDS):
    """Commands of main.py that train all variants with all seeds, and then evaluate each of them."""
    lines = []
    for flags in ("--resume auto", "--eval --resume auto"):
        for name, variant in variants.items():
            for seed in seeds:
                folder = out / f"{name}{seed}"
                folder.mkdir(parents=True, exist_ok=True)
                lines.append(
                    f"python main.py {RECIPE} {more} {variant} --seed {seed} --data-path {data} --output_dir {folder} "
                    f"{flags}"
                )
    return lines


def run_stacked(out, lines):
    """Run the commands in stacks, in this process."""
    path = out / "commands.txt"
    path.write_text("\n".join(lines))
    train_stacked.run(train_stacked.argparse.Namespace(commands=path))


def run_separately(lines):
    """Run the commands one after the other, as main.py does."""
    parser = runtime.ArgumentParser(parents=[main.get_args_parser()])
    for line in lines:
        main.main(parser.parse_args(line.split()[2:]))


def results(out, name):
    """What a run has written: its checkpoint without the flags, its log, and its evaluation."""
    checkpoint = runtime.load_checkpoint(out / name / "checkpoint.pth")
    del checkpoint["args"]
    log = [json.loads(line) for line in (out / name / "log.txt").read_text().splitlines()]
    return checkpoint, log, json.loads((out / name / "eval.json").read_text())


def assert_close(first, second, **tolerance):
    """Compare nested containers: numbers and tensors within the tolerance, anything else exactly."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, **tolerance)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        assert_close(list(first.values()), list(second.values()), **tolerance)
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            assert_close(*pair, **tolerance)
    elif isinstance(first, float):
        assert first == pytest.approx(second, rel=tolerance["rtol"], abs=tolerance["atol"])
    else:
        assert first == second


EXACT = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture(scope="module")
def stacked(data, tmp_path_factory):
    """The folder of stacked runs in float32 on the CPU."""
    out = tmp_path_factory.mktemp("stacked")
    run_stacked(out, commands(data, out))
    return out


def test_stacked_runs_equal_separate_runs_up_to_rounding(data, tmp_path, stacked):
    run_separately(commands(data, tmp_path))
    for name in NAMES:
        # AdamW turns rounding into steps of about the learning rate where the gradient is zero; 2.4e-5 was measured.
        assert_close(results(stacked, name), results(tmp_path, name), rtol=1e-3, atol=1e-4)
    first, *others = [results(stacked, name)[0]["model"]["head.weight"] for name in NAMES]
    assert all((first - other).abs().max() > 1e-3 for other in others)


@pytest.mark.parametrize("device", DEVICES)
def test_stacked_runs_in_bfloat16_equal_separate_runs_up_to_its_rounding(device, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_stacked, "EAGER_STEPS", 2)  # so that both epochs use CUDA graphs
    variants = {name: VARIANTS[name] for name in ("none", "qkv")}
    more = f"--device {device} --amp-dtype bfloat16 --num_workers 0"
    run_stacked(tmp_path / "stacked", commands(data, tmp_path / "stacked", more, variants))
    run_separately(commands(data, tmp_path / "separate", more, variants))
    for variant in variants:
        for seed in SEEDS:
            name = f"{variant}{seed}"
            together, alone = (results(tmp_path / kind, name) for kind in ("stacked", "separate"))
            assert_close(together[0]["model"], alone[0]["model"], rtol=0.0, atol=0.02)
            for row, expected in zip(together[1], alone[1], strict=True):
                assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=0.01)


def test_loading_processes_and_the_size_of_an_evaluation_change_nothing(data, tmp_path, stacked, monkeypatch):
    monkeypatch.setattr(train_stacked, "EVALUATION_IMAGES", 5)
    more = "--device cpu --amp-dtype float32 --num_workers 1"
    run_stacked(tmp_path, commands(data, tmp_path, more))
    for name in NAMES:
        assert_close(results(tmp_path, name), results(stacked, name), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("epoch", "saved_epochs"), [(0, 0), (1, 1)])
def test_after_a_signal_the_same_file_continues_with_bit_identical_results(
    epoch, saved_epochs, data, tmp_path, stacked, monkeypatch
):
    step = train_stacked.Stack.step

    def signalled(stack, images, targets):
        step(stack, images, targets)
        if stack.trainings[0].run.epoch == epoch:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train_stacked.Stack, "step", signalled)
    with pytest.raises(runtime.Interrupted, match=f"stopped by SIGTERM in epoch {epoch}, step 0"):
        run_stacked(tmp_path, commands(data, tmp_path))
    monkeypatch.undo()
    assert [(tmp_path / name / "checkpoint.pth").exists() for name in NAMES] == [saved_epochs > 0] * len(NAMES)
    run_stacked(tmp_path, commands(data, tmp_path))
    for name in NAMES:
        assert_close(results(tmp_path, name), results(stacked, name), **EXACT)


def test_runs_that_are_finished_are_evaluated_only(data, tmp_path, stacked, monkeypatch):
    run_stacked(tmp_path, commands(data, tmp_path))
    before = [(tmp_path / name / "checkpoint.pth").stat().st_mtime_ns for name in NAMES]
    (tmp_path / "none0" / "eval.json").unlink()
    run_stacked(tmp_path, commands(data, tmp_path))
    assert [(tmp_path / name / "checkpoint.pth").stat().st_mtime_ns for name in NAMES] == before
    assert_close(results(tmp_path, "none0"), results(stacked, "none0"), **EXACT)


def test_a_run_whose_loss_is_not_finite_fails_alone(data, tmp_path, stacked, monkeypatch, capsys):
    start = train_stacked.train_together.start

    def broken(command, *args):
        training = start(command, *args)
        if command.output_dir.endswith("qkv3"):
            training.state.model.head.weight.data.fill_(math.nan)
        return training

    monkeypatch.setattr(train_stacked.train_together, "start", broken)
    with pytest.raises(UserError, match="1 of the runs failed.*qkv3"):
        run_stacked(tmp_path, commands(data, tmp_path))
    assert f"error: {tmp_path}/qkv3: the mean loss is nan in epoch 0" in capsys.readouterr().err
    assert not (tmp_path / "qkv3" / "checkpoint.pth").exists()
    for name in NAMES:
        if name != "qkv3":
            assert_close(results(tmp_path, name), results(stacked, name), **EXACT)


def test_batches_equal_those_of_main_exactly(data):
    parser = runtime.ArgumentParser(parents=[main.get_args_parser()])
    flags = [*RECIPE.split(), "--num_workers", "0", "--color-jitter", "0.4", "--hflip", "0.5", "--seed", "5"]
    args = runtime.with_place(parser.parse_args([*flags, "--data-path", str(data)]))
    images = DecodedImages(build_dataset(True, args)[0])
    ours, theirs = build_loader(args, images), main.build_train_loader(args, torch.device("cpu"))[0]
    for epoch in (0, 1):
        for loader in (ours, theirs):
            loader.sampler.set_epoch(epoch)
        for (pixels, targets), (expected, classes) in zip(ours, theirs, strict=True):
            assert torch.equal(images.normalize(torch.from_numpy(pixels)), expected)
            assert targets.tolist() == classes.tolist()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--drop-path 0.1", "--drop-path is 0.1 in .*none0: train_stacked.py supports only 0.0"),
        ("--drop 0.1", "--drop is 0.1"),
        ("--model-ema", "--model-ema is True"),
        ("--mixup 0.8", "--mixup is 0.8"),
        ("--cutmix 1", "--cutmix is 1.0"),
        ("--reprob 0.25", "--reprob is 0.25"),
        ("--clip-grad 1", "--clip-grad is 1.0"),
        ("--opt lamb", "--opt is lamb"),
        ("--compile", "--compile is True"),
        ("--amp-dtype float16", "--amp-dtype is float16 in .*none0: train_stacked.py supports float32 and bfloat16"),
    ],
)
def test_flags_that_a_stack_cannot_have_are_refused(flags, sentence, data, tmp_path):
    with pytest.raises(UserError, match=sentence):
        run_stacked(tmp_path, [f"{line} {flags}" for line in commands(data, tmp_path)])


def test_runs_with_other_batches_or_the_same_folder_are_refused(data, tmp_path):
    lines = commands(data, tmp_path)
    with pytest.raises(UserError, match="--batch-size is 8 in .*none0 and 4 in .*none3"):
        run_stacked(tmp_path, [lines[0], f"{lines[1]} --batch-size 4"])
    with pytest.raises(UserError, match="two commands write to --output_dir .*none0"):
        run_stacked(tmp_path, [lines[0], lines[0]])


def test_a_stack_resumes_only_from_the_end_of_an_epoch(data, tmp_path, monkeypatch):
    lines = commands(data, tmp_path, variants={"none": ""})
    run_separately([f"{lines[0]} --epochs 1"])
    with pytest.raises(UserError, match="none3 resumes from epoch 0, but .*none0 from epoch 1"):
        run_stacked(tmp_path, lines)
    monkeypatch.setattr(
        main.runtime.Run, "agreed_signal", lambda run, steps: signal.SIGTERM if (run.epoch, steps) == (1, 2) else 0
    )
    with pytest.raises(runtime.Interrupted):
        run_separately(lines[:1])
    monkeypatch.undo()
    with pytest.raises(UserError, match="none0 was saved within epoch 1.*use train_together.py"):
        run_stacked(tmp_path, lines)


def test_training_sets_that_need_too_much_memory_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train_stacked, "MAX_IMAGE_BYTES", 40 * 240 - 1)
    with pytest.raises(UserError, match="the decoded images .* need more than 0 GiB"):
        run_stacked(tmp_path, commands(data, tmp_path))
    monkeypatch.setattr(train_stacked, "MAX_IMAGE_BYTES", 40 * 240)
    monkeypatch.setattr(StackedGroup, "_read_images", lambda *_: pytest.skip("the limit itself is accepted"))
