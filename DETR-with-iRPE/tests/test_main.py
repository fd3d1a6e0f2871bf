"""The program from its command line: flags, training, resuming, images, and what a user gets wrong."""

import copy
import errno
import io
import json
import math
import os
import pickle
import shutil
import signal
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from digits import write_digits
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.models import ResNet18_Weights, resnet18

import engine
import hubconf
import main
import visualize
from conftest import PROJECT, finish, launcher, load_annotations, parse, small, start, write_set
from datasets import eval_loader, train_loader
from fill import fill_state_dict
from models import build_model
from models.backbone import Backbone
from util import runtime
from util.runtime import UserError


@pytest.fixture(scope="module")
def trained(coco, tmp_path_factory):
    """Output of two epochs, with dropout and augmentation."""
    out = tmp_path_factory.mktemp("trained")
    main.main(parse(*small(coco, "--output_dir", out, "--epochs", 2, "--lr_drop", 1)))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Training


def test_training_writes_checkpoints_log_and_precision(coco, trained):
    rows = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert rows[0]["train_lr"] == 1e-4 and rows[1]["train_lr"] == pytest.approx(1e-5)
    for row in rows:
        assert len(row["test_coco_eval_bbox"]) == 12 and row["n_parameters"] > 1e6
        assert {
            "train_loss",
            "train_loss_ce_0",
            "train_class_error",
            "train_loss_bbox_unscaled",
            "train_lr_backbone",
            "train_grad_norm",
            "test_loss",
            "test_loss_giou",
        } <= row.keys()
        parts = [f"train_{name}{suffix}" for name in ("loss_ce", "loss_bbox", "loss_giou") for suffix in ("", "_0")]
        assert row["train_loss"] == pytest.approx(sum(row[part] for part in parts), rel=1e-4)
    files = {str(path.relative_to(trained)) for path in trained.rglob("*.pth")}
    assert files == {
        "checkpoint.pth",
        "checkpoint.previous.pth",
        "checkpoint0000.pth",
        "checkpoint0001.pth",
        "eval/latest.pth",
        "eval/000.pth",
    }
    assert (trained / "tensorboard").is_dir()
    checkpoint = runtime.load_checkpoint(str(trained / "checkpoint.pth"))
    assert checkpoint["epoch"] == 1 and checkpoint["args"].enc_rpe2d == "rpe-2.0-product-ctx-1-k"
    assert checkpoint["categories"] == {1: "ant", 3: "bee", 4: "cat"}


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(coco, trained, tmp_path):
    main.main(
        parse(
            *small(
                coco,
                "--output_dir",
                tmp_path,
                "--epochs",
                2,
                "--lr_drop",
                1,
                "--resume",
                trained / "checkpoint0000.pth",
            )
        )
    )
    resumed, whole = (runtime.load_checkpoint(str(path / "checkpoint.pth")) for path in (tmp_path, trained))
    assert resumed["epoch"] == whole["epoch"] == 1
    assert all(torch.equal(value, whole["model"][key]) for key, value in resumed["model"].items())
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1


def test_training_moves_what_it_should(coco, trained):
    args = parse(*small(coco, "--num_classes", 5))
    torch.manual_seed(args.seed)
    start_weights = build_model(args)[0].state_dict()
    after = runtime.load_checkpoint(str(trained / "checkpoint.pth"))["model"]
    assert after.keys() == start_weights.keys()
    assert not [
        key for key, value in after.items() if value.is_floating_point() and torch.equal(value, start_weights[key])
    ]


