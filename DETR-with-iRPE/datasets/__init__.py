"""Data sets and their data loaders."""

import argparse
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from util.misc import collate_fn
from util.runtime import SeededDataset, SeededSampler, UserError, get_rank, get_world_size, own_group

from .coco import CocoDetection
from .coco_panoptic import CocoPanoptic
from .transforms import make_coco_transforms


def build_dataset(split: str, args: argparse.Namespace) -> CocoDetection | CocoPanoptic:
    """Open a split (`train` or `val`) of the data set that the command line selects.

    Raises: UserError for files that are missing or damaged, and for invalid annotations.
    """
    transforms = make_coco_transforms(split, args.short_side, not args.no_augmentation)
    if args.dataset_file == "coco_panoptic":
        return CocoPanoptic(args.coco_path, args.coco_panoptic_path, split, transforms, args.masks)
    return CocoDetection(args.coco_path, split, transforms, args.remove_difficult and split == "train", args.masks)


def train_loader(dataset: Dataset, args: argparse.Namespace) -> DataLoader:
    """Shuffled batches of this rank. The last images of an epoch are left out if they do not fill a batch.

    Raises: UserError if the data set has too few images for a batch on every rank.
    """
    sampler = DistributedSampler(dataset, get_world_size(), get_rank(), seed=args.seed)
    loader = DataLoader(
        SeededDataset(dataset),
        args.batch_size,
        sampler=SeededSampler(sampler, args.seed),
        drop_last=True,
        **_common_arguments(args),
    )
    if not len(loader):
        raise UserError(
            f"{len(dataset)} images on {get_world_size()} ranks do not fill one batch of --batch_size {args.batch_size}"
        )
    return loader


def eval_loader(dataset: Dataset, args: argparse.Namespace) -> DataLoader:
    """The batches of this rank. Together, the ranks load every image once.

    The data set is divided into batches first, which are then dealt out to the ranks. Results therefore do not depend
    on the number of ranks: padding affects DETR's predictions, but depends only on the batch.
    """
    batches = torch.arange(len(dataset)).split(args.eval_batch_size or args.batch_size)
    batches_of_rank = [batch.tolist() for batch in batches[get_rank() :: get_world_size()]]
    return DataLoader(dataset, batch_sampler=batches_of_rank, **_common_arguments(args))


def _common_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that both data loaders share."""
    return {
        "num_workers": args.num_workers,
        "collate_fn": collate_fn,
        "worker_init_fn": own_group,
        "timeout": args.step_timeout if args.num_workers else 0,
        "pin_memory": torch.device(args.device).type == "cuda",
    }
