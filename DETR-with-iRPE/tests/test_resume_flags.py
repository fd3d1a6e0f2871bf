"""Which flags a resumed run follows, and the one note about those that it does not."""

import argparse
import json
import re

import pytest
import torch

import main
from conftest import parse, small
from util import checkpoint, runtime

# Every flag of main.py is in one of these, with another value than its default.
FOLLOWED = {
    "batch_size": [3],
    "epochs": [9],
    "clip_max_norm": [1],
    "amp_dtype": ["bfloat16"],
    "no_augmentation": [],
    "eval_every": [2],
    "backbone": ["resnet18"],
    "no_pretrained_backbone": [],
    "dilation": [],
    "last_stride": [1],
    "position_embedding": ["learned"],
    "enc_layers": [1],
    "dec_layers": [1],
    "dim_feedforward": [16],
    "hidden_dim": [16],
    "dropout": [0],
    "nheads": [4],
    "num_queries": [5],
    "pre_norm": [],
    "enc_rpe2d": ["rpe-2.0-product-ctx-1-k"],
    "num_classes": [7],
    "masks": [],
    "aux_loss": [],
    "set_cost_class": [2],
    "set_cost_bbox": [2],
    "set_cost_giou": [3],
    "bbox_loss_coef": [2],
    "giou_loss_coef": [3],
    "mask_loss_coef": [2],
    "dice_loss_coef": [2],
    "eos_coef": [0.2],
    "dataset_file": ["coco_panoptic"],
    "coco_path": ["x"],
    "coco_panoptic_path": ["x"],
    "remove_difficult": [],
    "short_side": [64],
    "num_workers": [1],
    "eval_batch_size": [1],
    "output_dir": ["x"],
    "device": ["cpu"],
    "seed": [7],
    "save_every": [3],
    "step_timeout": [7],
    "compile": [],
}
HELD = {"lr": [1e-3], "lr_backbone": [1e-3], "weight_decay": [0.1], "lr_drop": [3]}
NO_PART_OF_TRAINING = {"resume", "finetune", "eval", "world_size", "dist_url", "local_rank"}