def test_finetune_gives_another_number_of_classes_a_new_head_and_says_so(coco, trained, tmp_path, capsys):
    flags = small(coco, "--num_classes", 9, "--resume", trained / "checkpoint.pth")
    with pytest.raises(UserError, match="5 classes and this run 9.*--finetune"):
        main.main(parse(*flags))
    with pytest.raises(UserError, match="5 classes and this run 9: check --coco_path, or add --num_classes 5 if the"):
        main.main(parse(*flags, "--eval"))  # with a new head it would measure nothing
    main.main(parse(*flags, "--finetune", "--lr", 0, "--lr_backbone", 0, "--weight_decay", 0, "--output_dir", tmp_path))
    assert "new class head for 9 classes instead of 5" in capsys.readouterr().out
    after, before = (runtime.load_checkpoint(str(path / "checkpoint.pth")) for path in (tmp_path, trained))
    assert after["epoch"] == 0
    assert {
        key
        for key, value in after["model"].items()
        if not torch.equal(value, before["model"][key]) and "running" not in key and "tracked" not in key
    } <= {"class_embed.weight", "class_embed.bias"}
    assert after["model"]["class_embed.weight"].shape[0] == 10


def test_mixed_precision_trains_and_evaluates(coco):
    main.main(parse(*small(coco, "--amp_dtype", "bfloat16", "--no_augmentation", "--no_aux_loss")))


def test_a_start_at_a_later_epoch_has_its_learning_rate(coco, trained, tmp_path):
    weights = runtime.load_checkpoint(str(trained / "checkpoint.pth"))["model"]
    torch.save({"model": weights}, tmp_path / "weights.pth")
    for flags in ([], ["--resume", tmp_path / "weights.pth"]):
        main.main(
            parse(
                *small(
                    coco, "--output_dir", tmp_path / "out", "--epochs", 5, "--start_epoch", 4, "--lr_drop", 2, *flags
                )
            )
        )
        row = json.loads((tmp_path / "out" / "log.txt").read_text().splitlines()[-1])
        assert row["epoch"] == 4 and row["train_lr"] == pytest.approx(1e-6)


