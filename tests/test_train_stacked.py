"""train_stacked.py: the results of separate runs up to rounding, bit-identical after a signal or if repeated."""

import json
import math
import signal

import decoded_images
import pytest
import stacks
import torch
import train_stacked
from train_stacked import DecodedImages, UserError, build_dataset, build_loader, main
from trainings import assert_close, run_separately, write_class_folders

import runtime

RECIPE = (
    "--model vit_tiny_patch16_224 --input-size 8 --model-kwargs patch_size=4 embed_dim=16 depth=2 num_heads=2 "
    "--data-set FOLDER --epochs 3 --warmup-epochs 1 --batch-size 8 --min-crop 0.5 --aa none --lr 0.2 "
    "--weight-decay 2 --smoothing 0.1 --drop-path 0 --no-model-ema --no-repeated-aug --reprob 0 --mixup 0 --cutmix 0"
)
VARIANTS = {
    "none": "",
    "bias": "--rpe rpe-1.9-product-bias-1-k",
    "cross": "--rpe rpe-20-cross-ctx-0-q",
    "qkv": "--rpe rpe-1.9-product-ctx-1-qkv",
    "fast": "--lr 0.3 --weight-decay 0",
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
    root = tmp_path_factory.mktemp("data")
    write_class_folders(root, {"train": 20, "val": 11}, (8, 10, 3), darkest_range=150, step=40)
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


def results(out, name):
    """What a run has written: its checkpoint without the flags, its log, and its evaluation."""
    checkpoint = runtime.load_checkpoint(out / name / "checkpoint.pth")
    del checkpoint["args"]
    log = [json.loads(line) for line in (out / name / "log.txt").read_text().splitlines()]
    return checkpoint, log, json.loads((out / name / "eval.json").read_text())


@pytest.fixture(scope="module")
def stacked(data, tmp_path_factory):
    """The folder of stacked runs in float32 on the CPU."""
    out = tmp_path_factory.mktemp("stacked")
    run_stacked(out, commands(data, out))
    return out


def test_stacked_runs_equal_separate_runs_up_to_rounding(data, tmp_path, stacked):
    run_separately(commands(data, tmp_path))
    for name in NAMES:
        together, alone = results(stacked, name), results(tmp_path, name)
        assert_close(together[1:], alone[1:], rtol=1e-4, atol=1e-5)
        # The tables have entries with such gradients, too; the largest difference that was measured is 1.2e-4.
        assert_close(without_key_biases(together[0]), without_key_biases(alone[0]), rtol=1e-3, atol=3e-4)
    weights = {name: results(stacked, name)[0]["model"] for name in NAMES}
    for first, second in [*((f"{variant}0", f"{variant}3") for variant in VARIANTS), ("none0", "fast0")]:
        assert (weights[first]["head.weight"] - weights[second]["head.weight"]).abs().max() > 3e-3
    for variant in ("bias", "cross", "qkv"):
        tables = [tensor for name, tensor in weights[f"{variant}0"].items() if "lookup_table" in name]
        assert max(table.abs().max() for table in tables) > 3e-3


def without_key_biases(checkpoint):
    """The checkpoint's weights without biases of keys, whose gradients are zero: AdamW turns rounding into steps."""
    weights = dict(checkpoint["model"])
    for name in [name for name in weights if name.endswith("qkv.bias")]:
        queries, _, values = weights.pop(name).chunk(3)
        weights |= {f"{name} of queries": queries, f"{name} of values": values}
    return weights


@pytest.mark.parametrize("device", DEVICES)
def test_stacked_runs_in_bfloat16_equal_separate_runs_up_to_its_rounding(device, data, tmp_path, monkeypatch):
    monkeypatch.setattr(stacks, "EAGER_STEPS", 2)  # so that both epochs use CUDA graphs
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
    monkeypatch.setattr(stacks, "EVALUATION_IMAGES", 5)
    more = "--device cpu --amp-dtype float32 --num_workers 1"
    run_stacked(tmp_path, commands(data, tmp_path, more))
    for name in NAMES:
        assert_close(results(tmp_path, name), results(stacked, name), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("epoch", "saved_epochs"), [(0, 0), (2, 2)])
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
        assert_close(results(tmp_path, name), results(stacked, name))


def test_runs_that_are_finished_are_evaluated_only(data, tmp_path, stacked, monkeypatch):
    run_stacked(tmp_path, commands(data, tmp_path))
    before = [(tmp_path / name / "checkpoint.pth").stat().st_mtime_ns for name in NAMES]
    (tmp_path / "none0" / "eval.json").unlink()
    run_stacked(tmp_path, commands(data, tmp_path))
    assert [(tmp_path / name / "checkpoint.pth").stat().st_mtime_ns for name in NAMES] == before
    assert_close(results(tmp_path, "none0"), results(stacked, "none0"))


@pytest.mark.parametrize("failing", ["qkv0", "qkv3"])
def test_a_run_whose_loss_is_not_finite_fails_alone(failing, data, tmp_path, stacked, monkeypatch, capsys):
    start = train_stacked.train_together.start

    def broken(command, *args):
        training = start(command, *args)
        if command.output_dir.endswith(failing):
            training.state.model.head.weight.data.fill_(math.nan)
        return training

    monkeypatch.setattr(train_stacked.train_together, "start", broken)
    with pytest.raises(UserError, match=f"1 of the runs failed.*{failing}"):
        run_stacked(tmp_path, commands(data, tmp_path))
    assert f"error: {tmp_path}/{failing}: the mean loss is nan in epoch 0" in capsys.readouterr().err
    assert not (tmp_path / failing / "checkpoint.pth").exists()
    for name in NAMES:
        if name != failing:
            assert_close(results(tmp_path, name), results(stacked, name))


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
            assert torch.equal(images.normalization(torch.device("cpu"))(torch.from_numpy(pixels)), expected)
            assert targets.tolist() == classes.tolist()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--drop-path 0.1", r"these flags of .*none0: --drop-path 0.1 \(only 0.0\); train_together.py does"),
        ("--drop 0.1 --mixup 0.8", r"none0: --drop 0.1 \(only 0.0\), --mixup 0.8 \(only 0.0\);"),
        ("--model-ema", r"--model-ema True \(only False\)"),
        ("--cutmix 1", "--cutmix 1.0"),
        ("--reprob 0.25", "--reprob 0.25"),
        ("--clip-grad 1", "--clip-grad 1.0"),
        ("--opt lamb", "--opt lamb"),
        ("--compile", "--compile True"),
        ("--save-every 5", "--save-every 5"),
        ("--lr-noise 0.1", "--lr-noise"),
        ("--sched plateau", "--sched plateau"),
        ("--amp-dtype float16", r"--amp-dtype float16 \(only float32 or bfloat16\)"),
    ],
)
def test_flags_that_a_stack_cannot_have_are_refused(flags, sentence, data, tmp_path):
    with pytest.raises(UserError, match=sentence):
        run_stacked(tmp_path, [f"{line} {flags}" for line in commands(data, tmp_path)])


