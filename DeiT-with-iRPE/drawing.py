"""Pictures of encodings and logs: a figure to draw on, the encoding of every offset, and maps of it.

Only matplotlib's objects are used, never pyplot, so that nothing asks for a screen.
"""
import importlib
import math
from pathlib import Path

import torch

# this file is the same in both codebases, which keep runtime.py in different places
runtime = importlib.import_module("runtime" if Path(__file__).with_name("runtime.py").is_file() else "util.runtime")

# Okabe and Ito's colours, which colour-blind readers tell apart, without black and the yellow that white paper
# swallows
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")


def figure_class():
    """matplotlib's Figure. Raises: UserError if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise runtime.UserError("pictures are drawn with matplotlib, which is not installed: "
                                "pip install matplotlib") from error
    return Figure


def new_figure(width, height):
    """An empty figure of so many inches, which arranges what is put on it."""
    return figure_class()(figsize=(width, height), layout="constrained")


def save(figure, path, dpi=120):
    """Write a PNG. Raises: UserError if the path has another ending or cannot be written."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise runtime.UserError(f"the picture {path} must be a .png file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    except OSError as error:
        raise runtime.UserError(f"{path} cannot be written: {error.strerror}") from error


def token_pairs(height, width):
    """A query and a key for every offset on the map: two (2·height - 1, 2·width - 1) tensors of token numbers.

    Entry [height - 1 + dr, width - 1 + dc] is a pair whose key lies dr rows below and dc columns right of its query.
    """
    def axis(n):
        offset = torch.arange(1 - n, n)
        query = (-offset).clamp(min=0)
        return query, query + offset

    (query_rows, key_rows), (query_cols, key_cols) = axis(height), axis(width)
    return query_rows[:, None] * width + query_cols, key_rows[:, None] * width + key_cols


def offset_map(rpe, on, height, width, mean=None):
    """What a term of the encoding adds at every offset between query and key, without the prefix tokens.

    Args:
        rpe: `irpe.iRPE` or `irpe.iRPE_Cross`.
        on: "q", "k" or "v", where the term acts.
        height, width: the map, in tokens.
        mean: in contextual mode on q and k, the mean of the scaled keys (for q) or queries (for k), (H, D).
    Returns: (H or H', 2·height - 1, 2·width - 1), laid out as `token_pairs`: on q and k what is added to the logits,
        in the mean over those vectors; on v the norm of the vector that a unit of attention adds to the output.
    """
    query, key = token_pairs(height, width)
    encoding = 0
    for table in (rpe.rp_rows, rpe.rp_cols) if hasattr(rpe, "rp_rows") else (rpe,):
        skip = table.config.skip
        ids = table.bucket_ids(height * width + skip, "cpu", height, width)[skip:, skip:].long()
        # on queries the bucket is that of the pair turned round
        ids = ids[key, query] if on == "q" else ids[query, key]
        values = next(table.parameters()).detach().float().cpu()
        if table.config.mode == "bias":
            encoding = encoding + values[:, ids]  # (H', 2h - 1, 2w - 1)
        else:
            encoding = encoding + (values.transpose(1, 2) if on == "v" else values)[:, :, ids]  # (H', D, ...)
    if encoding.ndim == 3:
        return encoding
    return encoding.norm(dim=1) if on == "v" else (mean[:, :, None, None] * encoding).sum(1)