def test_no_weight_on_images_without_objects_is_no_loss():
    args = parse("--eos_coef", 0, "--no_pretrained_backbone", "--device", "cpu", "--num_classes", 5)
    _, criterion, _ = build_model(args)
    outputs = {"pred_logits": torch.randn(2, 4, 6, requires_grad=True), "pred_boxes": torch.rand(2, 4, 4)}
    empty = {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    loss = criterion(outputs, [empty, empty])["loss_ce"]
    loss.backward()
    assert loss == 0 and outputs["pred_logits"].grad.abs().max() == 0


def test_two_processes_train_one_model_under_the_old_launcher_without_use_env(coco, tmp_path):
    flags = small(coco, "--batch_size", 1, "--lr", 1e-3, "--lr_backbone", 1e-2)
    status, out, err = finish(start(*launcher(2, "main.py", *flags, "--output_dir", tmp_path)))
    assert status == 0, err
    assert out.count("Averaged stats:") == 1 and "[3/3]" in out
    (row,) = (json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines())
    # both evaluated the model that was saved, its statistics of batch norm included
    stats = main.main(parse(*flags, "--eval", "--resume", tmp_path / "checkpoint.pth"))
    assert row["test_loss"] == pytest.approx(stats["loss"], rel=1e-5)


def _epochs(args):
    """In a process: train for epochs, and note what a step draws and the criterion's loss of a known image."""
    noted, to_device = [], engine.to_device

    def draw(*batch):
        noted.append({"drawn": torch.rand(()).item()})
        return to_device(*batch)

    def note_loss(model, criterion, *_):
        criterion.train()
        rank = runtime.get_rank()
        outputs = {"pred_logits": torch.zeros(1, 5, 6), "pred_boxes": torch.full((1, 5, 4), 0.5)}
        objects = {"labels": torch.zeros(1 + 2 * rank, dtype=torch.long), "boxes": torch.full((1 + 2 * rank, 4), 0.4)}
        noted[-1].update(rank=rank, loss=criterion(outputs, [objects])["loss_bbox"].item())
        return {}, None

    engine.to_device, main.evaluate = draw, note_loss
    main.main(args)
    Path(args.output_dir, f"noted{runtime.get_rank()}.json").write_text(json.dumps(noted))  # both would print at once


def test_processes_divide_by_their_mean_number_of_boxes_and_draw_different_random_numbers(coco, tmp_path):
    script = "import test_main; test_main.runtime.run(test_main._epochs, test_main.parse(*sys.argv[1:]))"
    flags = small(coco, "--epochs", 2, "--batch_size", 1, "--output_dir", tmp_path)
    status, out, err = finish(start(*launcher(2, "--use_env", "tests/run_code.py", script, *flags)))
    assert status == 0, err
    noted = [row for rank in range(2) for row in json.loads((tmp_path / f"noted{rank}.json").read_text())]
    assert len({row["drawn"] for row in noted}) == len(noted) == 2 * 2 * 3  # ranks, epochs, steps
    losses = [row for row in noted if "loss" in row]
    assert len(losses) == 4
    for row in losses:  # one box here and three there, each 4 · 0.1 away
        assert row["loss"] == pytest.approx((1 + 2 * row["rank"]) * 0.4 / 2)


def test_the_demo_runs_from_end_to_end(tmp_path):
    status, out, err = finish(
        start("demo/run.py", "--output_dir", tmp_path, "--epochs", 1, "--mask_epochs", 1, "--train", 32, "--val", 2)
    )
    assert status == 0, err
    for name in ("AP of boxes", "AP50 of masks", "panoptic quality"):
        assert f"{name} 0.0" in out
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert sorted(path.name for path in (tmp_path / "drawings").iterdir()) == [
        f"{number:06}_{kind}.png" for number in (0, 1) for kind in ("detections", "panoptic")
    ]


def test_digits_have_boxes_around_their_masks_and_panoptic_maps_of_the_same_masks_on_paper(tmp_path):
    write_digits(tmp_path, train=1, val=6)
    instances = load_annotations(tmp_path, "val")
    panoptic = json.loads((tmp_path / "annotations" / "panoptic_val2017.json").read_text())
    assert {len(a["segments_info"]) for a in panoptic["annotations"]} == {2, 3}
    for image, annotation in zip(panoptic["images"], panoptic["annotations"], strict=True):
        ids = np.asarray(Image.open(tmp_path / "panoptic_val2017" / annotation["file_name"])) @ [1, 256, 256**2]
        pixels = np.asarray(Image.open(tmp_path / "val2017" / image["file_name"]).convert("L"))
        *digits, paper = annotation["segments_info"]
        assert paper["category_id"] == 10 and pixels[ids == paper["id"]].max() < pixels[ids != paper["id"]].min() + 1
        objects = [a for a in instances["annotations"] if a["image_id"] == image["id"]]
        for segment, entry in zip(digits, objects, strict=True):
            mask = ids == segment["id"]
            assert np.array_equal(mask, coco_mask.decode(entry["segmentation"])) and entry["area"] == mask.sum()
            (top, left), (bottom, right) = np.argwhere(mask).min(0), np.argwhere(mask).max(0) + 1
            assert entry["bbox"] == segment["bbox"] == [left, top, right - left, bottom - top]


# ---------------------------------------------------------------------------------------------------------------------
# Weights of the backbone


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """An empty hub cache; a download is noted and fails."""
    asked = []

    def fail(url, *args, **kwargs):
        asked.append(url)
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    return asked


def without(flag, flags):
    return [value for value in flags if value != flag]


def test_offline_training_from_pretrained_weights_names_the_file_and_its_place(coco, offline, tmp_path):
    with pytest.raises(UserError, match="resnet18-") as caught:
        main.main(parse(*without("--no_pretrained_backbone", small(coco))))
    assert str(tmp_path / "checkpoints") in str(caught.value)


def test_backbone_weights_are_not_fetched_where_a_checkpoint_brings_them(coco, offline):
    for flags in (["--eval"], ["--resume", "x.pth"]):
        build_model(parse(*without("--no_pretrained_backbone", small(coco, *flags))))
    build_model(parse(*small(coco)))
    assert offline == []


def test_pretrained_weights_come_from_the_cache_into_the_frozen_form(offline, tmp_path):
    weights = fill_state_dict(resnet18().state_dict())
    (tmp_path / "checkpoints").mkdir()
    torch.save(weights, tmp_path / "checkpoints" / ResNet18_Weights.IMAGENET1K_V1.url.rpartition("/")[2])
    body = Backbone("resnet18", True).body.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in body.items())