@pytest.mark.parametrize("kwargs", ["drop_rate=0.5", "attn_drop_rate=0.5", "patch_drop_rate=0.5"])
def test_random_numbers_in_the_model_are_refused(kwargs, data, tmp_path, capsys):
    lines = commands(data, tmp_path, variants={"none": ""})
    with pytest.raises(UserError, match="2 of the runs failed"):
        run_stacked(tmp_path, [line.replace("patch_size=4", f"patch_size=4 {kwargs}") for line in lines])
    assert capsys.readouterr().err.count("does not support random numbers in a model") == 2


def test_runs_with_other_batches_or_the_same_folder_are_refused(data, tmp_path):
    lines = commands(data, tmp_path)
    with pytest.raises(
        UserError, match="--batch-size is 8 in .*none0 and 4 in .*none3.*--seed, --weight-decay; run this"
    ):
        run_stacked(tmp_path, [lines[0], f"{lines[1]} --batch-size 4"])
    with pytest.raises(UserError, match="two commands write to --output_dir .*none0"):
        run_stacked(tmp_path, [lines[0], lines[0]])


def test_runs_that_are_behind_catch_up_before_the_others_continue(data, tmp_path, stacked):
    lines = commands(data, tmp_path)
    run_separately([f"{line} --epochs 3" for line in lines[:1]])  # none0 has finished
    (tmp_path / "none0" / "eval.json").unlink(missing_ok=True)
    step = train_stacked.Stack.step
    started = []

    def recorded(stack, images, targets):
        started.append((stack.trainings[0].run.epoch, [t.output_dir[-5:] for t in stack.trainings]))
        step(stack, images, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.runtime.Run, "agreed_signal", lambda run, _: signal.SIGTERM if run.epoch == 2 else 0)
        for line in lines[1:3]:  # none3 and bias0 have trained two epochs, and the first step of the third
            with pytest.raises(runtime.Interrupted):
                run_separately([f"{line}"])
        for name in ("none3", "bias0"):
            (tmp_path / name / "checkpoint.previous.pth").replace(tmp_path / name / "checkpoint.pth")
        patch.setattr(train_stacked.Stack, "step", recorded)
        run_stacked(tmp_path, lines)
    assert (2, ["none3"]) in started and not any("none0" in names for _, names in started)
    assert [epoch for epoch, names in started if "none3" in names] == [2] * 5
    for name in ("none3", "bias0", "bias3", "qkv0"):
        assert_close(results(tmp_path, name)[1:], results(stacked, name)[1:], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_that_a_stack_cannot_continue_fails_its_run_only(data, tmp_path, capsys, monkeypatch):
    lines = commands(data, tmp_path, variants={"none": ""}, seeds=(0, 3, 5))
    monkeypatch.setattr(
        main.runtime.Run, "agreed_signal", lambda run, steps: signal.SIGTERM if (run.epoch, steps) == (1, 2) else 0
    )
    with pytest.raises(runtime.Interrupted):
        run_separately(lines[:1])
    monkeypatch.undo()
    run_separately([f"{lines[1]} --epochs 1", f"{lines[2]} --epochs 1 --weight-decay 0.3"])
    with pytest.raises(UserError, match="2 of the runs failed"):
        run_stacked(tmp_path, lines)
    errors = capsys.readouterr().err
    assert f"error: {tmp_path}/none0: its checkpoint was saved within epoch 1" in errors
    assert (
        f"error: {tmp_path}/none5: its checkpoint has other hyperparameters or another number of steps than that of"
        in errors
    )
    assert (tmp_path / "none3" / "eval.json").exists()


def test_runs_that_have_done_other_numbers_of_steps_are_not_in_one_stack(data, tmp_path, capsys):
    lines = commands(data, tmp_path, variants={"none": ""})
    run_separately([f"{lines[0]} --epochs 1", f"{lines[1]} --epochs 1 --batch-size 4 --lr 0.4"])  # the same rate
    with pytest.raises(UserError, match="1 of the runs failed.*none3"):
        run_stacked(tmp_path, lines)
    assert "none3: its checkpoint has other hyperparameters or another number of steps" in capsys.readouterr().err


def test_an_error_of_a_stack_does_not_end_the_others(data, tmp_path, stacked, monkeypatch, capsys):
    step = train_stacked.Stack.step

    def broken(stack, images, targets):
        if "qkv" in stack.trainings[0].output_dir:
            raise torch.OutOfMemoryError("out of memory")
        step(stack, images, targets)

    monkeypatch.setattr(train_stacked.Stack, "step", broken)
    with pytest.raises(UserError, match="2 of the runs failed"):
        run_stacked(tmp_path, commands(data, tmp_path))
    assert capsys.readouterr().err.count("qkv") >= 2
    for name in NAMES:
        if "qkv" not in name:
            assert_close(results(tmp_path, name), results(stacked, name))


def test_evaluations_need_a_checkpoint_of_the_same_model(data, tmp_path, stacked, capsys):
    lines = [line.replace(str(tmp_path), str(stacked)) for line in commands(data, tmp_path) if "--eval" in line]
    wrong = [line.replace(" --rpe rpe-1.9-product-ctx-1-qkv", "") for line in lines if "qkv0" in line]
    without = [line.replace("--resume auto", "") for line in lines if "bias0" in line]
    with pytest.raises(UserError, match="2 of the runs failed"):
        run_stacked(tmp_path, [*wrong, *without, lines[0]])
    errors = capsys.readouterr().err
    assert "qkv0: its checkpoint was trained with --rpe rpe-1.9-product-ctx-1-qkv: give the command this flag" in errors
    assert "bias0: --eval needs --resume and a checkpoint here" in errors


def test_a_checkpoint_of_other_classes_is_not_evaluated(data, tmp_path, stacked, capsys):
    others = tmp_path / "others"
    for name in ("cat", "dog"):
        for split in ("train", "val"):
            (others / split).mkdir(parents=True, exist_ok=True)
            (others / split / name).symlink_to(data / split / ("class0" if name == "cat" else "class1"))
    lines = [line.replace(str(tmp_path), str(stacked)) for line in commands(data, tmp_path) if "--eval" in line][:1]
    with pytest.raises(UserError, match="1 of the runs failed"):
        run_stacked(tmp_path, [line.replace(str(data), str(others)) for line in lines])
    assert "was trained on other classes" in capsys.readouterr().err


def test_buffers_and_evaluation_mode_are_those_of_each_model(data, tmp_path):
    model = (
        "--model xcit_nano_12_p16_224 --input-size 16 --model-kwargs depth=1 embed_dim=32 num_heads=2 cls_attn_layers=1"
    )
    old_model = RECIPE[: RECIPE.index(" --data-set")]
    for kind in ("stacked", "separate"):
        lines = commands(data, tmp_path / kind, variants={"none": ""})
        lines = [line.replace(old_model, model).replace("--lr 0.2", "--lr 0.01") for line in lines]
        if kind == "stacked":
            run_stacked(tmp_path / kind, lines)
        else:
            run_separately(lines)
    for seed in SEEDS:
        together, alone = (results(tmp_path / kind, f"none{seed}") for kind in ("stacked", "separate"))
        buffers = [name for name in alone[0]["model"] if "running" in name]
        assert buffers
        for name in buffers:
            torch.testing.assert_close(together[0]["model"][name], alone[0]["model"][name], rtol=1e-3, atol=1e-4)
        assert together[2]["loss"] == pytest.approx(alone[2]["loss"], rel=1e-3)


def test_training_sets_that_need_too_much_memory_are_refused(data, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded_images, "MAX_IMAGE_BYTES", 40 * 4 * 80 - 1)
    with pytest.raises(UserError, match="the decoded images of the training set need more than 0 GiB"):
        run_stacked(tmp_path, commands(data, tmp_path))
    decoded_images.check_memory("training", decoded_images.MAX_IMAGE_BYTES)  # the limit itself is accepted
    monkeypatch.setattr(decoded_images, "MAX_IMAGE_BYTES", 22 * 4 * 3 * 64 - 1)
    with pytest.raises(UserError, match="the decoded images of the validation set need more than 0 GiB"):
        run_stacked(tmp_path, commands(data, tmp_path))


def test_many_loading_processes_are_noted(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_stacked.os, "cpu_count", lambda: 1)
    args = train_stacked.argparse.Namespace(num_workers=2)
    train_stacked.note_many_processes(args, 1)
    assert capsys.readouterr().out == ""
    train_stacked.note_many_processes(args, 2)
    assert "note: --num_workers 2 starts 4 loading processes" in capsys.readouterr().out
