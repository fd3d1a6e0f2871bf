"""Masks on top of DETR: a head that draws a mask for every query, and the way from its outputs to masks and panoptic
maps (Carion et al., "End-to-End Object Detection with Transformers", section 4.4)."""

import io
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from util.runtime import UserError

SMALLEST_AREA = 5  # pixels that a segment of a panoptic map must have


class AttentionMaps(nn.Module):
    """Where on the encoder's map each query looks, by several heads."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.scale = heads, (dim / heads) ** -0.5
        self.q_linear, self.k_linear = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for linear in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens, memory, mask):
        """Tokens (B, Q, C), map (B, C, H, W) and its mask (B, H, W), True on padding → (B, Q, heads, H, W).

        What a query gives to all places by all heads together is 1; padding gets 0.
        """
        queries = self.q_linear(tokens).unflatten(-1, (self.heads, -1)) * self.scale
        keys = self.k_linear(memory.flatten(2).mT).unflatten(-1, (self.heads, -1))
        logits = torch.einsum("bqnc,blnc->bqnl", queries, keys)
        logits = logits.masked_fill(mask.flatten(1)[:, None, None], -math.inf)
        return logits.flatten(2).softmax(-1).view(*logits.shape[:3], *mask.shape[1:])


class MaskHead(nn.Module):
    """Convolutions from a picture's map and a query's attention to the query's mask, over ever finer maps.

    Args:
        dim: C, channels of the map; the layers have C + heads, C/2, C/4, C/8 and C/16.
        heads: attention maps of a query.
        fine_channels: of the backbone's three finer maps, the coarsest first.
    """

    def __init__(self, dim, heads, fine_channels):
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

    def forward(self, projected, attention, fine_maps):
        """Draw.

        Args:
            projected: the last map, projected to C channels, (B, C, H, W).
            attention: (B, Q, heads, H, W).
            fine_maps: the backbone's, (B, channels, h, w), the coarsest first.
        Returns: logits (B, Q, h, w) of the finest map's size.
        """
        # lay1 on the map with the attention behind it; the map's part once a picture and not once a query
        of_map, of_attention = self.lay1.weight.split([projected.shape[1], attention.shape[2]], dim=1)
        shared = F.conv2d(projected, of_map, self.lay1.bias, padding=1)
        x = F.conv2d(attention.flatten(0, 1), of_attention, padding=1)
        # what tells queries apart is small beside what they share: a sum in bfloat16 would lose it
        x = _add_to_queries(x.to(torch.promote_types(x.dtype, torch.float32)), shared)
        x = self._finish(1, x)
        x = self._finish(2, self.lay2(x))
        for number, fine in enumerate(fine_maps, 1):
            x = F.interpolate(x, fine.shape[-2:])
            x = _add_to_queries(x, self.get_submodule(f"adapter{number}")(fine))
            x = self._finish(number + 2, self.get_submodule(f"lay{number + 2}")(x))
        return self.out_lay(x).view(*attention.shape[:2], *x.shape[-2:])

    def _finish(self, number, x):
        return F.relu(self.get_submodule(f"gn{number}")(x), inplace=True)


def _add_to_queries(x, shared):
    """Add in place, to the maps of all queries (B·Q, C, H, W), what those of one picture share (B, C, H, W)."""
    return x.unflatten(0, (shared.shape[0], -1)).add_(shared[:, None]).flatten(0, 1)


class DETRsegm(nn.Module):
    """A detector that draws its objects.

    Args:
        detr: `DETR` whose backbone returns all four maps.
        freeze_detr: only the mask head learns.
    Raises: UserError for a width that does not halve four times.
    """

    def __init__(self, detr, freeze_detr=False):
        super().__init__()
        dim, heads = detr.transformer.d_model, detr.transformer.nhead
        if dim % 16:
            raise UserError(f"--hidden_dim {dim} must be a multiple of 16 with --masks")
        if freeze_detr:
            detr.requires_grad_(False)
        self.detr = detr
        self.bbox_attention = AttentionMaps(dim, heads)
        self.mask_head = MaskHead(dim, heads, [detr.backbone.num_channels // divisor for divisor in (2, 4, 8)])

    def forward(self, samples):
        """As `DETR.forward`, with `pred_masks` (B, Q, H/4, W/4) in the result: logits, of the last layer's queries, on
        the padded picture."""
        maps, projected, tokens, memory = self.detr.encode(samples)
        attention = self.bbox_attention(tokens[-1], memory, maps[-1].mask)
        masks = self.mask_head(projected, attention, [x.tensors for x in maps[-2::-1]])
        return {**self.detr.predict(tokens), "pred_masks": masks}


def dice_loss(logits, targets):
    """1 − (2·Σpt + 1) / (Σp + Σt + 1) of masks (N, H, W), p being the sigmoid of the logits: (N,)."""
    p, t = logits.sigmoid().flatten(1), targets.flatten(1)
    return 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)


def enlarge(logits, size):
    """(N, h, w) → (N, *size), bilinear."""
    return F.interpolate(logits[:, None].float(), size, mode="bilinear")[:, 0]


class PostProcessSegm(nn.Module):
    """Adds the masks to the detections; a pixel belongs to one where the sigmoid is above the threshold."""

    def __init__(self, threshold=0.5):
        super().__init__()
        self.limit = math.log(threshold / (1 - threshold))

    @torch.no_grad()
    def forward(self, results, outputs, orig_target_sizes, max_target_sizes):
        """Masks in the original pictures' pixels.

        Args:
            results: of `PostProcess`, a dict for each picture, which gets `masks` (Q, 1, h, w), uint8.
            outputs: of `DETRsegm`.
            orig_target_sizes, max_target_sizes: (B, 2), height and width of the original and the processed pictures.
        Returns: `results`.
        """
        padded = max_target_sizes.amax(0).tolist()
        sizes = zip(max_target_sizes.tolist(), orig_target_sizes.tolist(), strict=True)
        # one picture at a time: the enlarged logits of a batch are large
        for result, logits, ((height, width), original) in zip(results, outputs["pred_masks"], sizes, strict=True):
            masks = enlarge(logits, padded)[:, None, :height, :width] > self.limit
            result["masks"] = F.interpolate(masks.byte(), original)
        return results


class PostProcessPanoptic(nn.Module):
    """Outputs of `DETRsegm` → panoptic maps, in which every pixel belongs to one segment.

    Args:
        is_thing_map: category id → whether its objects are told apart; those that it lacks are stuff.
        threshold: least probability of a query's class.
    """

    def __init__(self, is_thing_map, threshold=0.85):
        super().__init__()
        self.is_thing_map, self.threshold = is_thing_map, threshold

    @torch.no_grad()
    def forward(self, outputs, processed_sizes, target_sizes=None):
        """Panoptic maps.

        Args:
            outputs: of `DETRsegm`. Their masks are fitted to each processed picture with the padding, as published;
                a batch of one picture has none.
            processed_sizes, target_sizes: (height, width) of each picture as the model saw it, and of its map; the
                first again if not given.
        Returns: for each picture a dict of `png_string`, the bytes of a PNG with id = R + 256·G + 65536·B, and
            `segments_info`, a list of {"id", "isthing", "category_id", "area"}, empty if no query is sure.
        """
        scores, labels = outputs["pred_logits"].float().softmax(-1).max(-1)
        sure = (scores > self.threshold) & (labels < outputs["pred_logits"].shape[-1] - 1)
        both = processed_sizes, processed_sizes if target_sizes is None else target_sizes
        processed, target = ([tuple(map(int, size)) for size in sizes] for sizes in both)
        pictures = zip(outputs["pred_masks"], labels, sure, processed, target, strict=True)
        return [
            self._draw(masks[chosen], classes[chosen].tolist(), *sizes) for masks, classes, chosen, *sizes in pictures
        ]

    def _draw(self, masks, classes, processed, target):
        masks = enlarge(masks, processed)
        kept, ids = np.arange(len(classes)), _largest(masks, target)
        if classes:
            ids = self._first_of_stuff(classes)[ids]
        # queries merged into another have no pixels left, so they go with the small ones, and what is left shares anew
        while True:
            areas = np.bincount(ids.ravel(), minlength=len(kept))[: len(kept)]
            large = areas >= SMALLEST_AREA
            if large.all():
                break
            kept, masks = kept[large], masks[torch.from_numpy(large)]
            ids = _largest(masks, target)
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

    def _first_of_stuff(self, classes):
        """For each query the first of its class if that is stuff, else itself."""
        first = {}
        return np.array(
            [
                number if self.is_thing_map.get(label, False) else first.setdefault(label, number)
                for number, label in enumerate(classes)
            ],
            np.int32,
        )


def _largest(masks, size):
    """Which mask of (n, h, w) has the largest logit at each pixel, resized (nearest): int32 array of `size`; 0 where
    there is none."""
    if not len(masks):
        return np.zeros(size, np.int32)
    ids = Image.fromarray(masks.argmax(0).int().cpu().numpy())
    return np.asarray(ids.resize(size[::-1], Image.Resampling.NEAREST))


def _png(ids):
    file = io.BytesIO()
    Image.fromarray(np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
