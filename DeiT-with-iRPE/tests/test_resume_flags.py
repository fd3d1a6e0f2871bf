"""Which flags a resumed run follows, and the one note about those that it does not."""

import argparse
import re

import pytest
import timm.optim
import timm.scheduler
import torch

import checkpoint
import main
from conftest import parse, small
from runtime import UserError, checkpoint_to_resume, load_checkpoint
from test_long_runs import Interrupted, rows, signal, stop_at  # noqa: F401, a fixture among them
from test_schedule import timm_has_plateau

EPOCHS = 12  # of the runs; the checkpoint is that of epoch 2
HORIZON = 32  # of the comparison: timm's multistep schedule decays after 30 epochs
SCHEDULES = ["cosine", "tanh", "step", "multistep", "poly", "none"] + ["plateau"] * timm_has_plateau()
SCHEDULES += ["wsd", "rsqrt"] * hasattr(timm.scheduler, "WSDLRScheduler")
RUN = [
    "--epochs",
    EPOCHS,
    "--warmup-epochs",
    2,
    "--decay-epochs",
    3,
    "--patience-epochs",
    1,
    "--cooldown-epochs",
    1,
    "--decay-rate",
    0.5,
]

# Every flag of main.py is in one of these, with another value than its default, or in a table of checkpoint.py.
FOLLOWED = {
    "model": ["test_vit"],
    "input_size": [48],
    "drop": [0.3],
    "drop_path": [0.3],
    "model_ema": None,
    "model_ema_decay": [0.5],
    "model_ema_force_cpu": [],
    "clip_grad": [1],
    "color_jitter": [0.1],
    "aa": ["none"],
    "hflip": [0],
    "min_crop": [0.5],
    "smoothing": [0],
    "train_interpolation": ["random"],
    "repeated_aug": None,
    "load_tar": [],
    "reprob": [0],
    "remode": ["const"],
    "recount": [2],
    "resplit": [],
    "mixup": [0],
    "cutmix": [0],
    "cutmix_minmax": [0.2, 0.3],
    "mixup_prob": [0.5],
    "mixup_switch_prob": [0.1],
    "mixup_mode": ["elem"],
    "teacher_model": ["x"],
    "teacher_path": ["x"],
    "distillation_type": ["soft"],
    "distillation_alpha": [0.1],
    "distillation_tau": [2],
    "data_path": ["x"],
    "data_set": ["FOLDER"],
    "inat_category": ["class"],
    "output_dir": ["x"],
    "device": ["cpu"],
    "amp_dtype": ["bfloat16"],
    "save_every": [3],
    "step_timeout": [7],
    "dist_eval": None,
    "num_workers": [1],
    "pin_mem": None,
    "compile": [],
}
HELD = {
    "lr": [0.01],
    "epochs": [20],
    "weight_decay": [0.3],
    "opt_betas": [0.7, 0.8],
    "opt_eps": [1e-3],
    "momentum": [0.7],
    "warmup_epochs": [6],
    "warmup_lr": [1e-3],
    "min_lr": [1e-3],
    "decay_epochs": [2],
    "decay_rate": [0.1],
    "patience_epochs": [4],
    "cooldown_epochs": [4],
    "lr_noise": [0.2, 0.7],
    "lr_noise_pct": [0.2],
    "lr_noise_std": [0.1],
    "seed": [5],
}
REFUSED = {"opt", "sched", "rpe", "model_kwargs"}  # with another value than the checkpoint's there is an error
SCALES_THE_RATE = {"batch_size", "world_size"}  # followed, but for the rate
NO_PART_OF_TRAINING = {"resume", "eval", "dist_url", "local_rank"}


def flag_of(name):
    return {action.dest: action.option_strings[0] for action in main.get_args_parser()._actions}[name]


def set_flag(name, values):
    """Command line that sets a flag; None stands for one that is on by default and has an opposite."""
    return [flag_of(name), *values] if values is not None else ["--no-" + name.replace("_", "-")]