def draw_offset_maps(maps, layers, title, unit, signed):
    """A figure with a map for each layer and head, and one colour scale for all.

    Args:
        maps: one (heads, 2h - 1, 2w - 1) tensor for each layer, as `offset_map` returns them.
        layers: their numbers.
        title, unit: of the figure and of its colour bar.
        signed: diverging colours around zero; else from the least value up.
    """
    panels, tall, wide = torch.stack(list(maps)), *maps[0].shape[1:]
    heads = [f"head {head}" for head in range(len(maps[0]))] if len(maps[0]) > 1 else [""]
    names = [f"layer {layer}" for layer in layers], heads
    if len(names[0]) > len(names[1]):  # the longer side goes from left to right
        panels, names = panels.transpose(0, 1), names[::-1]
    rows, columns = panels.shape[:2]
    cell = min(2.5, max(0.9, 11 / columns))
    figure = new_figure(max(5.5, cell * columns + 1.8), max(2.6, cell * tall / wide * rows + 1.0))
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.03, hspace=0.03)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    size = panels.abs().flatten()
    # a few offsets far above the rest would leave the others pale: half a percent may lie beyond the scale's end
    limit = size.kthvalue(math.ceil(0.995 * len(size))).values.item() or size.max().item() or 1.0
    low = -limit if signed else size.min().item()
    low = low if low < limit else 0.0  # a map of one value
    for axes, values in zip(grid.flat, panels.flatten(0, 1), strict=True):
        image = axes.imshow(values.numpy(), cmap="RdBu_r" if signed else "viridis", vmin=low,
                            vmax=limit, extent=(-wide / 2, wide / 2, tall / 2, -tall / 2), interpolation="nearest")
        axes.plot(0, 0, "+", color="black" if signed else "white", markersize=4)
        axes.set(xticks=[-(wide // 2), 0, wide // 2], yticks=[-(tall // 2), 0, tall // 2])
        axes.tick_params(labelsize=6, length=2)
    for axes, name in zip(grid[:, 0], names[0], strict=True):
        axes.set_ylabel(name, fontsize=8)
    for axes, name in zip(grid[0], names[1], strict=True):
        axes.set_title(name, fontsize=8)
    figure.suptitle(f"{title}\neach pixel: rows and columns from the query (+) to the key, in tokens", fontsize=9)
    bar = figure.colorbar(image, ax=grid, fraction=0.03, aspect=30,
                          extend=("both" if signed else "max") if size.max() > limit else "neither")
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def chosen_layers(wanted, count):
    """Numbers from 0 of the layers asked for, all if none were."""
    for layer in wanted or ():
        if not -count <= layer < count:
            raise runtime.UserError(f"--layer {layer} is not among the model's {count} layers, 0 to {count - 1}")
    return sorted({layer % count for layer in wanted}) if wanted else list(range(count))


def needs_pictures(attentions):
    """Whether what their terms add depends on queries or keys."""
    return any(rpe is not None and "weight" in next(iter(rpe.state_dict()))
               for attention in attentions for rpe in (attention.rpe_q, attention.rpe_k))


def draw_encodings(attentions, layers, map_size, means, name, output_dir):
    """Write rpe_q.png, rpe_k.png and rpe_v.png, as far as the attentions have those terms, and print what they show.

    Args:
        attentions: modules with rpe_q, rpe_k and rpe_v, of all layers.
        layers: the numbers of those to draw.
        map_size: (height, width) in tokens.
        means: for each layer {"q", "k"}: mean scaled queries and keys, (H, D); None where nothing depends on them.
        name: the model's, for the titles.
    """
    height, width = map_size
    for on, met in (("q", "k"), ("k", "q"), ("v", None)):
        if getattr(attentions[0], f"rpe_{on}") is None:
            continue
        what, unit = f"encoding on {dict(q='queries', k='keys', v='values')[on]}", "added to the logit"
        if on == "v":
            unit = "norm of what is added to the output,\nper unit of attention"
        elif needs_pictures([attentions[0]]):
            unit += f", mean over all {dict(q='queries', k='keys')[met]}"
        maps = [offset_map(getattr(attentions[layer], f"rpe_{on}"), on, height, width,
                           means[layer][met] if means and met else None) for layer in layers]
        path = Path(output_dir, f"rpe_{on}.png")
        save(draw_offset_maps(maps, layers, f"{name}\n{what}, map of {height}×{width} tokens", unit, on != "v"), path)
        low, high = (value.item() for value in torch.stack(maps).aminmax())
        print(f"{path}: {what} of {len(layers)} layer{'s' * (len(layers) > 1)}, from {low:.3g} to {high:.3g} "
              f"{' '.join(unit.split())}{'' if low or high else '; all zero, as before training'}")
