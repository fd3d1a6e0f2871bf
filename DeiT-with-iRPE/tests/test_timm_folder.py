"""tools/timm_folder.py: a checkpoint as a folder of timm and the Hub, and back."""

import argparse
import json
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import _hub

import main
import rpe_models
from conftest import PROJECT, TINY, parse, small
from datasets import build_transform
from fill import fill_state_dict
from irpe import parse_rpe
from runtime import UserError, load_checkpoint

sys.path.append(str(PROJECT.parent / "tools"))
import timm_folder

RPE = "rpe-20-euc-bias-0-qk"
EVA = argparse.Namespace(
    model="eva02_tiny_patch14_224",
    rpe=RPE,
    model_kwargs={"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 2},
    input_size=32,
    data_set="FOLDER",
)
pytestmark = pytest.mark.skipif(
    not hasattr(_hub, "load_model_config_from_path"), reason=f"timm {timm.__version__} has no local-dir:"
)


def run(*arguments):
    timm_folder.main(timm_folder.build_parser().parse_args([str(argument) for argument in arguments]))


def refused(*arguments):
    """The one sentence with which the program fails."""
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a small Eva with iRPE after epoch 1, with different weights in its moving average."""
    model = rpe_models.create_model(
        EVA.model, rpe_config=parse_rpe(RPE), num_classes=3, img_size=32, **EVA.model_kwargs
    )
    weights = fill_state_dict(model.state_dict())
    average = {key: value / 2 for key, value in weights.items()}
    path = tmp_path / "run" / "checkpoint.pth"
    path.parent.mkdir()
    saved = {"model": weights, "model_ema": average, "args": EVA, "epoch": 1, "classes": ["ant", "bee", "cat"]}
    torch.save(saved, path)
    return path


def test_a_trained_checkpoint_goes_to_a_folder_and_back_and_evaluates_the_same(image_root, trained, tmp_path, capsys):
    run("write", trained, tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["architecture"] == TINY and config["label_names"] == ["ant", "bee", "cat"]
    row = json.loads(trained.with_name("log.txt").read_text().splitlines()[-1])
    card = (tmp_path / "folder" / "README.md").read_text()
    assert f"| {row['test_acc1']:.2f} | {row['test_acc5']:.2f} |" in card and f"# {TINY}\n" in card

    capsys.readouterr()
    run("read", tmp_path / "folder", tmp_path / "back.pth")
    command = capsys.readouterr().out
    assert f"--eval --model {TINY} --input-size 32 --resume {tmp_path / 'back.pth'}" in command
    evaluate = small(image_root, "--eval", "--resume")
    expected = main.main(parse(*evaluate, trained))
    assert main.main(parse(*evaluate, tmp_path / "back.pth")) == expected
    of_folder = [*small(image_root, "--eval", "--pretrained"), "--model", f"local-dir:{tmp_path / 'folder'}"]
    assert main.main(parse(*of_folder)) == expected


def test_the_classes_of_a_folder_are_compared_with_those_of_the_data_set(image_root, trained, tmp_path):
    saved = load_checkpoint(trained)
    torch.save(saved | {"classes": ["bee", "ant", "cat"]}, tmp_path / "checkpoint.pth")
    run("write", tmp_path / "checkpoint.pth", tmp_path / "folder")
    run("read", tmp_path / "folder", tmp_path / "back.pth")
    with pytest.raises(UserError, match="trained on other classes"):
        main.main(parse(*small(image_root, "--eval", "--resume", tmp_path / "back.pth")))


def test_timm_loads_the_folder_of_a_model_with_rpe(checkpoint, tmp_path):
    run("write", checkpoint, tmp_path / "folder")
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    weights = load_checkpoint(checkpoint)["model"]
    assert all(value.equal(weights[key]) for key, value in model.state_dict().items())
    assert model.pretrained_cfg["architecture"] == "vit_irpe"
    run("read", tmp_path / "folder", tmp_path / "back.pth")
    back = load_checkpoint(tmp_path / "back.pth")
    assert (back["args"].model, back["args"].rpe, back["args"].input_size) == (EVA.model, RPE, 32)
    assert back["args"].model_kwargs.items() >= EVA.model_kwargs.items()
    assert back["classes"] == ["ant", "bee", "cat"]


def test_the_moving_average_is_written_on_request(checkpoint, tmp_path):
    run("write", checkpoint, tmp_path / "folder", "--ema")
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    average = load_checkpoint(checkpoint)["model_ema"]
    assert all(value.equal(average[key]) for key, value in model.state_dict().items())


def test_flags_describe_a_file_of_weights_alone(checkpoint, tmp_path):
    torch.save(load_checkpoint(checkpoint)["model"], tmp_path / "weights.pth")
    kwargs = [f"{key}={value}" for key, value in EVA.model_kwargs.items()]
    flags = ("--model", EVA.model, "--rpe", RPE, "--input-size", 32, "--model-kwargs", *kwargs)
    run("write", tmp_path / "weights.pth", tmp_path / "folder", *flags)
    assert timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).num_classes == 3


def test_the_preprocessing_in_the_folder_is_that_of_the_evaluation(checkpoint, tmp_path):
    run("write", checkpoint, tmp_path / "folder")
    model = timm.create_model(f"local-dir:{tmp_path / 'folder'}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixels = np.random.RandomState(0).randint(0, 255, (70, 50, 3)).astype(np.uint8)
    expected = build_transform(False, EVA)(Image.fromarray(pixels))
    torch.testing.assert_close(transform(Image.fromarray(pixels)), expected)


@pytest.mark.parametrize(
    "log, said",
    [
        ('{"epoch": 0, "test_acc1": 10, "test_acc5": 20}', "Not evaluated."),
        (
            '{"epoch": 1, "test_acc1": 10, "test_acc5": 20}\n{"epoch": 1, "test_acc1": 12.3, "test_acc5": 45.678}',
            "12.30 | 45.68",
        ),
        ('{"epoch": 1, "test_acc', "Not evaluated."),
        (None, "Not evaluated."),
    ],
)
def test_the_card_shows_the_results_of_the_checkpoints_epoch(checkpoint, tmp_path, log, said):
    if log:
        (checkpoint.parent / "log.txt").write_text(log)
    run("write", checkpoint, tmp_path / "folder")
    assert said in (tmp_path / "folder" / "README.md").read_text()


def test_the_card_shows_the_results_that_are_given(checkpoint, tmp_path):
    (checkpoint.parent / "log.txt").write_text('{"epoch": 1, "test_acc1": 10, "test_acc5": 20}')
    (tmp_path / "eval.json").write_text('{"loss": 1, "acc1": 71.234, "acc5": 90}')
    run("write", checkpoint, tmp_path / "folder", "--ema")
    assert "Not evaluated." in (tmp_path / "folder" / "README.md").read_text()  # log.txt is not of the average
    run("write", checkpoint, tmp_path / "folder", "--ema", "--results", tmp_path / "eval.json")
    assert "71.23 | 90.00" in (tmp_path / "folder" / "README.md").read_text()


def test_what_cannot_be_written_is_refused_in_one_sentence(checkpoint, tmp_path):
    folder = tmp_path / "folder"
    assert "belongs to another model" in refused("write", checkpoint, folder, "--rpe", "rpe-1.9-product-ctx-1-k")
    assert "model 'nonsense' is unknown" in refused("write", checkpoint, folder, "--model", "nonsense")
    assert "cannot be loaded into --model resnet18" in refused("write", checkpoint, folder, "--model", "resnet18")
    assert "--results" in refused("write", checkpoint, folder, "--results", tmp_path / "none.json")
    (tmp_path / "log.txt").write_text('{"epoch": 7, "test_acc1": 1, "test_acc5": 2}')
    assert "with epoch 1" in refused("write", checkpoint, folder, "--results", tmp_path / "log.txt")
    assert not folder.exists()


def test_what_cannot_be_read_is_refused_in_one_sentence(checkpoint, tmp_path):
    folder, back = tmp_path / "folder", tmp_path / "back.pth"
    assert "config.json is not a config.json of timm" in refused("read", folder, back)
    run("write", checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()

    (folder / "model.safetensors").write_bytes(weights[:1000])
    assert "model.safetensors cannot be read" in refused("read", folder, back)
    (folder / "model.safetensors").unlink()
    assert "model.safetensors cannot be read" in refused("read", folder, back)
    (folder / "model.safetensors").write_bytes(weights)
    for model_args, said in (
        ({"img_size": [32, 64]}, "main.py evaluates square images only"),
        ({"depth": 2}, "belongs to another model"),
        ({"rpe": "rpe-1"}, "cannot be loaded into --model eva02_tiny_patch14_224"),
    ):
        changed = config | {"model_args": config["model_args"] | model_args}
        (folder / "config.json").write_text(json.dumps(changed))
        assert said in refused("read", folder, back)
    (folder / "config.json").write_text("[1, 2]")
    assert "is not a config.json of timm" in refused("read", folder, back)
    assert not back.exists()
