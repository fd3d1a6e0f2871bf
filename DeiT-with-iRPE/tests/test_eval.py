"""Evaluation counts every image once, however it is shared out."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import engine
import main
from conftest import PROJECT, TINY, finish, launcher, parse, small, start, start_processes, write_images, write_tar
from fill import fill_state_dict, image
from rpe_models import create_model
from runtime import UserError
from samplers import ShardSampler

REAL = PROJECT.parent.parent / "shared" / "data" / "imagenet-sample"
CASES = [(batch, tar) for batch in (7, 32) for tar in ((), ("--load-tar",))]

PROGRAM = """
import argparse, json, sys, main, runtime
def evaluate_all(_):
    with runtime.Job() as job:
        job.meet()
        for flags in json.loads(sys.argv[1]):
            args = argparse.ArgumentParser(parents=[main.get_args_parser()]).parse_args(flags)
            print(json.dumps(main.train_or_evaluate(args, job, runtime.find_device(args.device))), flush=True)
runtime.run(evaluate_all, None)
"""


def prepared(image):
    """What spec/deit.md says of validation images, without torchvision: (3, 224, 224)."""
    image = image.convert("RGB")
    width, height = image.size
    short = min(width, height)
    side = image.resize((256 * width // short, 256 * height // short), Image.BICUBIC)
    left, top = round((side.width - 224) / 2), round((side.height - 224) / 2)
    pixels = np.asarray(side.crop((left, top, left + 224, top + 224)), np.float32) / 255
    return torch.from_numpy(((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)).float()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """(data path with val/ and val.tar, filled checkpoint, what its evaluation has to give)

    The images are the real sample where it is at hand. The head is made from their features so that many
    classes are right at once, some at the second guess and some not at all.
    """
    root = tmp_path_factory.mktemp("imagenet")
    if REAL.is_dir():
        (root / "val").symlink_to(REAL)
    else:
        write_images(root / "val", tuple("abcdefgh"), 5, size=230)
    write_tar(root / "val.tar", root / "val")
    classes = sorted(folder.name for folder in (root / "val").iterdir())
    files = [file for name in classes for file in sorted((root / "val" / name).rglob("*.*"))]
    targets = torch.tensor([classes.index(file.relative_to(root / "val").parts[0]) for file in files])
    model = create_model(TINY).eval()
    model.load_state_dict(fill_state_dict(model.state_dict()))
    with torch.no_grad():
        images = [prepared(Image.open(file)) for file in files]
        features = torch.cat([model.forward_head(model.forward_features(x[None]), pre_logits=True) for x in images])
        model.head.weight.zero_()
        for number in range(len(classes)):
            seen, scale = [(number, 0.05), (number, 0.05), (number - 1, 0.052), (number, -0.05)][number % 4]
            model.head.weight[number] = scale * (features[targets == seen].mean(0) - features.mean(0))
        logits = torch.cat([model(x[None]) for x in images]).double()
    torch.save({"model": model.state_dict()}, root / "filled.pth")
    rank = (logits > logits.gather(1, targets[:, None])).sum(1)  # logits above the right one
    loss = (logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]).mean().item()
    return (
        root,
        root / "filled.pth",
        {
            "loss": loss,
            "acc1": 100 * (rank < 1).double().mean().item(),
            "acc5": 100 * (rank < 5).double().mean().item(),
        },
    )


def flags_of(imagenet, batch, tar=()):
    root, checkpoint, _ = imagenet
    return [
        str(flag)
        for flag in (
            "--device",
            "cpu",
            "--model",
            TINY,
            "--data-path",
            root,
            "--batch-size",
            batch,
            "--num_workers",
            1,
            "--eval",
            "--resume",
            checkpoint,
            *tar,
        )
    ]


def agrees(result, expected):
    return (result["acc1"], result["acc5"]) == pytest.approx((expected["acc1"], expected["acc5"]), abs=1e-9) and (
        result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    )


def test_evaluation_gives_what_one_image_at_a_time_gives(imagenet):
    expected = imagenet[2]
    assert 10 < expected["acc1"] < expected["acc5"] < 100 and 0.1 < expected["loss"] < 10
    assert all(agrees(main.main(parse(*flags_of(imagenet, *case))), expected) for case in CASES)


@pytest.mark.parametrize("processes", [2, 3])  # each with two of the four cases
def test_evaluation_is_the_same_for_any_number_of_processes_and_any_batch(imagenet, tmp_path, processes):
    write_images(tmp_path / "val", ("a", "b"), 1)  # one process of three has none
    few = [str(flag) for flag in small(tmp_path, "--eval")]
    chosen = (CASES[0], CASES[3]) if processes == 2 else CASES[1:3]
    cases = [few, [*flags_of(imagenet, 32), "--no-dist-eval"]] + [flags_of(imagenet, *case) for case in chosen]
    expected = [main.main(parse(*few))] + [imagenet[2]] * 3
    for process in start_processes(processes, "-c", PROGRAM, json.dumps(cases)):
        status, out, err = finish(process)
        assert status == 0, err
        results = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        assert len(results) == len(cases) and all(map(agrees, results, expected))


def test_launched_evaluation_prints_the_published_last_line(imagenet):
    flags = flags_of(imagenet, 7, ("--load-tar",))
    status, out, err = finish(start(*launcher(2, "--use_env"), "main.py", *flags))
    assert status == 0, err
    expected = imagenet[2]
    assert re.fullmatch(r"\* Acc@1 \d+\.\d{3} Acc@5 \d+\.\d{3} loss \d+\.\d{3}", out.splitlines()[-1])
    assert out.splitlines()[-1] == (
        f"* Acc@1 {expected['acc1']:.3f} Acc@5 {expected['acc5']:.3f} loss {expected['loss']:.3f}"
    )


def loader_of(logits, targets, shards=(1, 0)):
    data = TensorDataset(logits, targets)
    return DataLoader(data, 3, sampler=ShardSampler(data, *shards))


@pytest.mark.parametrize("classes", [2, 4, 5, 9])
def test_accuracies_are_right_for_few_and_many_classes(classes):
    """The right class is once the first guess, once the second, and so on to the last."""
    targets = torch.arange(classes) * 2 % classes
    logits = image(1, (classes, classes)).sort(1, descending=True).values
    for i, target in enumerate(targets):
        logits[i, [i, target]] = logits[i, [target, i]]
    stats = engine.evaluate(loader_of(logits, targets), torch.nn.Identity(), torch.device("cpu"))
    assert stats["acc1"] == pytest.approx(100 / classes)
    assert stats["acc5"] == pytest.approx(100 * min(5, classes) / classes)
    assert stats["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item())


def test_evaluation_turns_off_what_is_only_for_training(image_root):
    model = torch.nn.Sequential(torch.nn.Dropout(0.9)).train()
    logits, targets = image(1, (6, 4)), torch.arange(6) % 4
    assert engine.evaluate(loader_of(logits, targets), model, torch.device("cpu")) == engine.evaluate(
        loader_of(logits, targets), torch.nn.Identity(), torch.device("cpu")
    )


def test_evaluation_that_is_not_finite_or_has_no_images_is_an_error():
    device = torch.device("cpu")
    with pytest.raises(UserError, match="loss of the evaluation is nan"):
        engine.evaluate(loader_of(torch.full((2, 3), float("nan")), torch.zeros(2).long()), torch.nn.Identity(), device)
    with pytest.raises(UserError, match="no images"):
        engine.evaluate(loader_of(torch.zeros(0, 3), torch.zeros(0).long()), torch.nn.Identity(), device)