# ---------------------------------------------------------------------------------------------------------------------
# Hub and images


def test_hub_entries_build_their_models_and_load_what_is_cached(offline, tmp_path):
    model, post = torch.hub.load(
        str(PROJECT), "detr_resnet50_rpe_20_product_ctx_1_k", source="local", num_classes=20, return_postprocessor=True
    )
    assert model.class_embed.out_features == 21 and not model.training
    assert post(model([torch.zeros(3, 64, 64)]), torch.tensor([[64, 64]]))[0]["boxes"].shape == (100, 4)
    assert hubconf.detr_resnet101_dc5().backbone[0].body.layer4[1].conv2.dilation == (2, 2)
    for name, file in (
        ("detr_resnet50", "detr-r50-e632da11.pth"),
        ("detr_resnet50_panoptic", "detr-r50-panoptic-00ce5173.pth"),
        ("detr_resnet50_dc5_panoptic", "detr-r50-dc5-panoptic-da08f1b1.pth"),
        ("detr_resnet101_panoptic", "detr-r101-panoptic-40021d53.pth"),
    ):
        with pytest.raises(hubconf._runtime.UserError, match=f"https://dl.fbaipublicfiles.com/detr/{file}"):
            getattr(hubconf, name)(pretrained=True)
    weights = fill_state_dict(hubconf.detr_resnet50_rpe_19_product_ctx_1_k().state_dict())
    torch.save({"model": weights}, tmp_path / "checkpoints" / "rpe-1.9-product-ctx-1-k.pth")
    loaded = hubconf.detr_resnet50_rpe_19_product_ctx_1_k(pretrained=True).state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())
    with pytest.raises(hubconf._runtime.UserError, match="91 classes and this run 20: leave num_classes out"):
        hubconf.detr_resnet50_rpe_19_product_ctx_1_k(pretrained=True, num_classes=20)
    file = tmp_path / "checkpoints" / "rpe-2.0-product-ctx-1-k.pth"
    torch.save({"model": weights}, file)
    with pytest.raises(
        hubconf._runtime.UserError, match=f"of another shape.*; remove {file} to download the file again"
    ):
        hubconf.detr_resnet50_rpe_20_product_ctx_1_k(pretrained=True)


def test_hub_panoptic_models_draw_maps_of_what_is_above_the_threshold():
    model, post = hubconf.detr_resnet50_panoptic(num_classes=5, threshold=0.01, return_postprocessor=True)
    with torch.no_grad():
        outputs = model([torch.zeros(3, 64, 64)])
    assert outputs["pred_logits"].shape == (1, 100, 6) and outputs["pred_masks"].shape == (1, 100, 16, 16)
    outputs["pred_logits"][0, 0, 1] = 9
    assert post.threshold == 0.01 and post(outputs, torch.tensor([[64, 64]]))[0]["segments_info"]
    assert hubconf.detr_resnet50_panoptic().detr.class_embed.out_features == 251


