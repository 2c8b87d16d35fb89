"""What a trained network sees in one picture, as one PNG.

    python -m tools.visualize --resume FILE --image FILE [--stage N] [--block -1] [--out FILE] [--json FILE]

The PNG shows the input, Grad-CAM for the predicted class, the top-5, the response maps of all branches of one
Group-Mix Attention (single tokens, 3x3, 5x5 and 7x7 groups, local branch), and the share of each branch in every block.
The flags that choose weights and preprocessing are those of test.py. --json FILE writes the numbers.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import UserError, read_command
from configs.commands import CommandParser, command
from configs.text import in_picture
from data import ImageDataset
from data.normalization import denormalize
from data.sources import PictureSource
from models.groupmixformer import SeparableConv2d
from tasks import keys_of
from tasks.classification.inference import class_probabilities
from tasks.classification.transforms import views_transform
from tasks.classification.weights import load_classifier
from utils.checkpoint import find_weights
from utils.files import STDOUT, check_folder, check_json_target, check_target, write_json
from utils.origin import check_named_files, config_of, remarks, run_folder_of

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")  # Okabe and Ito's
TOP = 5
SOFTMAX = partial(torch.softmax, dim=1)
DEFAULT_FOLDER = Path("output", "visualized")  # of weights that lie in no run folder


@dataclass(frozen=True)
class Branches:
    """The n branches of one attention for one image; H, W are the height and width of the stage's map."""

    stage: int  # from 1
    block: int  # of the stage, from 1
    names: list[str]
    proxies: np.ndarray  # (n, H, W) L2 norm over the channels of v, after the aggregators
    responses: np.ndarray  # (n, H, W) L2 norm over the channels of what the branch adds to the attention's output

    @property
    def norms(self) -> np.ndarray:
        """(n,) mean response over the tokens."""
        return self.responses.mean(axis=(1, 2))

    @property
    def shares(self) -> np.ndarray:
        """(n,) norms over their sum."""
        return self.norms / max(self.norms.sum(), np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Explanation:
    """What the picture shows of one image."""

    cam: np.ndarray  # (h, w) Grad-CAM on the last map, 0 to 1
    probabilities: np.ndarray  # (classes,)
    branches: list[Branches]  # of all blocks, in order of depth


def explain(network: nn.Module, image: Tensor, to_probabilities: Callable[[Tensor], Tensor] = SOFTMAX) -> Explanation:
    """Run a network in evaluation mode on one normalised image (3, H, W), and record what the picture shows.

    `to_probabilities` takes logits (1, K), as `class_probabilities` of a configuration does.

    The response of a branch at a token is the norm of W_proj[:, segment] y[segment]. The projection after the attention
    is linear, so its output is the sum of these vectors and the bias. A segment's y comes from its own v, and
    where it fills whole heads, as in the published networks, from its own q and k. Shares are normalised norms:
    magnitude, not importance.
    """
    attentions = [
        (s, b, block.att)
        for s, stage in enumerate(network.groupmixformer_backbone, 1)
        for b, block in enumerate(stage.gma_stage, 1)
    ]
    seen: dict[nn.Module, tuple[Any, Any]] = {}
    recorded = [m for _, _, attention in attentions for m in (attention, attention.aggregator, attention.proj)]
    handles = [
        module.register_forward_hook(lambda module, inputs, output: seen.update({module: (inputs, output)}))
        for module in (network.norm4, *recorded)
    ]
    try:
        with torch.enable_grad():
            logits = network(image[None])[0]
    finally:
        for handle in handles:
            handle.remove()
    branches = []
    for stage, block, attention in attentions:
        (_, size), _ = seen[attention]
        _, (proxies, local) = seen[attention.aggregator]
        (y,), _ = seen[attention.proj]
        names = branch_names(attention.aggregator)
        values = [proxies[2][0]] if local is None else [proxies[2][0], local[0]]
        norms = _norms(attention.proj.weight, y[0], torch.cat(values, dim=-1), attention.aggregator.segment_dim, size)
        branches.append(Branches(stage, block, names, *norms))
    probabilities = to_probabilities(logits.detach()[None])[0]
    return Explanation(_grad_cam(logits, seen[network.norm4][1]), probabilities.cpu().numpy(), branches)


def branch_names(aggregator: nn.Module) -> list[str]:
    """Names of an attention's branches, in the order of their channels."""
    windows = [m.conv1.kernel_size[0] for m in aggregator.children() if isinstance(m, SeparableConv2d)]
    local = [] if aggregator.agg0 is None else ["local branch"]
    return ["single tokens", *(f"{window}x{window} groups" for window in windows), *local]


@torch.no_grad()
def _norms(weight: Tensor, y: Tensor, v: Tensor, s: int, size: tuple[int, int]) -> list[np.ndarray]:
    """Proxies and responses of `Branches`. weight: (C, C); y, v: (N, C), of which v ends with the local branch."""
    proxies = [part.norm(dim=-1) for part in v.split(s, dim=-1)]
    pairs = zip(weight.split(s, dim=1), y.split(s, dim=-1))
    responses = [F.linear(part, segment).norm(dim=-1) for segment, part in pairs]
    return [torch.stack(rows).reshape(-1, *size).cpu().numpy() for rows in (proxies, responses)]


def _grad_cam(logits: Tensor, features: Tensor) -> np.ndarray:
    """Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2) of the predicted class, on features (1, C, h, w); 0 to 1."""
    (gradient,) = torch.autograd.grad(logits.max(), features)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    cam = (weights * features).sum(dim=1)[0].relu().detach()
    return (cam / cam.max().clamp(min=torch.finfo(cam.dtype).tiny)).cpu().numpy()


def draw(
    path: Path, title: str, image: np.ndarray, names: Sequence[str], result: Explanation, chosen: Branches
) -> None:
    """Draw an image (H, W, 3), 0 to 1, and its explanation. UserError where the file cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 15.5), layout="constrained")
    figure.suptitle(title, fontsize=15, fontweight="bold")
    bands = figure.subfigures(3, 1, height_ratios=(4.2, 6.4, 4))
    _draw_class(bands[0], image, names, result)
    _draw_maps(bands[1], chosen)
    _draw_depth(bands[2], result.branches)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written: {error}; give another --out") from None


def _draw_class(band: Any, image: np.ndarray, names: Sequence[str], result: Explanation) -> None:
    pictures = band.subplots(1, 3, width_ratios=(1, 1, 1.25))
    order = np.argsort(-result.probabilities, kind="stable")[:TOP]
    height, width = image.shape[:2]
    pictures[0].imshow(image)
    pictures[0].set_title(f"network input ({width} x {height})")
    cam = F.interpolate(torch.from_numpy(result.cam)[None, None], size=(height, width), mode="bilinear")[0, 0].numpy()
    pictures[1].imshow(image.mean(axis=2), cmap="gray", vmin=0, vmax=1)
    pictures[1].imshow(cam, cmap="inferno", alpha=0.6, vmin=0, vmax=1)
    h, w = result.cam.shape
    note = f"from a {w} x {h} map" if h * w > 1 else "a 1 x 1 map has no location"
    pictures[1].set_title(f"Grad-CAM: evidence for\n{_short(names[order[0]])} ({note})")
    for axis in pictures[:2]:
        axis.set_axis_off()
    shares = 100 * result.probabilities[order]
    bars = pictures[2].barh([_short(names[i]) for i in order], shares, color=["#0072B2"] + ["#9AB8CC"] * (TOP - 1))
    pictures[2].bar_label(bars, fmt="%.1f %%", padding=4)
    pictures[2].invert_yaxis()
    pictures[2].set(xlim=(0, 118), xlabel="probability, %", title=f"top {len(order)} of {len(names)} classes")
    pictures[2].spines[["top", "right"]].set_visible(False)


def _draw_maps(band: Any, chosen: Branches) -> None:
    band.suptitle(
        f"Branches of Group-Mix Attention in stage {chosen.stage}, block {chosen.block}: bright tokens respond "
        "strongly; each map has its own scale",
        fontweight="bold",
    )
    rows = band.subplots(2, len(chosen.names))
    labels = ("group proxies\n(norm of v before attention)", "contribution\n(norm after the projection)")
    for axes, maps, label in zip(rows, (chosen.proxies, chosen.responses), labels):
        for axis, values, name, share in zip(axes, maps, chosen.names, chosen.shares):
            shown = axis.imshow(values, cmap="viridis")
            band.colorbar(
                shown, ax=axis, shrink=0.7, format="%.2g", location="bottom", ticks=(values.min(), values.max())
            )
            axis.set_title(name if maps is chosen.proxies else f"{100 * share:.0f} % of the sum")
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label)


def _draw_depth(band: Any, branches: Sequence[Branches]) -> None:
    axis = band.subplots()
    positions = np.arange(len(branches))
    base = np.zeros(len(branches))
    for number, name in enumerate(branches[0].names):
        shares = np.array([100 * block.shares[number] for block in branches])
        axis.bar(
            positions,
            shares,
            bottom=base,
            color=COLOURS[number % len(COLOURS)],
            width=0.9,
            label=name,
            edgecolor="white",
        )
        base += shares
    for position, block in enumerate(branches):
        if position and block.block == 1:
            axis.axvline(position - 0.5, color="black", linewidth=1.5)
    labels = [f"stage {b.stage}\nblock 1" if b.block == 1 else str(b.block) for b in branches]
    axis.set_xticks(positions, labels)
    axis.set(xlim=(-0.5, len(branches) - 0.5), ylim=(0, 100), ylabel="share of the summed norms, %")
    axis.set_title("Share of each branch, block by block", fontweight="bold")
    handles, names = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _short(name: str, length: int = 28) -> str:
    name = name.split(" (n")[0].split(",")[0]  # without WordNet's number and second names
    return in_picture(name if len(name) <= length else name[: length - 1] + "…")


def choose_block(branches: Sequence[Branches], stage: int | None, block: int) -> Branches:
    """The block of a stage, both from 1; a negative block counts from the end. UserError where there is none.

    None is the last stage whose maps have more than one token, where there is such a stage.
    """
    last_stage = branches[-1].stage
    if stage is None:
        stage = max((b.stage for b in branches if b.responses[0].size > 1), default=last_stage)
    if not 1 <= stage <= last_stage:
        raise UserError(f"--stage {stage}: there are stages 1 to {last_stage}")
    blocks = [b for b in branches if b.stage == stage]
    if not (1 <= block <= len(blocks) or -len(blocks) <= block <= -1):
        raise UserError(f"--block {block}: stage {stage} has blocks 1 to {len(blocks)}, or -1 for the last")
    return blocks[block - 1 if block > 0 else block]


def visualize(
    config: CfgNode, image: Path, stage: int | None, block: int, out: Path, notify: Callable[[str], None]
) -> dict[str, Any]:
    """Draw the explanation of a picture and return its numbers. UserError for missing weights or block."""
    network, names, loaded = load_classifier(config, find_weights(config), notify)
    views = ImageDataset(PictureSource([image]), views_transform(config))[0][0]
    result = explain(network, views[0], partial(class_probabilities, config))
    if result.cam.size == 1:
        size = " x ".join(map(str, views.shape[2:]))
        notify(
            f"the last map of {size} pixels has one token, so Grad-CAM has no location; larger input has more tokens"
        )
    chosen = choose_block(result.branches, stage, block)
    shown = denormalize(views[:1])[0].clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).numpy()  # -> (H, W, 3), grey too
    draw(out, in_picture(f"{config.MODEL.NAME} on {image.name}"), shown, names, result, chosen)
    order = np.argsort(-result.probabilities, kind="stable")[:TOP].tolist()
    return {
        "picture": str(image),
        "weights": loaded,
        "top": [{"class": i, "name": names[i], "probability": float(result.probabilities[i])} for i in order],
        "grad_cam": result.cam.tolist(),
        "branches": chosen.names,
        "blocks": [
            {"stage": b.stage, "block": b.block, "norms": b.norms.tolist(), "shares": b.shares.tolist()}
            for b in result.branches
        ],
    }


@command("tools.visualize")
def main(argv: Sequence[str] | None = None) -> None:
    """Draw the picture of a command line."""
    parser = CommandParser("tools.visualize", __doc__)
    parser.add_argument("--image", required=True, type=Path, metavar="FILE", help="the picture, of any size")
    parser.add_argument(
        "--stage",
        type=int,
        metavar="N",
        help="of the response maps, from 1; default: the last with more than a token",
    )
    parser.add_argument("--block", type=int, default=-1, metavar="N", help="its block, from 1; -1 is the last")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: visualized/<picture>.png in the run folder, else in output/"
    )

    def notify(line: str) -> None:
        print(line, file=sys.stderr)

    args, config, keys = read_command(argv, keys_of, notify, parser=parser, config_of=config_of)
    check_json_target(args.json)
    check_named_files(config, keys)
    if not args.image.is_file():
        raise UserError(f"--image {args.image}: no such file")
    # Not in the picture's folder: in a data set, the drawing would be one more image.
    run_folder = run_folder_of(find_weights(config))
    folder = run_folder / DEFAULT_FOLDER.name if run_folder else DEFAULT_FOLDER
    out = args.out or folder / f"{args.image.stem}.png"
    if not args.out:  # another missing folder is a mistake in --out
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
    check_target(out, "--out")
    for remark in remarks(config, keys, measures=False, cfg=args.cfg):
        notify(remark)
    result = visualize(config, args.image, args.stage, args.block, out, notify)
    stream = sys.stderr if args.json == STDOUT else sys.stdout
    for entry in result["top"]:
        print(f"{100 * entry['probability']:6.2f} %  {entry['name']}", file=stream)
    if args.json:
        write_json(args.json, result)
    print(f"wrote {out}", file=stream)


if __name__ == "__main__":
    sys.exit(main())
