"""Data sets and their loaders."""

import torch
from torch.utils.data import DataLoader, DistributedSampler

from util.misc import collate_fn
from util.runtime import SeededDataset, SeededSampler, UserError, get_rank, get_world_size, own_group

from .coco import CocoDetection
from .coco_panoptic import CocoPanoptic
from .transforms import make_coco_transforms


def build_dataset(split, args):
    """The split (`train` or `val`) of `--coco_path`, with the objects that `--dataset_file` says."""
    transforms = make_coco_transforms(split, args.short_side, not args.no_augmentation)
    if args.dataset_file == "coco_panoptic":
        return CocoPanoptic(args.coco_path, args.coco_panoptic_path, split, transforms, args.masks)
    return CocoDetection(args.coco_path, split, transforms, args.remove_difficult and split == "train", args.masks)


def train_loader(dataset, args):
    """Shuffled batches, each process its own; what does not fill a batch is left out until the next epoch."""
    sampler = DistributedSampler(dataset, get_world_size(), get_rank(), seed=args.seed)
    loader = DataLoader(
        SeededDataset(dataset),
        args.batch_size,
        sampler=SeededSampler(sampler, args.seed),
        drop_last=True,
        **_common(args),
    )
    if not len(loader):
        raise UserError(
            f"{len(dataset)} images in {get_world_size()} processes do not fill one batch of "
            f"--batch_size {args.batch_size}"
        )
    return loader


def eval_loader(dataset, args):
    """Every image once. Batches are the same for any number of processes, which take turns at them: the padding,
    and with it what DETR sees, depends on the batch alone."""
    batches = torch.arange(len(dataset)).split(args.eval_batch_size or args.batch_size)
    return DataLoader(
        dataset, batch_sampler=[batch.tolist() for batch in batches[get_rank() :: get_world_size()]], **_common(args)
    )


def _common(args):
    return {
        "num_workers": args.num_workers,
        "collate_fn": collate_fn,
        "worker_init_fn": own_group,
        "timeout": args.step_timeout if args.num_workers else 0,
        "pin_memory": torch.device(args.device).type == "cuda",
    }