def image_flags(*flags):
    return [str(flag) for flag in ("--device", "cpu", *flags)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A checkpoint with masks and panoptic categories of a filled model, its own flags, and an image."""
    folder = tmp_path_factory.mktemp("drawn")
    args = parse(*small("", "--masks", "--dataset_file", "coco_panoptic", "--num_classes", 5, "--eval"))
    args.is_thing_map = {1: True, 3: False, 4: True}
    torch.save(
        {
            "model": fill_state_dict(build_model(args)[0].state_dict()),
            "args": args,
            "categories": {1: "ant", 3: "bee", 4: "cat"},
        },
        folder / "masks.pth",
    )
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (60, 90, 3)).astype(np.uint8)).save(folder / "image.png")
    return folder


def test_images_show_detections_panoptic_maps_and_attention(coco, trained, drawn, tmp_path, capsys):
    files = sorted((coco / "val2017").iterdir())[:2]
    for checkpoint, images in ((trained / "checkpoint.pth", files), (drawn / "masks.pth", [drawn / "image.png"])):
        argv = image_flags(
            "--resume",
            checkpoint,
            "--image",
            *images,
            "--output_dir",
            tmp_path,
            "--threshold",
            0.01,
            "--attention",
            12,
            30,
        )
        visualize.main(visualize.parser().parse_args(argv), argv)
        assert "_detections.png: 5 objects" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"image_panoptic.png"} | {
        f"{file.stem}_{kind}.png" for file in [*files, drawn / "image.png"] for kind in ("detections", "attention")
    }


def pixels_of(figure):
    """What a figure shows, (H, W, 3)."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def test_masks_and_segments_tint_their_own_pixels_and_are_named(drawn):
    image = Image.new("RGB", (80, 40))  # black: left half one segment, right half another
    ids = np.zeros((40, 80, 3), np.uint8)
    ids[:, 40:, 0] = 7
    file = io.BytesIO()
    Image.fromarray(ids).save(file, "PNG")
    found = {"png_string": file.getvalue(), "segments_info": [{"id": 0, "category_id": 3}, {"id": 7, "category_id": 9}]}
    figure, words = visualize.draw_panoptic(image, found, {3: "bee"})
    assert words == "2 segments" and [text.get_text() for text in figure.axes[0].texts] == ["bee", "9"]
    assert [text.get_position()[0] // 40 for text in figure.axes[0].texts] == [0, 1]
    shown = pixels_of(figure)
    quarter = shown.shape[1] // 4
    left, right = shown[shown.shape[0] // 3, quarter], shown[shown.shape[0] // 3, 3 * quarter]
    assert left.max() > 50 and right.max() > 50 and abs(left - right).max() > 30
    detected = {
        "scores": torch.tensor([0.9, 0.2]),
        "labels": torch.tensor([3, 1]),
        "boxes": torch.tensor([[4.0, 4, 36, 36], [0, 0, 9, 9]]),
        "masks": torch.from_numpy(ids[None, None, :, :, 0] == 0).byte().expand(2, 1, -1, -1),
    }
    figure, words = visualize.draw_detections(image, detected, {3: "bee"}, 0.5)
    assert words == "1 objects" and [text.get_text() for text in figure.axes[0].texts] == ["bee 0.90"]
    shown = pixels_of(figure)
    assert shown[shown.shape[0] // 2, quarter].max() > 50 and shown[shown.shape[0] // 2, 3 * quarter].max() == 0


def test_things_of_the_set_reach_the_panoptic_maps_that_are_drawn(drawn):
    argv = image_flags("--resume", drawn / "masks.pth", "--image", "x", "--output_dir", "x")
    _, _, postprocessors, _ = visualize.load_model(visualize.parser().parse_args(argv), argv)
    assert postprocessors["panoptic"].is_thing_map == {1: True, 3: False, 4: True}


@pytest.mark.parametrize("masks", [False, True])
def test_drawn_attention_is_a_distribution_that_the_encoding_changes(trained, drawn, masks):
    file = drawn / "masks.pth" if masks else trained / "checkpoint.pth"
    argv = image_flags("--resume", file, "--image", "x", "--output_dir", "x")
    args, model, _, names = visualize.load_model(visualize.parser().parse_args(argv), argv)
    assert args.enc_rpe2d == "rpe-2.0-product-ctx-1-k" and names[3] == "bee"
    attention = (model.detr if masks else model).transformer.encoder.layers[0].self_attn
    attention.rpe_k.lookup_table_weight.data.mul_(20)
    with torch.no_grad():
        (with_term, without_term), hw = visualize.encoder_attention(model, torch.randn(1, 3, 64, 96), -1)
    assert hw == (2, 3) and with_term.shape == (6, 6)
    for weights in (with_term, without_term):
        torch.testing.assert_close(weights.sum(1), torch.ones(6))
    assert (with_term - without_term).abs().max() > 1e-3


def test_mistakes_in_drawing_are_one_sentence(coco, trained, tmp_path):
    common = ["--resume", trained / "checkpoint.pth", "--output_dir", tmp_path]
    for flags, words in (
        (["--image", tmp_path / "none.png", *common], "none.png"),
        (["--image", coco / "val2017" / "0000.png", *common, "--attention", 900, 3], "900"),
        (["--image", coco / "val2017" / "0000.png", *common, "--attention", 3, 3, "--layer", 4], "4"),
        (["--image", "a/x.png", "b/x.jpg", *common], "named x,"),
        (["--image", "x.png", *common, "--nheads", 0], "--nheads is 0"),
        (["--image", "x.png", *common[:2]], "--output_dir"),
    ):
        argv = image_flags(*flags)
        with pytest.raises(UserError, match=words):
            visualize.main(visualize.parser().parse_args(argv), argv)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--frozen_weights", "x"], "--frozen_weights.*add --masks"),
        (["--dataset_file", "voc"], "voc.*coco_panoptic"),
        (["--dataset_file", "coco_panoptic"], "--coco_panoptic_path is missing"),
        (["--mask_loss_coef", -1], "--mask_loss_coef"),
        (["--dice_loss_coef", -1], "--dice_loss_coef"),
        (["--masks", "--hidden_dim", 24], "--hidden_dim 24.*16 with --masks"),
        (["--num_classes", 4], "category id 4 \\(cat\\).*at least 5"),
        (["--enc_rpe2d", "rpe-2-x-ctx-1-k"], "'x'"),
        (["--coco_path", ""], "--coco_path"),
        (["--finetune"], "--resume"),
        (["--resume", "none.pth"], "none.pth"),
        (["--batch_size", 99], "99"),
        (["--batch_size", 0], "--batch_size"),
        (["--hidden_dim", 18], "--hidden_dim"),
        (["--backbone", "vgg"], "vgg"),
        (["--dilation"], "--last_stride 1"),
        (["--device", "cuda:77"], "cuda"),
        (["--output_dir", "/proc/nowhere"], "/proc/nowhere"),
        (["--nheads", 0], "--nheads"),
        (["--eval_batch_size", 0], "--eval_batch_size"),
        (["--num_workers", -1], "--num_workers"),
        (["--lr", -1], "--lr"),
        (["--clip_max_norm", -1], "--clip_max_norm"),
        (["--dropout", 2], "--dropout"),
        (["--enc_layers", -1], "enc_layers"),
        (["--set_cost_class", 0, "--set_cost_bbox", 0, "--set_cost_giou", 0], "--set_cost_class.*above"),
        (
            ["--position_embedding", "learned", "--last_stride", 1, "--short_side", 850, "--eval"],
            "50×50.*--position_embedding sine",
        ),
    ],
)
def test_flags_that_cannot_work_are_refused_in_one_sentence(coco, flags, words):
    with pytest.raises(UserError, match=words) as caught:
        main.main(parse(*small(coco, *flags)))
    assert "\n" not in str(caught.value)


def test_system_without_the_signals_of_training_is_told_so_and_evaluates(coco, trained, tmp_path, monkeypatch):
    for module, name in ((signal, "SIGUSR1"), (signal, "SIGUSR2"), (os, "setpgid")):  # as on Windows
        monkeypatch.delattr(module, name)
    with pytest.raises(UserError, match="training needs the signals .* lacks SIGUSR1 and SIGUSR2: use Linux"):
        main.main(parse(*small(coco, "--output_dir", tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    main.main(parse(*small(coco, "--eval", "--resume", trained / "checkpoint.pth", "--num_workers", 1)))


def test_an_unknown_way_of_attention_in_the_environment_is_refused_in_one_sentence(coco):
    status, _, err = finish(start("main.py", *small(coco), IRPE_ATTENTION="flash"))
    assert status == 1 and "Traceback" not in err
    assert err.splitlines()[-1] == "error: IRPE_ATTENTION is 'flash'; it must be composed or rows, or not be set"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--enc_rpe2d", ""], "1 unexpected.*rpe_k.lookup_table_weight"),
        (["--enc_rpe2d", "rpe-1.9-product-ctx-1-k"], "of another shape.*lookup_table"),
        (["--dec_layers", 3], "missing.*decoder.layers.2"),
        (["--backbone", "resnet34"], "missing.*backbone"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused_with_the_keys_that_differ(coco, trained, flags, words):
    with pytest.raises(UserError, match=words):
        main.main(parse(*small(coco, "--eval", "--resume", trained / "checkpoint.pth", *flags)))


def test_a_truncated_or_foreign_checkpoint_is_refused(coco, trained, tmp_path):
    path = tmp_path / "bad.pth"
    path.write_bytes((trained / "checkpoint.pth").read_bytes()[:-1000])
    with pytest.raises(UserError, match="truncated"):
        main.main(parse(*small(coco, "--eval", "--resume", path)))
    torch.save({"model": pickle.Pickler}, path)
    with pytest.raises(UserError, match="refused"):
        main.main(parse(*small(coco, "--eval", "--resume", path)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer", {"state": 3, "param_groups": []}),
        ("lr_scheduler", 7),
        ("epoch", "1"),
        ("progress", {"images": None}),
        ("scaler", [1]),
    ],
)
def test_states_of_another_type_are_refused(coco, trained, tmp_path, key, value):
    checkpoint = runtime.load_checkpoint(trained / "checkpoint.pth")
    torch.save({**checkpoint, key: value}, tmp_path / "c.pth")
    scaled = ["--amp_dtype", "float16"] if key == "scaler" else []
    with pytest.raises(UserError, match="c.pth"):
        main.main(parse(*small(coco, "--epochs", 3, "--resume", tmp_path / "c.pth", *scaled)))


@pytest.mark.parametrize("flags", [[], ["--eval"]], ids=["train", "eval"])
def test_auto_reads_the_checkpoint_once_and_leaves_the_flags_as_they_are(coco, trained, tmp_path, monkeypatch, flags):
    shutil.copy(trained / "checkpoint.pth", tmp_path)
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **options: read.append(str(path)) or load(path, **options))
    args = parse(*small(coco, "--epochs", 2, "--output_dir", tmp_path, "--resume", "auto", *flags))
    before = copy.deepcopy(vars(args))
    main.main(args)
    assert read == [str(tmp_path / "checkpoint.pth")] and vars(args) == before


def test_damage_to_the_last_checkpoint_costs_one_epoch_and_a_signal_nothing(coco, tmp_path, monkeypatch, capsys):
    flags = small(coco, "--epochs", 2, "--lr_drop", 1, "--dropout", 0.1)
    main.main(parse(*flags, "--output_dir", tmp_path / "straight"))
    agreed_signal = runtime.Run.agreed_signal

    def stop(self, steps):
        if (self.epoch, steps) == (1, 2):
            os.kill(os.getpid(), signal.SIGTERM)
        return agreed_signal(self, steps)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.Run, "agreed_signal", stop)
        with pytest.raises(runtime.Interrupted, match="SIGTERM in epoch 1, step 1"):
            main.main(parse(*flags, "--output_dir", tmp_path, "--resume", "auto"))
    assert runtime.load_checkpoint(tmp_path / "checkpoint.pth")["progress"]["images"] == 4
    (tmp_path / "checkpoint.pth").write_bytes(b"")
    main.main(parse(*flags, "--output_dir", tmp_path, "--resume", "auto", "--num_workers", 1))
    assert "checkpoint.pth is truncated" in capsys.readouterr().out
    ends = [runtime.load_checkpoint(folder / "checkpoint.pth")["model"] for folder in (tmp_path, tmp_path / "straight")]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())
    logs = [(folder / "log.txt").read_text() for folder in (tmp_path, tmp_path / "straight")]
    assert logs[0] == logs[1]


def test_loading_processes_are_spared_what_is_signalled_to_the_group(coco):
    args = parse(*small(coco, "--num_workers", 1))
    for loader in (train_loader(main.build_datasets(args)[0], args), eval_loader(main.build_datasets(args)[1], args)):
        batches = iter(loader)
        next(batches)
        assert os.getpgid(batches._workers[0].pid) != os.getpgid(0)


def test_weights_that_are_not_finite_are_not_saved_and_a_full_disk_ends_nothing(coco, tmp_path, monkeypatch, capsys):
    sync, step = os.fsync, engine.step_optimizer

    def full(number):
        if "latest" in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(number)

    monkeypatch.setattr(os, "fsync", full)
    flags = small(coco, "--epochs", 1, "--output_dir", tmp_path)
    main.main(parse(*flags))
    assert "note: " in (said := capsys.readouterr().out) and "latest.pth cannot be written: No space left" in said

    def spoiled(scaler, optimizer):
        optimizer.param_groups[0]["params"][0].data.fill_(math.nan)
        step(scaler, optimizer)

    monkeypatch.setattr(engine, "step_optimizer", spoiled)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(UserError, match="nan"):
        main.main(parse(*flags, "--epochs", 2, "--resume", "auto", "--save_every", 1))
    assert "note: the weights are not finite" in capsys.readouterr().out
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_another_runs_optimizer_is_refused_with_the_flags_to_give(coco, trained):
    flags = without("--no_pretrained_backbone", small(coco, "--resume", trained / "checkpoint.pth", "--epochs", 3))
    with pytest.raises(UserError, match="--no_pretrained_backbone"):
        main.main(parse(*flags))


def test_a_loss_that_is_not_finite_stops_training_and_leaves_the_last_checkpoint(coco, trained, tmp_path):
    checkpoint = runtime.load_checkpoint(str(trained / "checkpoint0000.pth"))
    path = tmp_path / "checkpoint.pth"
    for group in checkpoint["optimizer"]["param_groups"]:
        group["lr"] = math.inf
    torch.save(checkpoint, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match="nan|inf"):
        main.main(parse(*small(coco, "--resume", path, "--output_dir", tmp_path, "--epochs", 2)))
    assert path.read_bytes() == before


def test_weights_that_are_not_finite_are_named_in_evaluation(coco, trained, tmp_path):
    checkpoint = runtime.load_checkpoint(str(trained / "checkpoint.pth"))
    checkpoint["model"]["class_embed.bias"][0] = math.nan
    torch.save(checkpoint, tmp_path / "nan.pth")
    with pytest.raises(UserError, match="nan"):
        main.main(parse(*small(coco, "--eval", "--resume", tmp_path / "nan.pth")))


def test_a_flag_that_cannot_be_read_is_one_line(coco):
    status, _, err = finish(start("main.py", *small(coco, "--epochs", "many")))
    assert status == 2 and "--epochs" in err and len(err.splitlines()) == 1, err


def test_a_mistake_ends_the_program_with_one_line_and_no_traceback(coco, tmp_path):
    root = write_set(tmp_path / "set", count=3)
    image = root / "train2017" / "0001.png"
    image.write_bytes(image.read_bytes()[:900])
    out = tmp_path / "out"
    status, _, err = finish(start("main.py", *small(root, "--num_workers", 1, "--batch_size", 1, "--output_dir", out)))
    assert status == 1 and str(image) in err and len(err.splitlines()) == 1, err
