"""Every mistake a user can make with files and flags ends in one sentence, and nothing already written is lost."""

import os
import re
import shutil
import signal

import pytest
import timm
import torch

import main
from conftest import TINY, TORCHRUN, altered, finish, parse, small, start, start_processes, write_images
from fill import fill_state_dict
from rpe_models import create_model
from runtime import UserError, load_checkpoint


def refused(data_path, *flags):
    """The one sentence with which the run ends."""
    with pytest.raises(UserError) as caught:
        main.main(parse(*small(data_path, *flags)))
    sentence = str(caught.value)
    assert sentence and "\n" not in sentence and "Traceback" not in sentence
    return sentence


def checkpoint_of(name, path, num_classes=3, img_size=32):
    torch.save(
        {"model": fill_state_dict(create_model(name, num_classes=num_classes, img_size=img_size).state_dict())}, path
    )
    return path


@pytest.fixture
def broken(image_root, tmp_path):
    """A copy of the images with one of them cut in half, in training and in validation."""
    shutil.copytree(image_root, tmp_path / "broken")
    for split in ("train", "val"):
        file = tmp_path / "broken" / split / "bee" / "2.png"
        os.truncate(file, file.stat().st_size // 2)
    return tmp_path / "broken"


# Files


def test_missing_data_folder(tmp_path):
    assert f"--data-path {tmp_path}/none is not a folder" in refused(tmp_path / "none")
    assert f"{tmp_path}/train is not a folder of class folders" in refused(tmp_path)
    assert f"{tmp_path}/val is not a folder of class folders" in refused(tmp_path, "--eval")
    assert f"{tmp_path}/val.tar cannot be read: No such file" in refused(tmp_path, "--eval", "--load-tar")
    (tmp_path / "train" / "empty").mkdir(parents=True)
    assert "Found no valid file for the classes empty" in refused(tmp_path)


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_missing_checkpoint(image_root, tmp_path, flag):
    assert f"checkpoint {tmp_path}/none.pth cannot be read: No such file" in refused(
        image_root, flag, tmp_path / "none.pth"
    )


def test_truncated_image_is_named_and_the_checkpoint_stays(trained, broken, tmp_path):
    shutil.copytree(trained.parent, tmp_path / "out")
    before = {file: (tmp_path / "out" / file).read_bytes() for file in ("checkpoint.pth", "log.txt")}
    sentence = refused(
        broken,
        "--output_dir",
        tmp_path / "out",
        "--resume",
        tmp_path / "out" / "checkpoint.pth",
        "--epochs",
        2,
        "--num_workers",
        1,
        "--no-repeated-aug",
    )
    assert f"image {broken}/train/bee/2.png cannot be read" in sentence
    assert before == {file: (tmp_path / "out" / file).read_bytes() for file in before}


def test_unreadable_image_is_named(broken):
    (broken / "val" / "bee" / "2.png").write_text("no image")
    assert f"image {broken}/val/bee/2.png cannot be read: it is in no format" in refused(broken, "--eval")


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_truncated_checkpoint(image_root, tmp_path, flag):
    path = checkpoint_of(TINY, tmp_path / "c.pth")
    os.truncate(path, path.stat().st_size // 2)
    assert f"checkpoint {path} is truncated" in refused(image_root, flag, path)


def test_checkpoint_of_another_model_says_which_keys_differ(image_root, tmp_path):
    plain = checkpoint_of("deit_tiny_patch16_224", tmp_path / "plain.pth")
    assert "belongs to another model: 12 missing (blocks.0.attn.rpe_k.lookup_table_weight, " in refused(
        image_root, "--resume", plain
    )
    wide = checkpoint_of("deit_small_patch16_224", tmp_path / "wide.pth", num_classes=3)
    sentence = refused(image_root, "--eval", "--resume", wide, "--model", "deit_tiny_patch16_224")
    assert "of another shape (" in sentence and "(1, 1, 384) instead of (1, 1, 192)" in sentence
    small_map = checkpoint_of(TINY, tmp_path / "map.pth", img_size=64)
    sentence = refused(image_root, "--resume", small_map)
    assert "pos_embed is (1, 17, 192) instead of (1, 5, 192)" in sentence and "for --input-size 64" in sentence


class Intruder:
    def __reduce__(self):
        return os.system, ("touch intruded",)


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_pickle_that_needs_more_than_the_allow_list(image_root, tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "args": Intruder()}, "evil.pth")
    assert "checkpoint evil.pth is refused: it contains posix.system" in refused(image_root, flag, "evil.pth")
    assert not os.path.exists("intruded")


def test_class_counts_that_disagree_with_the_checkpoint(image_root, tmp_path):
    path = checkpoint_of(TINY, tmp_path / "c.pth", num_classes=10)
    for flags in (["--eval"], []):
        sentence = refused(image_root, *flags, "--resume", path)
        assert f"checkpoint {path} has 10 classes and the data set 3: check --data-set" in sentence
        assert ("--finetune" in sentence) == (not flags)  # an evaluation with a new head would evaluate nothing


def test_output_directory_that_cannot_be_written(image_root, tmp_path):
    (tmp_path / "file").touch()
    assert f"output directory {tmp_path}/file/out cannot be written" in refused(
        image_root, "--output_dir", tmp_path / "file" / "out"
    )


@pytest.mark.parametrize("flags", [["--opt", "sgd"], ["--opt", "lion"], ["--sched", "step"]], ids=" ".join)
def test_run_goes_on_only_with_its_own_optimizer_and_schedule(image_root, trained, tmp_path, flags):
    assert f"cannot continue with {' '.join(flags)}: use the same" in refused(image_root, "--resume", trained, *flags)
    if flags[0] == "--opt":  # files of other programs do not say their optimizer
        checkpoint = load_checkpoint(trained)
        del checkpoint["args"]
        torch.save(checkpoint, tmp_path / "c.pth")
        assert f"is not {' '.join(flags)} of this model" in refused(image_root, "--resume", tmp_path / "c.pth", *flags)


def permuted(optimizer):
    state = optimizer["state"]
    return {**optimizer, "state": dict(zip(state, reversed(state.values()), strict=True))}


@pytest.mark.parametrize(
    ("key", "damage", "words"),
    [
        ("model_ema", lambda ema: 3, "has no state dict under 'model_ema'"),
        ("model_ema", lambda ema: {"head.bias": ema["head.bias"]}, "its 'model_ema' belongs to another model: "),
        ("model", lambda model: {**model, "head.weight": torch.tensor(1.0)}, "1 of another shape (head.weight is ()"),
        ("epoch", lambda epoch: "x", "is damaged: its epoch is 'x'"),
        ("epoch", lambda epoch: -1, "is damaged: its epoch is -1"),
        (
            "optimizer",
            lambda optimizer: {**optimizer, "param_groups": optimizer["param_groups"][:1]},
            "is not --opt adamw",
        ),
        ("optimizer", lambda optimizer: 3, "is not --opt adamw of this model"),
        ("optimizer", lambda optimizer: {**optimizer, "param_groups": 3}, "is not --opt adamw of this model"),
        ("optimizer", lambda optimizer: {**optimizer, "state": {0: 3}}, "is not --opt adamw of this model"),
        ("optimizer", permuted, "is not --opt adamw of this model: exp_avg is ("),
        ("lr_scheduler", lambda scheduler: 3, "is not --sched cosine"),
        ("lr_scheduler", lambda scheduler: {"best": 1.0, "last_epoch": 0}, "is not --sched cosine"),
        ("max_accuracy", lambda accuracy: "x", "the file is damaged"),
        ("classes", lambda classes: [1, 2, 3], "is damaged: its classes are not a list of names"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_part_of_a_checkpoint(image_root, trained, tmp_path, key, damage, words):
    checkpoint = load_checkpoint(trained)
    checkpoint[key] = damage(checkpoint[key])
    torch.save(checkpoint, tmp_path / "c.pth")
    assert words in refused(image_root, "--resume", tmp_path / "c.pth", "--epochs", 2)


# Flags


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "deit_smal_patch16_224"], "deit_small_patch16_224"),
        (["--model", "deit_tiny_patch16_224_bias_product_50_shared_v"], "bias"),
        (["--model", "resnet18"], "--model resnet18 cannot be built"),
        (["--input-size", 40], "--input-size 40 is not a multiple of the 16 pixels of a patch: use 32"),
        (["--input-size", 8], "use 16"),
        (["--batch-size", 7], "--batch-size 7 is odd"),
        (["--batch-size", 0], "--batch-size 0 is out of range: it must be at least 1"),
        (["--batch-size", 26], "--batch-size 26 is more than the 24 images that each of 1 ranks sees"),
        (["--reprob", 1.5], "--reprob 1.5 is out of range: it must be from 0 to 1"),
        (["--lr", "nan"], "--lr nan is out of range"),
        (["--num_workers", -1], "--num_workers -1 is out of range"),
        (["--aa", "rand-k9"], "--aa 'rand-k9'"),
        (["--remode", "sand"], "--remode 'sand' is unknown"),
        (["--mixup-mode", "trio"], "--mixup-mode 'trio' is unknown"),
        (["--train-interpolation", "cubic"], "--train-interpolation 'cubic' is unknown"),
        (["--cutmix-minmax", 0.3], "--cutmix-minmax [0.3] must be two"),
        (["--cutmix-minmax", 0, 0], "--cutmix-minmax [0.0, 0.0] must be two"),
        (["--cutmix-minmax", 0.5, 0.51], "at least a pixel apart"),
        (["--lr-noise", 0.9, 0.1], "--lr-noise [0.9, 0.1] must be"),
        (["--lr-noise", "nan"], "--lr-noise [nan] must be"),
        (["--lr-noise", 0, "--lr-noise-pct", 0], "--lr-noise-pct 0.0 is out of range: it must be at least 0.001"),
        (["--lr-noise", 0, "--lr-noise-std", 1e4], "0.67 must be at least a thousandth of --lr-noise-std 10000"),
        (["--epochs", 0], "--epochs 0 is out of range: it must be at least 1"),
        (["--lr", "inf"], "--lr inf is out of range"),
        (["--min-lr", "nan"], "--min-lr nan is out of range: it must be at least 0"),
        (["--warmup-lr", -1], "--warmup-lr -1.0 is out of range"),
        (["--momentum", -1], "--momentum -1.0 is out of range: it must be from 0 to 1"),
        (["--decay-rate", "nan"], "--decay-rate nan is out of range"),
        (["--clip-grad", 0], "--clip-grad 0.0 is out of range"),
        (["--opt", "adahessian"], "--opt adahessian needs second derivatives"),
        (["--opt-betas", 0.9], "--opt-betas [0.9]"),
        (["--opt-betas", 0.9, 0.99, 0.999], "--opt-betas [0.9, 0.99, 0.999] must be 2 numbers for --opt adamw"),
        (["--opt", "lion", "--opt-betas", 0.9, 0.99, 0.999], "must be 2 numbers for --opt lion"),
        (["--model", "tnt_s_patch16_224"], "--model tnt_s_patch16_224 is not a ViT with a single patch size"),
        (["--model", "twins_pcpvt_small"], "--model twins_pcpvt_small is not a ViT with a single patch size"),
        (["--opt", "eve"], "--opt eve is unknown"),
        (["--opt-betas", 0.9, 7], "--opt-betas [0.9, 7.0]"),
        (["--sched", "sine"], "--sched sine"),
        (["--pretrained", "--finetune", "x"], "--pretrained and --finetune"),
        (["--distillation-type", "soft"], "needs the teacher's weights"),
        (["--distillation-type", "soft", "--teacher-path", "x"], "needs a model with a distillation token"),
        (["--world_size", 2], "torchrun --nproc_per_node=2"),
        (["--device", "toaster"], "--device toaster"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flag_that_cannot_be_followed(image_root, flags, words):
    assert words in refused(image_root, *flags)


def test_teacher_that_cannot_be_had(image_root, tmp_path):
    flags = ["--model", "deit_tiny_distilled_patch16_224", "--distillation-type", "hard", "--teacher-path"]
    assert "none.pth cannot be read" in refused(
        image_root, *flags, tmp_path / "none.pth", "--teacher-model", "resnet10t"
    )
    assert "model 'resnet1' is unknown" in refused(image_root, *flags, "x", "--teacher-model", "resnet1")
    path, model = checkpoint_of(TINY, tmp_path / "c.pth"), ["--teacher-model", "deit_tiny_patch16_224"]
    assert f"checkpoint {path} belongs to another model than --teacher-model deit_tiny_patch16_224: 12 unexpected" in (
        refused(image_root, *flags, path, *model)
    )


def test_classes_of_other_names_than_the_checkpoints_are_named(image_root, trained, tmp_path):
    """However many there are; but a new run may begin from them."""
    write_images(tmp_path / "train", ("ant", "cat", "dog"))
    write_images(tmp_path / "val", ("ant", "cat", "dog"), 2)
    for flags in (["--eval"], ["--epochs", 2]):
        sentence = refused(tmp_path, "--resume", trained, *flags)
        assert sentence.startswith(f"checkpoint {trained} was trained on other classes than those of the data set: 2 ")
        assert "such as 1 (bee in the checkpoint, cat in the data set)" in sentence
    main.main(parse(*small(tmp_path, "--finetune", trained)))
    assert main.main(parse(*small(image_root, "--eval", "--resume", trained)))["acc5"] == 100


def test_released_checkpoints_whose_classes_have_no_names_are_read(image_root, trained, tmp_path):
    checkpoint = load_checkpoint(trained)
    del checkpoint["classes"]
    torch.save(checkpoint, tmp_path / "c.pth")
    for flags in (["--eval"], ["--epochs", 2]):
        assert main.main(parse(*small(image_root, "--resume", tmp_path / "c.pth", *flags)))["acc5"] == 100


def test_teacher_that_numbers_classes_otherwise_is_refused(image_root, tmp_path):
    weights = timm.create_model("resnet10t", num_classes=3).state_dict()
    torch.save({"model": weights, "classes": ["bee", "ant", "cat"]}, tmp_path / "c.pth")
    assert "2 class ids have another name, such as 0 (bee in the checkpoint, ant in the data set)" in refused(
        image_root,
        "--model",
        "deit_tiny_distilled_patch16_224",
        "--distillation-type",
        "hard",
        "--teacher-model",
        "resnet10t",
        "--teacher-path",
        tmp_path / "c.pth",
    )


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "resnet10t"])
def test_teacher_of_other_classes_is_not_told_to_be_finetuned(image_root, tmp_path, name):
    torch.save({"model": timm.create_model(name, num_classes=10).state_dict()}, tmp_path / "c.pth")
    assert refused(
        image_root,
        "--model",
        "deit_tiny_distilled_patch16_224",
        "--distillation-type",
        "hard",
        "--teacher-model",
        name,
        "--teacher-path",
        tmp_path / "c.pth",
    ) == (
        f"the teacher {tmp_path}/c.pth has 10 classes and the data set 3: a teacher must know the classes that it "
        "teaches; check --data-set and --data-path, or give a --teacher-path that was trained on them"
    )


# Systems


def test_system_without_the_signals_of_training_is_told_so_and_evaluates(image_root, trained, tmp_path, like_windows):
    assert refused(image_root, "--output_dir", tmp_path / "out") == (
        "training needs the signals SIGTERM and SIGUSR1 and SIGUSR2, and Windows lacks SIGUSR1 and SIGUSR2: use Linux, "
        "on Windows in WSL; main.py --eval works without them"
    )
    assert not (tmp_path / "out").exists()
    assert main.main(parse(*small(image_root, "--eval", "--resume", trained, "--num_workers", 1)))["acc5"] == 100


# What the process says and how it ends


def test_the_program_says_one_line_and_ends_with_an_error(image_root):
    code, _, err = finish(start("main.py", *small(image_root, "--data-set", "MARS")))
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "--data-set: invalid choice" in err


def test_unknown_way_of_attention_in_the_environment(image_root, monkeypatch):
    monkeypatch.setenv("IRPE_ATTENTION", "flash")
    assert refused(image_root) == "IRPE_ATTENTION is 'flash'; it must be composed or rows, or not be set"


def test_broken_image_is_said_by_the_process_that_meets_it(broken):
    results = [
        finish(process)
        for process in start_processes(
            2, "main.py", *small(broken, "--batch-size", 4, "--num_workers", 1, "--no-repeated-aug")
        )
    ]
    assert [code for code, _, _ in results] == [1, 1]
    errors = "".join(err for _, _, err in results).splitlines()
    image = f"image {broken}/train/bee/2.png cannot be read"
    said = [error for error in errors if re.match(rf"error: rank [01] of 2: {image}", error)]
    assert len(said) == 1 and len(errors) == 2
    assert all(re.search("rank [01] is lost or hangs in ", error) for error in errors if error not in said)


def test_wrong_flag_is_said_once_under_a_launcher(image_root):
    code, _, err = finish(start(*TORCHRUN, "--nproc_per_node=2", "main.py", *small(image_root, "--resume", "none.pth")))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code != 0 and len(errors) == 1
    assert errors[0].startswith("error: rank 0 of 2: checkpoint none.pth cannot be read: No such file")


def test_killed_process_ends_the_other(image_root):
    killed = (
        "agreed_signal = runtime.Run.agreed_signal\n"
        "def killed(self, steps):\n"
        "    if runtime.get_rank() == 1 and (self.epoch, steps) == (1, 2):\n"
        f"        os.kill(os.getpid(), {signal.SIGKILL:d})\n"
        "    return agreed_signal(self, steps)\n"
        "runtime.Run.agreed_signal = killed\n"
    )
    first, second = start_processes(2, *altered(killed), *small(image_root, "--batch-size", 4, "--epochs", 3))
    status, _, err = finish(first)
    assert status == 1
    assert re.fullmatch("error: rank 0 of 2: rank 1 is lost or hangs in epoch 1, step 1: .*\n", err)
    assert finish(second)[0] == -signal.SIGKILL


@pytest.fixture
def released(tmp_path, monkeypatch):
    """An empty hub cache that has the released file of TINY, for 1000 classes."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    checkpoint_of(TINY, tmp_path / "hub" / "checkpoints" / f"{TINY}.pth", num_classes=1000, img_size=224)


def test_a_classifier_with_random_weights_is_not_evaluated(image_root, tmp_path, capsys, released):
    sentence = refused(image_root, "--eval", "--pretrained")
    assert "weights of --pretrained are for another number of classes than the 3 of --data-set FOLDER" in sentence
    path = checkpoint_of(TINY, tmp_path / "four.pth", num_classes=4)
    assert f"weights of --finetune {path} are for another number" in refused(image_root, "--eval", "--finetune", path)
    same = checkpoint_of(TINY, tmp_path / "three.pth")
    capsys.readouterr()
    for flags in (["--finetune", same], ["--pretrained", "--data-set", "IMNET"]):
        main.main(parse(*small(image_root, "--eval", *flags)))
        assert "random weights" not in capsys.readouterr().out


def test_random_weights_are_noted(image_root, capsys, released):
    note = "note: --eval evaluates a model with random weights"
    main.main(parse(*small(image_root, "--eval")))
    assert capsys.readouterr().out.count(note) == 1
    main.main(parse(*small(image_root)))
    assert "random weights" not in capsys.readouterr().out
    main.main(parse(*small(image_root, "--pretrained")))
    assert (
        "note: the classifier starts with random weights, because the pretrained weights are for 1000 classes and the "
        "data set has 3" in capsys.readouterr().out
    )