def begin(*flags):
    args = parse("--lr_drop", 2, *flags)
    model = torch.nn.ModuleDict({"backbone": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    for parameter in model["backbone"].parameters():
        parameter.requires_grad = args.lr_backbone > 0
    optimizer = main.build_optimizer(model, args)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, args.lr_drop)
    return args, main.TrainingState(model, optimizer, schedule, torch.amp.GradScaler("cpu", enabled=False))


def future(state, first):
    """Everything that decides about the steps of the epochs from `first` on: the groups' values in each of them."""
    seen = []
    for _ in range(first, 9):
        seen.append(
            repr(
                [
                    {
                        name: round(value, 12) if name == "lr" else value
                        for name, value in group.items()
                        if name not in ("params", "initial_lr")
                    }
                    for group in state.optimizer.param_groups
                ]
            )
        )
        state.optimizer.step()
        state.lr_scheduler.step()
    return seen


def save(path, args, state, progress=None):
    """The checkpoint after epoch 0."""
    state.optimizer.step()
    state.lr_scheduler.step()
    state.save(path, 0, args, progress)
    return path


@pytest.fixture
def resume(capsys):
    """Resumes a checkpoint with a command line: the state, and the flags in the note, each with its text."""

    def resume(path, *flags):
        args, state = begin("--resume", path, *flags)
        before = dict(vars(args))
        capsys.readouterr()
        main.start_or_resume(state, args, runtime.checkpoint_to_resume(path, ""))
        assert vars(args) == before  # so all that reads them follows them
        said = capsys.readouterr().out
        notes = re.findall(r"note: resuming from (\S+) keeps these values.*?: (--.*)\. A new run follows", said)
        assert len(notes) == said.count("note: resuming from") <= 1 and all(named == str(path) for named, _ in notes)
        entries = notes[0][1].split("; ") if notes else []
        return state, {re.match(r"--(\w+)", entry)[1]: entry for entry in entries}

    return resume


def test_every_flag_is_classified():
    flags = {action.dest for action in main.get_args_parser()._actions}
    kinds = [FOLLOWED.keys(), HELD.keys(), checkpoint.START_FLAGS.keys(), NO_PART_OF_TRAINING]
    assert sorted(name for kind in kinds for name in kind) == sorted(flags)


def test_note_lists_each_flag_that_a_resumed_run_does_not_follow(tmp_path, resume):
    path = save(tmp_path / "c.pth", *begin())
    unchanged, note = resume(path)
    expected = future(unchanged, 1)
    assert note == {} and expected == future(begin()[1], 0)[1:]
    for name, values in HELD.items():
        assert future(begin(f"--{name}", *values)[1], 0)[1:] != expected
        state, note = resume(path, f"--{name}", *values)
        assert future(state, 1) == expected and list(note) == [name]


@pytest.mark.parametrize("name", FOLLOWED)
def test_flags_that_are_followed_are_not_listed(tmp_path, resume, name):
    (flag,) = (action.option_strings[0] for action in main.get_args_parser()._actions if action.dest == name)
    assert getattr(parse(flag, *FOLLOWED[name]), name) != getattr(parse(), name)
    assert resume(save(tmp_path / "c.pth", *begin()), flag, *FOLLOWED[name])[1] == {}


@pytest.mark.parametrize("kind", ["own", "no args", "released", "middle of an epoch", "resumed before"])
def test_both_values_are_shown_whatever_the_checkpoint_says_of_its_command_line(tmp_path, resume, kind):
    args, state = begin()
    path = save(tmp_path / "c.pth", args, state, {"images": 4, "values": {}} if kind == "middle of an epoch" else None)
    content = runtime.load_checkpoint(path)
    if kind == "no args":
        del content["args"]
    if kind == "released":
        content["args"] = argparse.Namespace(lr=1e-4, lr_drop=200, frozen_weights=None, start_epoch=7, bar=1)
        content["lr_scheduler"]["verbose"] = False
    if kind == "resumed before":
        content["args"].lr = 1e-3
    torch.save(content, path)
    assert resume(path)[1] == {}
    _, note = resume(path, "--lr", 1e-3, "--lr_backbone", 2e-5, "--lr_drop", 1, "--weight_decay", 0)
    assert list(note.values()) == [
        "--lr: 0.0001, not 0.001",
        "--weight_decay: 0.0001, not 0",
        "--lr_drop: 2, not 1",
        "--lr_backbone: 1e-05, not 2e-05",
    ]


def test_rate_of_a_backbone_that_stays_as_it_is_is_not_listed(tmp_path, resume):
    frozen = ["--lr_backbone", 0]
    path = save(tmp_path / "c.pth", *begin(*frozen))
    content = runtime.load_checkpoint(path)
    content["optimizer"]["param_groups"][1]["initial_lr"] = 1e-5
    torch.save(content, path)
    assert resume(path, *frozen)[1] == {}


def test_flags_that_say_how_a_run_begins_are_listed_if_the_run_did_not_begin_so(tmp_path, resume):
    path = save(tmp_path / "c.pth", *begin("--frozen_weights", "a.pth"))
    for flags in ([], ["--frozen_weights", "a.pth"], ["--start_epoch", 1]):
        assert resume(path, *flags)[1] == {}
    flags = ["--frozen_weights", "b.pth", "--start_epoch", 5]
    assert list(resume(path, *flags)[1].values()) == ["--frozen_weights: a.pth, not b.pth", "--start_epoch: 1, not 5"]
    torch.save({"model": begin()[1].model.state_dict()}, path)  # the epoch to start with is followed then
    assert list(resume(path, *flags)[1].values()) == ["--frozen_weights: none, not b.pth"]


def test_only_the_main_process_prints_the_note(tmp_path, resume, monkeypatch):
    path = save(tmp_path / "c.pth", *begin())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume(path, "--lr", 1)[1] == {}


def test_a_run_that_goes_on_at_the_old_rates_says_so(coco, tmp_path, capsys):
    flags = small(coco, "--output_dir", tmp_path, "--resume", "auto", "--no_augmentation", "--eval_every", 9)
    main.main(parse(*flags))
    assert "note: resuming from" not in capsys.readouterr().out
    main.main(parse(*flags, "--epochs", 2, "--lr", 1e-3, "--lr_drop", 1, "--eos_coef", 0.2))
    said = capsys.readouterr().out
    assert said.count("note: ") == 1
    assert re.search(
        r"note: resuming from \S+checkpoint.pth keeps .*: --lr: 0.0001, not 0.001; --lr_drop: 200, not 1\. A "
        r"new run follows the command line: leave --resume out, or use --resume \S+pth --finetune",
        said,
    )
    rates = [json.loads(line)["train_lr"] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert rates == pytest.approx([1e-4, 1e-4])
