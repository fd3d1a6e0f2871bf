"""Segmentation with DETR: a head that predicts a mask for every query, and the conversion of its outputs to masks and
panoptic maps (Carion et al., "End-to-End Object Detection with Transformers", section 4.4)."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from util.misc import NestedTensor
from util.runtime import UserError

SMALLEST_AREA = 5  # pixels; smaller segments are removed from panoptic maps


class AttentionMaps(nn.Module):
    """Multi-head attention weights of the object queries over the encoder's output.

    Args:
        dim: C, channels of tokens and map.
        heads: number of heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim / heads) ** -0.5
        self.q_linear = nn.Linear(dim, dim)
        self.k_linear = nn.Linear(dim, dim)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: torch.Tensor, memory: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Compute the attention weights, whose sum over all heads and positions is 1 for each query.

        Args:
            tokens: object tokens (B, Q, C).
            memory: the encoder's output as a map (B, C, H, W).
            mask: (B, H, W), bool, True on the padding, where the weights are 0.
        Returns: (B, Q, heads, H, W).
        """
        queries = self.q_linear(tokens).unflatten(-1, (self.heads, -1)) * self.scale
        keys = self.k_linear(memory.flatten(2).mT).unflatten(-1, (self.heads, -1))
        logits = torch.einsum("bqnc,blnc->bqnl", queries, keys)
        logits = logits.masked_fill(mask.flatten(1)[:, None, None], -math.inf)
        return logits.flatten(2).softmax(-1).view(*logits.shape[:3], *mask.shape[1:])


class MaskHead(nn.Module):
    """Predicts a query's mask from the image's feature map and the query's attention maps.

    It increases the resolution step by step and adds the backbone's finer maps, as in a feature pyramid network.

    Args:
        dim: C, channels of the last map. The layers have C + heads, C/2, C/4, C/8 and C/16 channels.
        heads: number of attention maps for each query.
        fine_channels: channels of the backbone's three finer maps, the coarsest first.
    """

    def __init__(self, dim: int, heads: int, fine_channels: Sequence[int]) -> None:
        super().__init__()
        widths = [dim + heads, dim + heads, dim // 2, dim // 4, dim // 8, dim // 16]
        for number, (before, after) in enumerate(itertools.pairwise(widths), 1):
            self.add_module(f"lay{number}", nn.Conv2d(before, after, 3, padding=1))
            self.add_module(f"gn{number}", nn.GroupNorm(math.gcd(8, after), after))  # narrow models have fewer groups
        self.out_lay = nn.Conv2d(dim // 16, 1, 3, padding=1)
        for number, channels in enumerate(fine_channels, 1):
            self.add_module(f"adapter{number}", nn.Conv2d(channels, widths[number + 1], 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(
        self, projected: torch.Tensor, attention: torch.Tensor, fine_maps: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Predict the masks.

        Args:
            projected: the last map, projected to C channels (B, C, H, W).
            attention: attention maps (B, Q, heads, H, W).
            fine_maps: the backbone's finer maps (B, channels, h, w), the coarsest first.
        Returns: mask logits (B, Q, h, w) in the resolution of the finest map.
        """
        # lay1 convolves the concatenation of the map and the attention maps. The map is the same for all queries of
        # an image, so its part of the convolution is computed once for each image.
        map_weight, attention_weight = self.lay1.weight.split([projected.shape[1], attention.shape[2]], dim=1)
        shared = F.conv2d(projected, map_weight, self.lay1.bias, padding=1)
        x = F.conv2d(attention.flatten(0, 1), attention_weight, padding=1)
        # The queries' own parts are small compared with the shared part, so the sum in bfloat16 would lose them.
        x = _add_to_queries(x.to(torch.promote_types(x.dtype, torch.float32)), shared)
        x = self._finish(1, x)
        x = self._finish(2, self.lay2(x))
        for number, fine in enumerate(fine_maps, 1):
            x = F.interpolate(x, fine.shape[-2:])
            x = _add_to_queries(x, self.get_submodule(f"adapter{number}")(fine))
            x = self._finish(number + 2, self.get_submodule(f"lay{number + 2}")(x))
        return self.out_lay(x).view(*attention.shape[:2], *x.shape[-2:])

    def _finish(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """The norm and the ReLU after layer `number`."""
        return F.relu(self.get_submodule(f"gn{number}")(x), inplace=True)


def _add_to_queries(x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """Add the map that all queries of an image share (B, C, H, W) in place to the queries' maps (B·Q, C, H, W)."""
    return x.unflatten(0, (shared.shape[0], -1)).add_(shared[:, None]).flatten(0, 1)


class DETRsegm(nn.Module):
    """A detector with a mask head.

    Args:
        detr: a `DETR` whose backbone returns all four feature maps.
        freeze_detr: train the mask head only.
    Raises: UserError for a number of channels that is not a multiple of 16.
    """

    def __init__(self, detr: nn.Module, freeze_detr: bool = False) -> None:
        super().__init__()
        dim, heads = detr.transformer.d_model, detr.transformer.nhead
        if dim % 16:
            raise UserError(f"--hidden_dim {dim} must be a multiple of 16 with --masks")
        if freeze_detr:
            detr.requires_grad_(False)
        self.detr = detr
        self.bbox_attention = AttentionMaps(dim, heads)
        self.mask_head = MaskHead(dim, heads, [detr.backbone.num_channels // divisor for divisor in (2, 4, 8)])

    def forward(self, samples: NestedTensor | torch.Tensor | Sequence[torch.Tensor]) -> dict[str, Any]:
        """Detect objects and predict their masks.

        Returns: the result of `DETR.forward`, with the mask logits of the last layer's queries for the padded image as
            `pred_masks` (B, Q, H/4, W/4).
        """
        maps, projected, tokens, memory = self.detr.encode(samples)
        attention = self.bbox_attention(tokens[-1], memory, maps[-1].mask)
        masks = self.mask_head(projected, attention, [x.tensors for x in maps[-2::-1]])
        return {**self.detr.predict(tokens), "pred_masks": masks}


def dice_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 − (2·Σpt + 1) / (Σp + Σt + 1) for each mask, where p is the sigmoid of the logits.

    Args:
        logits, targets: (N, H, W); targets are 0 or 1.
    Returns: (N,)
    """
    p = logits.sigmoid().flatten(1)
    t = targets.flatten(1)
    return 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)


def enlarge(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize mask logits (N, h, w) to `size` (height, width) by bilinear interpolation, in float32."""
    return F.interpolate(logits[:, None].float(), size, mode="bilinear")[:, 0]


class PostProcessSegm(nn.Module):
    """Adds masks to the detections.

    Args:
        threshold: a pixel belongs to the mask if its probability exceeds this.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        super().__init__()
        self.limit = math.log(threshold / (1 - threshold))

    @torch.no_grad()
    def forward(
        self,
        results: list[dict[str, torch.Tensor]],
        outputs: dict[str, Any],
        orig_target_sizes: torch.Tensor,
        max_target_sizes: torch.Tensor,
    ) -> list[dict[str, torch.Tensor]]:
        """Resize the masks to the original images.

        Args:
            results: of `PostProcess`, a dict for each image, to which this method adds `masks` (Q, 1, h, w), uint8.
            outputs: the output of `DETRsegm`.
            orig_target_sizes: (B, 2), height and width of the original images.
            max_target_sizes: (B, 2), height and width of the images that the model processed, without padding.
        Returns: `results`.
        """
        padded = max_target_sizes.amax(0).tolist()
        sizes = zip(max_target_sizes.tolist(), orig_target_sizes.tolist(), strict=True)
        # One image at a time, because the enlarged logits of a whole batch would take too much memory.
        for result, logits, ((height, width), original) in zip(results, outputs["pred_masks"], sizes, strict=True):
            masks = enlarge(logits, padded)[:, None, :height, :width] > self.limit
            result["masks"] = F.interpolate(masks.byte(), original)
        return results


class PostProcessPanoptic(nn.Module):
    """Converts the outputs of `DETRsegm` to panoptic maps, in which every pixel belongs to exactly one segment.

    Args:
        is_thing_map: whether a category is a thing, by category id. Missing categories are stuff.
        threshold: drop queries whose most probable class has a lower probability.
    """

    def __init__(self, is_thing_map: Mapping[int, bool], threshold: float = 0.85) -> None:
        super().__init__()
        self.is_thing_map = is_thing_map
        self.threshold = threshold

    @torch.no_grad()
    def forward(
        self, outputs: dict[str, Any], processed_sizes: torch.Tensor, target_sizes: torch.Tensor | None = None
    ) -> list[dict[str, Any]]:
        """Compute the panoptic maps.

        Args:
            outputs: the output of `DETRsegm`. As in the published code, its masks are resized to each processed image
                without removing the padding first. A batch of a single image has no padding.
            processed_sizes: (B, 2), height and width of the images that the model processed.
            target_sizes: (B, 2), height and width of the panoptic maps; `processed_sizes` if not given.
        Returns: for each image a dict with `png_string`, the bytes of a PNG file whose colours encode the segment ids
            as R + 256·G + 65536·B, and `segments_info`, a list of dicts with `id`, `isthing`, `category_id` and `area`
            in pixels. The list is empty if no query exceeds the threshold.
        """
        if target_sizes is None:
            target_sizes = processed_sizes
        num_classes = outputs["pred_logits"].shape[-1] - 1
        scores, labels = outputs["pred_logits"].float().softmax(-1).max(-1)
        confident = (scores > self.threshold) & (labels < num_classes)
        results = []
        for image, masks in enumerate(outputs["pred_masks"]):
            chosen = confident[image]
            processed_size = tuple(map(int, processed_sizes[image]))
            target_size = tuple(map(int, target_sizes[image]))
            results.append(self._segment(masks[chosen], labels[image][chosen].tolist(), processed_size, target_size))
        return results

    def _segment(
        self, masks: torch.Tensor, classes: list[int], processed_size: tuple[int, int], target_size: tuple[int, int]
    ) -> dict[str, Any]:
        """The panoptic map of one image, from the mask logits (n, h, w) and the classes of its confident queries."""
        masks = enlarge(masks, processed_size)
        kept = np.arange(len(classes))  # the query of each remaining mask
        ids = _largest(masks, target_size)
        if classes:
            ids = self._merge_stuff(classes)[ids]
        # Remove small segments and assign their pixels to the remaining masks, until all segments are large enough.
        # Queries that were merged into another one have no pixels left and are removed as well.
        while True:
            areas = np.bincount(ids.ravel(), minlength=len(kept))[: len(kept)]
            large = areas >= SMALLEST_AREA
            if large.all():
                break
            kept, masks = kept[large], masks[torch.from_numpy(large)]
            ids = _largest(masks, target_size)
        segments = [
            {
                "id": number,
                "isthing": bool(self.is_thing_map.get(classes[query], False)),
                "category_id": classes[query],
                "area": int(area),
            }
            for number, (query, area) in enumerate(zip(kept, areas, strict=True))
        ]
        return {"png_string": _png(ids), "segments_info": segments}

    def _merge_stuff(self, classes: list[int]) -> np.ndarray:
        """For each query the query to merge it into: the first of the same class for stuff, itself for things."""
        first_query = {}
        merged = np.arange(len(classes), dtype=np.int32)
        for query, label in enumerate(classes):
            if not self.is_thing_map.get(label, False):
                merged[query] = first_query.setdefault(label, query)
        return merged


def _largest(masks: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """The index of the mask (n, h, w) with the largest logit at each pixel, resized (nearest) to an int32 array of
    `size` (height, width); 0 everywhere if there are no masks."""
    if not len(masks):
        return np.zeros(size, np.int32)
    ids = Image.fromarray(masks.argmax(0).int().cpu().numpy())
    return np.asarray(ids.resize(size[::-1], Image.Resampling.NEAREST))


def _png(ids: np.ndarray) -> bytes:
    """Encode segment ids (H, W) as the colours of a PNG file: id = R + 256·G + 65536·B."""
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1)
    file = io.BytesIO()
    Image.fromarray(colours.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
