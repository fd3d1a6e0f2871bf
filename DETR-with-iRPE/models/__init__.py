"""Build the detector that the command line describes."""

import argparse

from torch import nn

from util.runtime import UserError

from .backbone import build_backbone
from .detr import DETR, PostProcess, SetCriterion
from .matcher import HungarianMatcher
from .rpe_attention.irpe import RPE_GRAMMAR, RPEConfig, parse_rpe
from .segmentation import DETRsegm, PostProcessPanoptic, PostProcessSegm
from .transformer import Transformer

NUM_CLASSES = {"coco": 91, "coco_panoptic": 250}  # of the released models, by --dataset_file
COCO_THINGS = {category: category <= 90 for category in range(1, 201)}
# Flags that are missing in the arguments of released checkpoints, with the values that these models were built with.
_NEW_FLAGS = {"num_classes": None, "last_stride": 2, "no_pretrained_backbone": False, "is_thing_map": None}


def parse_enc_rpe2d(text: str) -> RPEConfig | None:
    """Parse `--enc_rpe2d`. The empty string means no relative position encoding; the result is then None.

    Raises: UserError that states which part is wrong and shows the grammar.
    """
    if not text:
        return None
    try:
        return parse_rpe(text)
    except ValueError as error:
        raise UserError(
            f"--enc_rpe2d {text}: {error}; it must be {RPE_GRAMMAR}, such as rpe-2.0-product-ctx-1-k"
        ) from error


def build_model(args: argparse.Namespace) -> tuple[nn.Module, SetCriterion, dict[str, nn.Module]]:
    """Build the model, its criterion and its postprocessors.

    Args:
        args: the parsed command line (see main.py), or the `args` of a checkpoint.
    Returns: the model, the criterion and the postprocessors by name: `bbox`; with `--masks` also `segm`; with
        `--masks` and a panoptic data set also `panoptic`.
    Raises: UserError for flags that are invalid or incompatible with each other.
    """
    args = argparse.Namespace(**{**_NEW_FLAGS, **vars(args)})
    num_classes = args.num_classes or NUM_CLASSES[args.dataset_file]
    rpe_config = parse_enc_rpe2d(args.enc_rpe2d)
    if args.hidden_dim % args.nheads or args.hidden_dim % 4:
        raise UserError(f"--hidden_dim {args.hidden_dim} must be a multiple of --nheads {args.nheads} and of 4")
    backbone = build_backbone(args)
    transformer = Transformer(
        args.hidden_dim,
        args.nheads,
        args.enc_layers,
        args.dec_layers,
        args.dim_feedforward,
        args.dropout,
        args.pre_norm,
        rpe_config,
    )
    model = DETR(backbone, transformer, num_classes, args.num_queries, args.aux_loss)
    matcher = HungarianMatcher(args.set_cost_class, args.set_cost_bbox, args.set_cost_giou)
    weights = {"loss_ce": 1, "loss_bbox": args.bbox_loss_coef, "loss_giou": args.giou_loss_coef}
    if args.aux_loss:
        weights.update({f"{name}_{i}": weight for i in range(args.dec_layers - 1) for name, weight in weights.items()})
    losses = ["labels", "boxes", "cardinality"]
    postprocessors = {"bbox": PostProcess()}
    if args.masks:
        model = DETRsegm(model, freeze_detr=bool(args.frozen_weights))
        weights.update(loss_mask=args.mask_loss_coef, loss_dice=args.dice_loss_coef)
        losses.append("masks")
        postprocessors["segm"] = PostProcessSegm()
        if args.dataset_file == "coco_panoptic":
            postprocessors["panoptic"] = PostProcessPanoptic(args.is_thing_map or COCO_THINGS)
    criterion = SetCriterion(num_classes, matcher, weights, args.eos_coef, losses)
    return model, criterion, postprocessors
