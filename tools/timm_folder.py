"""Convert a DeiT checkpoint to a folder that timm and the Hugging Face Hub load, and back.

    python tools/timm_folder.py write OUT/checkpoint.pth FOLDER [--results OUT/eval.json]
    python tools/timm_folder.py read FOLDER checkpoint.pth

`write` saves model.safetensors, config.json and README.md, a model card with the results. The model is determined by
the training flags in the checkpoint. If the file lacks them, pass --model, --rpe and so on. After `import rpe_models`,
timm loads the folder with timm.create_model("local-dir:FOLDER", pretrained=True), or with "hf-hub:OWNER/NAME" after
`hf upload OWNER/NAME FOLDER`.

`read` writes a checkpoint of the weights for main.py --eval and --finetune, and prints the command that evaluates it.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._hub import save_for_hf  # timm.models exports it from a later release on
from timm.utils import ParseKwargs
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "DeiT-with-iRPE"))
import runtime
from checkpoint import load_weights
from irpe import parse_rpe
from rpe_models import create_model
from rpe_vision_transformer import recorded_arguments
from runtime import UserError

DATA_SETS = {"IMNET": "ImageNet-1K", "CIFAR": "CIFAR-100", "INAT": "iNaturalist 2018", "INAT19": "iNaturalist 2019"}
# Arguments in config.json that are main.py's own flags, or follow from the data set.
NOT_MODEL_KWARGS = ("base", "rpe", "img_size", "num_classes", "in_chans")

CARD = """---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- irpe
---
# {name}

