"""The detector of a command line."""

import argparse

from util.runtime import UserError

from .backbone import build_backbone
from .detr import DETR, PostProcess, SetCriterion
from .matcher import HungarianMatcher
from .rpe_attention.irpe import RPE_GRAMMAR, parse_rpe
from .segmentation import DETRsegm, PostProcessPanoptic, PostProcessSegm
from .transformer import Transformer

NUM_CLASSES = {"coco": 91, "coco_panoptic": 250}  # of the released models
COCO_THINGS = {category: category <= 90 for category in range(1, 201)}
# what the arguments stored in released checkpoints lack
_NEW_FLAGS = {"num_classes": None, "last_stride": 2, "no_pretrained_backbone": False, "is_thing_map": None}


def parse_enc_rpe2d(text):
    """The encoding that `--enc_rpe2d` names: `irpe.RPEConfig`, or None for the empty string.

    Raises: UserError that says which part is wrong and shows the grammar.
    """
    if not text:
        return None
    try:
        return parse_rpe(text)
    except ValueError as error:
        raise UserError(f"--enc_rpe2d {text}: {error}; it must be {RPE_GRAMMAR}, as rpe-2.0-product-ctx-1-k") from error


def build_model(args):
    """Model, criterion and postprocessors of a parsed command line (see main.py), or of the `args` in a checkpoint.

    The postprocessors are {"bbox": PostProcess}, with masks also "segm", and "panoptic" if the set is a panoptic one.
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
    losses, postprocessors = ["labels", "boxes", "cardinality"], {"bbox": PostProcess()}
    if args.masks:
        model = DETRsegm(model, freeze_detr=bool(args.frozen_weights))
        weights.update(loss_mask=args.mask_loss_coef, loss_dice=args.dice_loss_coef)
        losses.append("masks")
        postprocessors["segm"] = PostProcessSegm()
        if args.dataset_file == "coco_panoptic":
            postprocessors["panoptic"] = PostProcessPanoptic(args.is_thing_map or COCO_THINGS)
    return model, SetCriterion(num_classes, matcher, weights, args.eos_coef, losses), postprocessors