class Classifier(torch.nn.Linear):
    pretrained_cfg = {}

    def __init__(self):
        super().__init__(4, 4)


def begin(*flags, world_size=1):
    args = parse(*RUN, *flags)
    args.world_size = world_size
    return args, main.build_state(args, Classifier())


def future(state, first):
    """Everything that decides about the steps of the epochs from ``first`` on: the groups' values in each of them."""
    seen = []
    for epoch in range(first, HORIZON):
        groups = [
            {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
            for group in state.optimizer.param_groups
        ]
        seen.append(repr(groups))
        if state.lr_scheduler:
            state.lr_scheduler.step(epoch, 50.0)
    return seen


def save(path, args, state, progress=None):
    """The checkpoint after epoch 2."""
    for epoch in range(3):
        if state.lr_scheduler:
            state.lr_scheduler.step(epoch, 50.0)
    state.save(path, 2, args, progress)
    return path


@pytest.fixture
def resume(capsys):
    """Resumes a checkpoint with a command line: the state, and the flags in the note, each with its text."""

    def resume(path, *flags, world_size=1):
        args, state = begin("--resume", path, *flags, world_size=world_size)
        before = dict(vars(args))
        capsys.readouterr()
        main.resume(args, state, checkpoint_to_resume(path, ""))
        assert vars(args) == before  # so all that reads them follows them
        said = capsys.readouterr().out
        notes = re.findall(r"note: resuming from (\S+) keeps these values.*?: (--.*)\. A new run follows", said)
        assert len(notes) == said.count("note: resuming from") <= 1 and all(named == str(path) for named, _ in notes)
        entries = notes[0][1].split("; ") if notes else []
        return state, {re.match(r"--[\w-]+", entry)[0]: entry for entry in entries}

    return resume


def test_every_flag_is_classified():
    flags = {action.dest for action in main.get_args_parser()._actions}
    assert HELD.keys() == {"lr", "epochs"} | checkpoint.OPTIMIZER_FLAGS.keys() | checkpoint.SCHEDULE_FLAGS.keys()
    kinds = [FOLLOWED.keys(), HELD.keys(), checkpoint.START_FLAGS.keys(), REFUSED, SCALES_THE_RATE, NO_PART_OF_TRAINING]
    assert sorted(name for kind in kinds for name in kind) == sorted(flags)


@pytest.mark.parametrize(
    "base",
    [
        *(["--sched", name] for name in SCHEDULES),
        ["--lr-noise", 0],
        *(["--lr-noise", 0, "--sched", name] for name in SCHEDULES if name == "plateau"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_note_lists_the_flags_that_a_resumed_run_does_not_follow_and_no_others(tmp_path, resume, base):
    path = save(tmp_path / "c.pth", *begin(*base))
    unchanged, note = resume(path, *base)
    assert note == {}
    whole, expected = future(begin(*base)[1], 0), future(unchanged, 3)
    assert expected == whole[3:]
    for name, values in HELD.items():
        if name == "warmup_lr" and "plateau" in base:
            continue  # timm does not save it, and it has no effect after the warm-up
        changed = [*base, *set_flag(name, values)]
        matters = future(begin(*changed)[1], 0) != whole
        state, note = resume(path, *changed)
        followed = future(state, 3) != expected
        assert list(note) == [flag_of(name)] * (matters and not followed), (name, note)


# one for each set of names that groups of timm's optimizers have; older timm lacks some
@pytest.mark.parametrize(
    "optimizer",
    sorted(
        {"adamw", "sgd", "lion", "rmsprop", "adan", "adafactor", "mars", "muon"} & set(timm.optim.list_optimizers())
    ),
)
def test_note_lists_what_each_optimizer_keeps(tmp_path, resume, optimizer):
    base = ["--opt", optimizer, "--sched", "none"]
    whole = future(begin(*base)[1], 0)
    path = save(tmp_path / "c.pth", *begin(*base))
    for name in ("lr", *checkpoint.OPTIMIZER_FLAGS):
        values = [0.7, 0.8, 0.9] if name == "opt_betas" and "adan" in optimizer else HELD[name]
        matters = future(begin(*base, flag_of(name), *values)[1], 0) != whole
        state, note = resume(path, *base, flag_of(name), *values)
        assert future(state, 3) == whole[3:] and list(note) == [flag_of(name)] * matters, (name, note)


@pytest.mark.parametrize("name", FOLLOWED)
def test_flags_that_are_followed_are_not_listed(tmp_path, resume, name):
    path = save(tmp_path / "c.pth", *begin())
    args = parse(*set_flag(name, FOLLOWED[name]))
    assert getattr(args, name) != getattr(parse(), name)
    state, note = resume(path, *set_flag(name, FOLLOWED[name]))
    assert note == {}
    assert state.model_ema is None if name == "model_ema" else state.model_ema.decay == args.model_ema_decay


def test_both_values_are_shown(tmp_path, resume):
    path = save(tmp_path / "c.pth", *begin("--sched", "cosine", "--lr-noise", 0.25))
    _, note = resume(
        path,
        "--lr",
        1e-3,
        "--batch-size",
        256,
        "--epochs",
        24,
        "--weight-decay",
        0.1,
        "--opt-betas",
        0.8,
        0.9,
        "--min-lr",
        0,
        "--lr-noise",
        0.25,
        0.5,
        "--seed",
        3,
        world_size=4,
    )
    assert list(note.values()) == [
        "--lr scaled to 1024 images a step: 6.25e-05, not 0.002",
        "--weight-decay: 0.05, not 0.1",
        "--opt-betas: 0.9 0.999, not 0.8 0.9",
        "--epochs for the learning-rate schedule: 12, not 24",
        "--min-lr: 1e-05, not 0",
        "--lr-noise in epochs: 3, not 6 12",
        "--seed for --lr-noise: 0, not 3",
    ]


@pytest.mark.parametrize(
    ("flags", "world_size", "rate"),
    [(["--batch-size", 32], 1, "3.125e-05"), ([], 8, "0.0005"), (["--batch-size", 32], 2, None)],
)
def test_rate_that_other_batches_or_processes_would_have_is_listed(tmp_path, resume, flags, world_size, rate):
    _, note = resume(save(tmp_path / "c.pth", *begin()), *flags, world_size=world_size)
    assert [text.endswith(f": 6.25e-05, not {rate}") for text in note.values()] == [True] * bool(rate)
    assert note.keys() == {"--lr"} - ({"--lr"} if rate is None else set())


def test_values_that_a_run_resumed_earlier_did_not_follow_are_listed_again(tmp_path, resume):
    path = save(tmp_path / "c.pth", *begin())
    flags = ["--resume", path, "--weight-decay", 0.3]
    args, state = begin(*flags)
    main.resume(args, state, checkpoint_to_resume(path, ""))
    state.save(path, 3, args)
    assert load_checkpoint(path)["args"].weight_decay == 0.3
    _, note = resume(path, *flags[2:])
    assert note == {"--weight-decay": "--weight-decay: 0.05, not 0.3"}


@pytest.mark.parametrize("kind", ["no args", "released", "middle of an epoch"])
def test_flags_are_compared_whatever_the_checkpoint_says_of_its_command_line(tmp_path, resume, kind):
    args, state = begin()
    path = save(tmp_path / "c.pth", args, state, {"images": 64, "values": {}} if kind == "middle of an epoch" else None)
    content = load_checkpoint(path)
    if kind == "no args":
        del content["args"]
    if kind == "released":  # by the public program, with an older timm
        content["args"] = argparse.Namespace(lr=5e-4, weight_decay=0.05, opt="adamw", sched="cosine", start_epoch=7)
        content["lr_scheduler"] |= {"t_mul": 1.0, "decay_rate": 0.1}
        for name in ("cycle_mul", "cycle_decay", "k_decay"):
            del content["lr_scheduler"][name]
    torch.save(content, path)
    assert resume(path)[1] == {}
    _, note = resume(path, "--lr", 1e-3, "--weight-decay", 0.1)
    assert list(note) == ["--lr", "--weight-decay"]


def test_flags_that_say_how_a_run_begins_are_listed_if_the_run_did_not_begin_so(tmp_path, resume):
    path = save(tmp_path / "c.pth", *begin("--finetune", "a.pth"))
    assert resume(path)[1] == resume(path, "--finetune", "a.pth")[1] == resume(path, "--start_epoch", 3)[1] == {}
    flags = ["--finetune", "b.pth", "--start_epoch", 5]
    assert list(resume(path, *flags)[1].values()) == [
        "--finetune for the initial weights: a.pth, not b.pth",
        "--start_epoch: 3, not 5",
    ]
    assert list(resume(path, "--pretrained")[1].values()) == ["--pretrained for the initial weights: no, not yes"]
    torch.save({"model": Classifier().state_dict()}, path)  # the epoch to start with is followed then
    assert list(resume(path, *flags)[1].values()) == ["--finetune for the initial weights: none, not b.pth"]


@pytest.mark.skipif("plateau" not in SCHEDULES, reason="needs a timm whose plateau fits this PyTorch")
def test_rate_at_the_end_of_a_plateaus_warm_up_is_followed_and_not_listed(tmp_path, resume):
    base = ["--sched", "plateau", "--warmup-epochs", 6]
    state, note = resume(save(tmp_path / "c.pth", *begin(*base)), *base, "--lr", 0.01)
    assert note == {} and future(state, 3)[4:] == future(begin(*base, "--lr", 0.01)[1], 0)[7:]


def test_only_the_main_process_prints_the_note(tmp_path, resume, monkeypatch):
    path = save(tmp_path / "c.pth", *begin())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume(path, "--lr", 1)[1] == {}


def test_weights_in_other_groups_are_explained(tmp_path, resume):
    path = save(tmp_path / "c.pth", *begin())
    with pytest.raises(UserError, match="2 parameter groups instead of 1, for example .* --weight-decay 0"):
        resume(path, "--weight-decay", 0)


# Whole runs

TINY_RUN = ["--model", "test_vit", "--batch-size", 12, "--warmup-epochs", 0, "--no-model-ema"]


def test_longer_run_is_resumed_at_the_rates_of_the_first_one_and_says_so(image_root, tmp_path, capsys):
    flags = small(image_root, *TINY_RUN, "--output_dir", tmp_path, "--resume", "auto")
    main.main(parse(*flags, "--epochs", 2))
    assert "note: resuming from" not in capsys.readouterr().out
    main.main(parse(*flags, "--epochs", 3, "--lr", 0.5, "--drop", 0.1, "--mixup", 0))
    said = capsys.readouterr().out
    assert said.count("note: ") == 1
    assert re.search(
        r"--lr scaled to 12 images a step: 1.17188e-05, not 0.0117188; --epochs for the learning-rate "
        r"schedule: 2, not 3\. A new run follows the command line: .* --finetune \S+checkpoint.pth",
        said,
    )
    rates = [row["train_lr"] for row in rows(tmp_path)]
    assert rates[1:] == pytest.approx([rates[0] / 1, 1e-5 + (rates[0] - 1e-5) / 2])


def test_run_that_stopped_within_an_epoch_notes_the_rate_too(image_root, tmp_path, stop_at, capsys):  # noqa: F811
    flags = small(image_root, *TINY_RUN, "--batch-size", 4, "--output_dir", tmp_path)
    patch = stop_at(signal.SIGTERM, step=2)
    with pytest.raises(Interrupted):
        main.main(parse(*flags))
    patch.undo()
    main.main(parse(*flags, "--batch-size", 8, "--resume", tmp_path / "checkpoint.pth"))
    said = capsys.readouterr().out
    assert "--lr scaled to 8 images a step: 3.90625e-06, not 7.8125e-06. A new" in said
    assert rows(tmp_path)[0]["train_lr"] == pytest.approx(3.90625e-06)