{what}, trained with [iRPE](https://arxiv.org/abs/2107.14222), image relative position encoding. It takes images of
{side}×{side} pixels and has {parameters:.2f} M parameters and {classes} classes.

## Results

{results}

## Use

The architecture `{architecture}` is defined in the folder `DeiT-with-iRPE` of the repository that trained the model.

```python
import sys


sys.path.insert(0, "DeiT-with-iRPE")
import rpe_models  # registers the architecture with timm

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

## Citation

```bibtex
@InProceedings{{iRPE,
    title     = {{Rethinking and Improving Relative Position Encoding for Vision Transformer}},
    author    = {{Wu, Kan and Peng, Houwen and Chen, Minghao and Fu, Jianlong and Chao, Hongyang}},
    booktitle = {{Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)}},
    year      = {{2021}},
    pages     = {{10033-10041}}
}}
```
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = runtime.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    writer = commands.add_parser("write", help="convert a checkpoint to a folder")
    writer.add_argument("checkpoint", metavar="CHECKPOINT", help="file or URL")
    writer.add_argument("folder", type=Path, metavar="FOLDER")
    writer.add_argument(
        "--model", metavar="NAME", help="as for main.py; default: from the checkpoint, or else its file name"
    )
    writer.add_argument("--rpe", help="as for main.py; default: from the checkpoint")
    writer.add_argument(
        "--model-kwargs",
        nargs="*",
        action=ParseKwargs,
        metavar="KEY=VALUE",
        help="as for main.py; default: from the checkpoint",
    )
    writer.add_argument(
        "--input-size", type=int, metavar="PIXELS", help="as for main.py; default: from the checkpoint, or else 224"
    )
    writer.add_argument("--ema", action="store_true", help="write the moving average of the weights")
    writer.add_argument(
        "--results",
        type=Path,
        metavar="FILE",
        help="eval.json of main.py --eval, or log.txt; default: the log.txt next to the checkpoint (not with --ema)",
    )

    reader = commands.add_parser("read", help="convert a folder to a checkpoint")
    reader.add_argument("folder", type=Path, metavar="FOLDER")
    reader.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    return parser


def build_model(settings: argparse.Namespace, weights: dict[str, torch.Tensor], path: str) -> nn.Module:
    """The model of `settings` (`model`, `rpe`, `model_kwargs`, `input_size`) with these weights, in evaluation mode.

    Raises: UserError if there is no such model, or the weights belong to another one; `path` names them.
    """
    try:
        model = create_model(
            settings.model,
            rpe_config=parse_rpe(settings.rpe) if settings.rpe else None,
            num_classes=len(weights.get("head.weight", ())),
            img_size=settings.input_size,
            **settings.model_kwargs,
        )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be loaded into --model {settings.model}: {error}") from error
    load_weights(model, {"model": weights}, path)
    return model.eval()


# --- write -----------------------------------------------------------------------------------------------------------


def write(args: argparse.Namespace) -> None:
    """Convert `args.checkpoint` to `args.folder`. Raises: UserError if either cannot be used."""
    checkpoint = runtime.load_checkpoint(args.checkpoint)
    settings = settings_of_training(args, checkpoint)
    weights = runtime.model_weights(checkpoint, args.checkpoint, "model_ema" if args.ema else "model")
    model = build_model(settings, weights, args.checkpoint)
    results = read_results(args, checkpoint)
    describe_preprocessing(model, settings)
    classes = checkpoint.get("classes")
    with runtime.writing(args.folder):
        save_for_hf(
            model,
            args.folder,
            model_config={"label_names": classes} if classes else None,
            model_args={**settings.model_kwargs, **recorded_arguments(model), "img_size": settings.input_size},
            safe_serialization=True,
        )
        (args.folder / "README.md").write_text(model_card(model, settings, results), encoding="utf-8")
    print(f"{args.folder}: {model.pretrained_cfg['architecture']}, {len(weights)} tensors")


def settings_of_training(args: argparse.Namespace, checkpoint: dict[str, Any]) -> argparse.Namespace:
    """`model`, `rpe`, `model_kwargs`, `input_size` and `data_set`: from the command line, else from the checkpoint."""
    defaults = {
        "model": Path(args.checkpoint).stem,
        "rpe": "",
        "model_kwargs": {},
        "input_size": 224,
        "data_set": "IMNET",
    }
    trained = vars(checkpoint.get("args", argparse.Namespace()))
    chosen = {}
    for name, default in defaults.items():
        given = getattr(args, name, None)
        chosen[name] = given if given is not None else trained.get(name) or default
    return argparse.Namespace(**chosen)


def describe_preprocessing(model: nn.Module, settings: argparse.Namespace) -> None:
    """Describe the preprocessing of main.py's evaluation in the model's `pretrained_cfg`, instead of timm's default."""
    keeps_size = settings.data_set == "CIFAR" and settings.input_size == 32
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "tag": None,
        "input_size": (3, settings.input_size, settings.input_size),
        "crop_pct": 1.0 if keeps_size else 224 / 256,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "num_classes": model.num_classes,
    }


def read_results(args: argparse.Namespace, checkpoint: dict[str, Any]) -> dict[str, float]:
    """{"acc1", "acc5"} in percent, or {} if nothing was measured.

    Raises: UserError if `args.results` cannot be read, or is a log without the checkpoint's epoch.
    """
    path = args.results
    if path is None:
        path = Path(args.checkpoint).with_name("log.txt")
        if args.ema or not path.is_file():
            return {}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if "acc1" in rows[0]:
            return {name: float(rows[0][name]) for name in ("acc1", "acc5")}
        of_epoch = [row for row in rows if row["epoch"] == checkpoint.get("epoch")]
        return {name: float(of_epoch[-1][f"test_{name}"]) for name in ("acc1", "acc5")}
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        if args.results is None:
            return {}  # the log has no row of this epoch yet
        raise UserError(
            f"--results {path} must be an eval.json of main.py or a log.txt with epoch {checkpoint.get('epoch')}: "
            f"{error!r}"
        ) from error


def model_card(model: nn.Module, settings: argparse.Namespace, results: dict[str, float]) -> str:
    """The text of README.md."""
    data = DATA_SETS.get(settings.data_set, "an image folder")
    return CARD.format(
        name=f"{settings.model} {settings.rpe}".rstrip(),
        what=f"`{settings.model}`" + (f" with `{settings.rpe}`" if settings.rpe else ""),
        side=settings.input_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        classes=model.num_classes,
        architecture=model.pretrained_cfg["architecture"],
        results=(
            f"| data set | top-1 (%) | top-5 (%) |\n| --- | --- | --- |\n"
            f"| {data}, validation | {results['acc1']:.2f} | {results['acc5']:.2f} |"
            if results
            else "Not evaluated."
        ),
    )


# --- read ------------------------------------------------------------------------------------------------------------


def read(args: argparse.Namespace) -> None:
    """Convert `args.folder` to `args.checkpoint`. Raises: UserError if either cannot be used."""
    settings, classes = read_config(args.folder / "config.json")
    path = args.folder / "model.safetensors"
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    build_model(settings, weights, str(path))  # the weights are checked before anything is written
    with runtime.replacing(args.checkpoint) as file:
        torch.save({"model": weights, "args": settings, "classes": classes}, file)
    command = ["python", "main.py", "--eval", "--model", settings.model, "--input-size", str(settings.input_size)]
    print(f"{shlex.join([*command, '--resume', str(args.checkpoint.resolve()), '--data-path'])} DIR")


def read_config(path: Path) -> tuple[argparse.Namespace, list[str]]:
    """The flags of main.py (`model`, `rpe`, `model_kwargs`, `input_size`) in a config.json, and its class names."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        arguments = config.get("model_args", {})
        size = arguments.get("img_size", config["pretrained_cfg"]["input_size"][1:])
        sides = {size} if isinstance(size, int) else set(size)
        model = arguments.get("base", config["architecture"])
        classes = config.get("label_names", [])
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is not a config.json of timm: {error!r}") from error
    if len(sides) != 1:
        raise UserError(f"{path} is of a model for images of {size} pixels, and main.py evaluates square images only")
    if not isinstance(classes, list):
        classes = []  # timm also allows a dict, for class indices with gaps, which main.py does not support
    settings = argparse.Namespace(
        model=model,
        rpe=arguments.get("rpe", ""),
        model_kwargs={name: value for name, value in arguments.items() if name not in NOT_MODEL_KWARGS},
        input_size=sides.pop(),
    )
    return settings, classes


def main(args: argparse.Namespace) -> None:
    """Run the command that the command line names."""
    if args.command == "write":
        write(args)
    else:
        read(args)


if __name__ == "__main__":
    runtime.run(main, build_parser().parse_args())
