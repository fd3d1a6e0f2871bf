"""Every flag of the public implementation has its name, type and default, and does what it says."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import main
import run_with_submitit
import visualize
from conftest import load_annotations, parse, save_annotations, small, write_panoptic, write_set
from models import build_model
from util import runtime
from util.runtime import UserError

FLAGS = json.loads((Path(__file__).parent / "golden" / "cli_detr.json").read_text())


@pytest.mark.parametrize("flag", FLAGS, ids=[flag["dest"] for flag in FLAGS])
def test_every_released_flag_has_its_name_type_and_default(flag):
    (action,) = (action for action in main.get_args_parser()._actions if action.dest == flag["dest"])
    assert action.option_strings == flag["flags"] and action.default == flag["default"]
    assert (action.type or str).__name__ == (flag["type"] or "str")
    assert action.nargs == flag["nargs"] and (action.choices and list(action.choices)) == flag["choices"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set with panoptic annotations, whose first training image has an object marked difficult, and the weights
    of a detector for it in detector.pth."""
    root = write_set(tmp_path_factory.mktemp("flags"), count=4)
    for split in ("train", "val"):
        write_panoptic(root, root / "panoptic", split)
    data = load_annotations(root, "train")
    data["annotations"][0]["difficult"] = 1
    save_annotations(root, "train", data)
    torch.save({"model": build_model(parse(*small(root, "--num_classes", 5)))[0].state_dict()}, root / "detector.pth")
    return root


@pytest.fixture(scope="module")
def start(root):
    """Runs main.py on flags up to its first step: what the loops of training and evaluation were given, a list each."""

    def start(*flags):
        epochs, evaluations = [], []

        def train_one_epoch(model, criterion, run, optimizer, device, scaler, max_norm, amp_dtype):
            optimizer.step()
            epochs.append(
                SimpleNamespace(
                    model=model,
                    criterion=criterion,
                    loader=run.loader,
                    optimizer=optimizer,
                    device=device,
                    epoch=run.epoch,
                    max_norm=max_norm,
                    rates=[group["lr"] for group in optimizer.param_groups],
                )
            )
            return {}

        def evaluate(model, criterion, postprocessors, loader, *rest):
            evaluations.append(SimpleNamespace(model=model, postprocessors=postprocessors, loader=loader))
            return {}, None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(main, "train_one_epoch", train_one_epoch)
            patch.setattr(main, "evaluate", evaluate)
            main.main(parse(*small(root, *flags)))
        return epochs, evaluations

    return start


@pytest.fixture(scope="module")
def plain(start):
    """The first epoch without further flags."""
    return start()[0][0]


def encoder(run):
    return run.model.transformer.encoder.layers


# flag: what it is set to, with what it needs beside it; what is seen of it in the first epoch; and what that is then.
# The others have a test of their own below.
SEEN = {
    "lr": ([0.5], lambda run: run.rates[0], 0.5),
    "lr_backbone": ([0.25], lambda run: run.rates[1], 0.25),
    "batch_size": ([3], lambda run: run.loader.batch_size, 3),
    "weight_decay": ([0.5], lambda run: run.optimizer.defaults["weight_decay"], 0.5),
    "clip_max_norm": ([7], lambda run: run.max_norm, 7),
    "backbone": (["resnet34"], lambda run: len(run.model.backbone[0].body.layer3), 6),
    "dilation": (["--backbone", "resnet50"], lambda run: run.model.backbone[0].body.layer4[1].conv2.dilation, (2, 2)),
    "position_embedding": (["learned"], lambda run: type(run.model.backbone[1]).__name__, "PositionEmbeddingLearned"),
    "enc_layers": ([3], lambda run: len(encoder(run)), 3),
    "dec_layers": ([3], lambda run: len(run.model.transformer.decoder.layers), 3),
    "dim_feedforward": ([24], lambda run: encoder(run)[0].linear1.out_features, 24),
    "hidden_dim": ([32], lambda run: run.model.input_proj.out_channels, 32),
    "dropout": ([0.5], lambda run: encoder(run)[0].dropout.p, 0.5),
    "nheads": ([4], lambda run: encoder(run)[0].self_attn.num_heads, 4),
    "num_queries": ([6], lambda run: run.model.query_embed.num_embeddings, 6),
    "pre_norm": ([], lambda run: encoder(run)[0].norm_first, True),
    "enc_rpe2d": (["rpe-2.0-product-ctx-1-q"], lambda run: encoder(run)[0].self_attn.rpe_q is not None, True),
    "masks": ([], lambda run: hasattr(run.model, "mask_head"), True),
    "aux_loss": ([], lambda run: run.model.aux_loss or "loss_ce_0" in run.criterion.weight_dict, False),
    "set_cost_class": ([9], lambda run: run.criterion.matcher.cost_class, 9),
    "set_cost_bbox": ([9], lambda run: run.criterion.matcher.cost_bbox, 9),
    "set_cost_giou": ([9], lambda run: run.criterion.matcher.cost_giou, 9),
    "mask_loss_coef": ([9, "--masks"], lambda run: run.criterion.weight_dict.get("loss_mask"), 9),
    "dice_loss_coef": ([9, "--masks"], lambda run: run.criterion.weight_dict.get("loss_dice"), 9),
    "bbox_loss_coef": ([9], lambda run: run.criterion.weight_dict["loss_bbox_0"], 9),
    "giou_loss_coef": ([9], lambda run: run.criterion.weight_dict["loss_giou_0"], 9),
    "eos_coef": ([0.5], lambda run: run.criterion.empty_weight[-1].item(), 0.5),
    "seed": ([7], lambda run: run.loader.sampler.seed, 7),
    "num_workers": ([1], lambda run: run.loader.num_workers, 1),
    "start_epoch": ([2, "--epochs", 3], lambda run: run.epoch, 2),
    "remove_difficult": ([], lambda run: len(run.loader.dataset.dataset[0][1]["labels"]), 0),
}


