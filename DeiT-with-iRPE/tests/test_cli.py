"""The flags are the published ones, and each does something."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import main
import run_with_submitit
import runtime
from conftest import TINY, parse

PUBLISHED = json.loads((Path(__file__).parent / "golden" / "cli_deit.json").read_text())
ADDED = {
    "--amp-dtype",
    "--no-dist-eval",
    "--hflip",
    "--min-crop",
    "--local-rank",
    "--local_rank",
    "--save-every",
    "--step-timeout",
    "--rpe",
    "--model-kwargs",
    "--compile",
}


def actions():
    return {flag: action for action in main.get_args_parser()._actions for flag in action.option_strings}


@pytest.mark.parametrize("flag", PUBLISHED, ids=lambda flag: flag["flags"][0])
def test_every_published_flag_keeps_its_name_default_type_and_choices(flag):
    action = actions()[flag["flags"][0]]
    kind = {"Store": "_StoreAction", "StoreTrue": "_StoreTrueAction", "StoreFalse": "_StoreFalseAction"}[flag["kind"]]
    assert action.option_strings == flag["flags"] and action.dest == flag["dest"] and type(action).__name__ == kind
    assert main.get_args_parser().get_default(flag["dest"]) == flag["default"]
    assert (action.type and action.type.__name__) == flag["type"] and action.nargs == flag["nargs"]
    assert (action.choices and set(action.choices) - {"FOLDER"}) == (flag["choices"] and set(flag["choices"]))


def test_only_justified_flags_were_added():
    assert set(actions()) - {name for flag in PUBLISHED for name in flag["flags"]} == ADDED


def test_help_of_all_flags_can_be_printed():
    assert "--load-tar" in main.get_args_parser().format_help()


@pytest.mark.parametrize("spelling", ["--local-rank=1", "--local_rank=1"])
def test_both_spellings_of_the_launchers_flag_are_taken(spelling):
    assert parse(spelling).local_rank == 1


def training_batch(*flags):
    args = parse("--input-size", 32, "--data-set", "FOLDER", *flags)
    transform, collate = datasets.build_transform(True, args), datasets.build_collate(args)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (50, 60, 3), np.uint8))
    batches = []
    for seed in range(6):
        main.seed_everything(seed)
        batches.append(collate([(transform(image), 0) for _ in range(4)])[0])
    return torch.stack(batches)


@pytest.mark.parametrize(
    ("base", "changed"),
    [
        ([], ["--aa", "none"]),
        (["--aa", "none"], ["--color-jitter", 0]),
        ([], ["--hflip", 0]),
        ([], ["--min-crop", 1]),
        ([], ["--train-interpolation", "bilinear"]),
        ([], ["--reprob", 0]),
        ([], ["--remode", "const"]),
        ([], ["--recount", 3]),
        ([], ["--resplit"]),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_augmentation_flag_changes_the_training_images(base, changed):
    assert torch.equal(training_batch(*base), training_batch(*base))
    assert not torch.equal(training_batch(*base), training_batch(*base, *changed))


def mixed_batch(*flags):
    mixup = main.build_mixup(parse(*flags), nb_classes=4)
    batches = []
    for seed in range(6):
        main.seed_everything(seed)
        images, targets = mixup(torch.rand(4, 3, 32, 32), torch.arange(4))
        batches.append(torch.cat([images.flatten(), targets.flatten()]))
    return torch.stack(batches)


@pytest.mark.parametrize(
    "changed",
    [
        ["--mixup", 0],
        ["--cutmix", 0],
        ["--cutmix-minmax", 0.2, 0.3],
        ["--mixup-prob", 0.3],
        ["--mixup-switch-prob", 0.9],
        ["--mixup-mode", "elem"],
        ["--smoothing", 0],
    ],
    ids=lambda flags: flags[0],
)
def test_mixing_flag_changes_the_mixed_batch(changed):
    assert torch.equal(mixed_batch(), mixed_batch())
    assert not torch.equal(mixed_batch(), mixed_batch(*changed))


def test_no_mixing_at_all_with_both_ratios_at_zero():
    assert main.build_mixup(parse("--mixup", 0, "--cutmix", 0), nb_classes=4) is None


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        (["--weight-decay", 0.3], "weight_decay", 0.3),
        (["--opt-eps", 1e-5], "eps", 1e-5),
        (["--opt-betas", 0.8, 0.9], "betas", (0.8, 0.9)),
        (["--opt", "sgd", "--momentum", 0.7], "momentum", 0.7),
        (["--lr", 0.256, "--batch-size", 16, "--sched", "none"], "lr", 0.256 * 16 / 512),
    ],
    ids=lambda value: str(value),
)
def test_optimizer_flag_reaches_the_optimizer(flags, field, value):
    optimizer = main.build_optimizer(parse(*flags), torch.nn.Linear(2, 2))
    assert field == "weight_decay" or all(np.allclose(group[field], value) for group in optimizer.param_groups)
    assert field != "weight_decay" or [group[field] for group in optimizer.param_groups] == [0, value]


def test_model_flags_reach_the_model():
    args = parse("--model", TINY, "--input-size", 48, "--drop", 0.25, "--drop-path", 0.5)
    model = main.build_model(args, nb_classes=7)
    assert model(torch.zeros(1, 3, 48, 48)).shape == (1, 7) and model.patch_embed.img_size == (48, 48)
    block = model.blocks[-1]
    assert {model.pos_drop.p, block.attn.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p} == {0.25}
    assert block.drop_path1.drop_prob == 0.5
    assert [b.drop_path1.drop_prob for b in model.blocks[1:3]] == pytest.approx([0.5 / 11, 1 / 11])


def test_patch_size_of_timms_models_may_be_one_number():
    assert main.build_model(parse("--model", "xcit_nano_12_p16_224", "--input-size", 32), 3).num_classes == 3


@pytest.mark.parametrize("flags", [[], ["--model-ema-force-cpu"]])
def test_moving_average_has_its_decay_and_place(flags):
    state = main.build_state(parse("--model-ema-decay", 0.5, *flags), torch.nn.Linear(2, 2))
    assert state.model_ema.decay == 0.5 and state.model_ema.device == ("cpu" if flags else None)
    assert main.build_state(parse("--no-model-ema"), torch.nn.Linear(2, 2)).model_ema is None


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