@pytest.mark.parametrize("name", SEEN)
def test_a_flag_reaches_what_it_names(start, plain, name):
    values, seen, expected = SEEN[name]
    (flag,) = (flag["flags"][0] for flag in FLAGS if flag["dest"] == name)
    assert seen(start(flag, *values)[0][0]) == expected and seen(plain) != expected


def test_every_flag_is_tested():
    alone = {name.removeprefix("test_flag_") for name in globals() if name.startswith("test_flag_")}
    assert {flag["dest"] for flag in FLAGS} == alone | SEEN.keys()


def test_flag_epochs(start):
    assert [run.epoch for run in start("--epochs", 3)[0]] == [0, 1, 2]


def test_flag_lr_drop(start):
    for drop, rates in ((1, [1e-4, 1e-5, 1e-6]), (2, [1e-4, 1e-4, 1e-5])):
        assert [run.rates[0] for run in start("--epochs", 3, "--lr_drop", drop)[0]] == pytest.approx(rates)


def test_flag_eval(start):
    epochs, (evaluation,) = start("--eval")
    assert not epochs and evaluation.loader.dataset.path.name == "instances_val2017.json"


def test_flag_output_dir(start, tmp_path):
    start("--output_dir", tmp_path / "out")
    assert {"checkpoint.pth", "log.txt"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_flag_resume(start, tmp_path):
    start("--output_dir", tmp_path, "--epochs", 2)
    assert [run.epoch for run in start("--resume", tmp_path / "checkpoint.pth", "--epochs", 4)[0]] == [2, 3]


def test_flag_frozen_weights(start, root):
    (run,), _ = start("--masks", "--frozen_weights", root / "detector.pth")
    weights = torch.load(root / "detector.pth")["model"]
    assert all(torch.equal(value, weights[key]) for key, value in run.model.detr.state_dict().items())
    assert not any(p.requires_grad for p in run.model.detr.parameters())


def test_flag_coco_path(plain, root):
    assert plain.loader.dataset.dataset.path.is_relative_to(root)


def test_flag_dataset_file(start, root):
    _, (evaluation,) = start("--dataset_file", "coco_panoptic", "--coco_panoptic_path", root / "panoptic", "--masks")
    assert "panoptic" in evaluation.postprocessors
    assert evaluation.model.detr.class_embed.out_features == 251  # as the released models, whatever the set has


def test_flag_coco_panoptic_path(start, root):
    _, (evaluation,) = start("--dataset_file", "coco_panoptic", "--coco_panoptic_path", root / "panoptic")
    assert evaluation.loader.dataset.path.is_relative_to(root / "panoptic")


def test_flag_device(plain):
    assert plain.device == torch.device("cpu")
    assert runtime.find_device("meta") == torch.device("meta")


def test_flag_world_size(start):
    with pytest.raises(UserError, match="--world_size 2"):
        start("--world_size", 2)


@pytest.mark.parametrize("spelling", ["--local-rank=1", "--local_rank=1"])
@pytest.mark.parametrize("program", ["main", "run_with_submitit", "visualize"])
def test_both_spellings_of_the_launchers_flag_are_taken_and_not_shown(program, spelling):
    if program == "main":
        parser = argparse.ArgumentParser(parents=[main.get_args_parser()], allow_abbrev=False)
    elif program == "visualize":
        parser = visualize.parser()
    else:
        parser = run_with_submitit.get_parser()
    required = ["--image", "x"] if program == "visualize" else []
    assert parser.parse_args([spelling, *required]).local_rank == 1
    assert "local-rank" not in parser.format_help() and "local_rank" not in parser.format_help()


def test_flag_dist_url(monkeypatch):
    asked = []

    def rendezvous(url, *args, **kwargs):
        asked.append(url)
        raise ValueError("nobody is there")

    monkeypatch.setattr(dist, "rendezvous", rendezvous)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--dist_url tcp://somewhere:29500"):
        main.main(parse("--device", "cpu", "--dist_url", "tcp://somewhere:29500", "--coco_path", "x"))
    assert asked == ["tcp://somewhere:29500"]


def test_every_flag_is_accepted_in_both_spellings():
    parser = run_with_submitit.get_parser()  # has the flags of main.py and its own
    flags = {flag: action for action in parser._actions for flag in action.option_strings if flag.startswith("--")}
    spellings = {flag: {"--" + flag[2:].replace("-", "_"), "--" + flag[2:].replace("_", "-")} for flag in flags}
    others = [(flag, other) for flag in flags for other in spellings[flag] - {flag}]
    assert len(others) > 30
    for flag, other in others:
        action = flags[flag]
        value = "a=1" if action.dest == "model_kwargs" else str((action.choices or ["1"])[0])
        values = [] if action.nargs == 0 else [value]
        assert parser.parse_args([other, *values]) == parser.parse_args([flag, *values])
        if action.nargs is None:
            assert parser.parse_args([f"{other}={value}"]) == parser.parse_args([flag, value])


@pytest.mark.parametrize("flag", ["--save-every", "--save_every"])
def test_main_accepts_a_flag_in_both_spellings(flag):
    assert main.get_args_parser().parse_args([flag, "7"]).save_every == 7
    assert runtime.ArgumentParser(parents=[main.get_args_parser()]).parse_args([flag, "7"]).save_every == 7


def test_unknown_flag_is_reported_as_it_was_given(capsys):
    with pytest.raises(SystemExit):
        main.get_args_parser().parse_args(["--save_evry", "7"])
    assert "--save_evry" in capsys.readouterr().err
