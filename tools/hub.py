"""A folder of weights that `timm.create_model("local-dir:FOLDER")` and model hubs take: tools.convert --to hub."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from configs import UserError, image_size, read_command, with_num_classes
from configs.keys import Key
from configs.load import flatten
from configs.text import printable
from data.normalization import pixel_statistics
from data.sources import list_names
from models.groupmixformer import HUB_TAG, VARIANTS
from models.weights import Architecture, architecture_of, num_classes_of
from tasks import keys_of
from tasks.classification.class_names import in_words, known_names
from tasks.classification.transforms import CROP_RATIO
from tasks.classification.weights import Weights, fitting_config, network_with
from tasks.networks import network_arguments
from utils.checkpoint import HUB_CONFIG, HUB_KEY, HUB_WEIGHTS, stored_config
from utils.origin import config_of

ROOT = Path(__file__).resolve().parents[1]
TRAINING_ONLY = ("drop_path_rate", "proj_drop_rate", "attn_drop_rate")  # change nothing in evaluation


def hub_files(source: str, weights: Weights, encoded: bytes, name: str, cfg: str, license: str) -> dict[str, bytes]:
    """The files of the folder by name.

    Args:
        source: the file that the weights come from.
        weights: of one whole classifier.
        encoded: these weights as a safetensors file.
        name: what the card calls the network.
        cfg: YAML file of the network and its input; '' for what the source holds, else the one in configs/ that fits.
        license: of the weights, for the card.

    Raises UserError where the weights are none of a classifier, or not of the network that the configuration describes.
    """
    config, keys = _configuration(source, weights, cfg)
    network = network_with(config, weights, source)
    description = describe(config, keys, known_names(weights.checkpoint.get("classes")))
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\n[tool.ruff]")[0]
    card = {
        "name": _as_markdown(name),
        "header": yaml.safe_dump({"license": license}, width=1000).strip(),
        "license": _as_markdown(license),
        "network": str(architecture_of(weights.state)),
        "parameters": sum(p.numel() for p in network.parameters()),
        "num_classes": network.num_classes,
        "input": " x ".join(map(str, description["pretrained_cfg"]["input_size"])),
        "preparation": f"crop_pct {description['pretrained_cfg']['crop_pct']:g}" if config.TEST.CROP else "no crop",
        "weights": _kind(weights),
        "numbers": "\n".join(_numbers(Path(source), weights, config)),
        "data": _data(weights, description),
        "recipe": _recipe(weights, keys),
        "mode": "RGB" if config.MODEL.GMA.IN_DIM == 3 else "L",
        "probabilities": "sigmoid()" if config.DATA.MULTI_LABEL else "softmax(-1)",
    }
    return {
        HUB_WEIGHTS: encoded,
        HUB_CONFIG: f"{json.dumps(description, indent=2)}\n".encode(),
        "README.md": CARD.format(**card).encode(),
        "groupmixformer.py": (ROOT / "models" / "groupmixformer.py").read_bytes(),
        "pyproject.toml": re.sub(r"(?m)^package-dir.*\n", "", pyproject).encode(),
    }


def _configuration(source: str, weights: Weights, cfg: str) -> tuple[CfgNode, Mapping[str, Key]]:
    if not cfg and not stored_config(weights.checkpoint):
        fitting = fitting_config(weights.state)
        if not fitting:
            raise UserError(f"{source}: holds no configuration of its network; name its YAML file with --cfg")
        cfg = str(ROOT / "configs" / f"{fitting}.yaml")
    words = [*(["--cfg", cfg] if cfg else []), "--resume", source]
    _, config, keys = read_command(words, keys_of, lambda line: None, config_of=config_of)
    if config.TASK != "classification" or not num_classes_of(weights.state):
        raise UserError(f"{source}: --to hub takes classifiers; for detectors and segmenters see docs/weights.md")
    return with_num_classes(config, num_classes_of(weights.state)), keys


def describe(config: CfgNode, keys: Mapping[str, Key], classes: Sequence[str]) -> dict[str, Any]:
    """The content of config.json as timm reads it: network, classes, and the images that the network takes.

    Under HUB_KEY are our own keys. `classes` are the names, none where they are not known.
    """
    arguments = network_arguments(config)
    num_classes, channels = arguments.pop("num_classes"), arguments.pop("in_chans")
    height, width = image_size(config)
    mean, std = pixel_statistics(channels)
    content: dict[str, Any] = {
        "architecture": f"{_entry_point(config)}.{HUB_TAG}",
        "num_classes": num_classes,
        "num_features": config.MODEL.GMA.EMBEDDING_DIMS[-1],
        "global_pool": "avg",
        "model_args": {"in_chans": channels, **{k: v for k, v in arguments.items() if k not in TRAINING_ONLY}},
        "pretrained_cfg": {
            "input_size": [channels, height, width],
            "interpolation": config.DATA.INTERPOLATION.replace("random", "bicubic"),
            # Without a crop, timm's 'squash' resizes straight to the square, as TEST.CROP False does.
            "crop_pct": CROP_RATIO if config.TEST.CROP else 1.0,
            "crop_mode": "center" if config.TEST.CROP else "squash",
            "mean": mean,
            "std": std,
            "num_classes": num_classes,
            "first_conv": "conv_stem.proj1",
            "classifier": "head",
            "paper_ids": "arXiv:2311.15157",
        },
        HUB_KEY: {name: value for name, value in flatten(config) if keys[name].kept_with_weights},
    }
    if len(classes) == num_classes:
        content["label_names"] = list(classes)
        words = dict(zip(classes, in_words(classes)))
        content |= {"label_descriptions": words} if list(words) != list(words.values()) else {}
    return content


def _entry_point(config: CfgNode) -> str:
    """The variant of these sizes, else any: the arguments in config.json say all that differs."""
    gma = config.MODEL.GMA
    sizes = Architecture.of(gma.EMBEDDING_DIMS, gma.SERIAL_DEPTHS, gma.MLP_RATIOS, gma.GROUP_SIZES)
    return sizes.variant or next(iter(VARIANTS))


# --------------------------------------------------------------------------------------------------------------- card
CARD = """\
---
{header}
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- groupmixformer
---
# {name}

An image classifier of {num_classes} classes: GroupMixFormer, the network of
[Advancing Vision Transformers with Group-Mix Attention](https://arxiv.org/abs/2311.15157).

| | |
|---|---|
| network | {network}, {parameters:,} parameters |
| input | {input}, {preparation}, ImageNet's mean and standard deviation |
| weights | {weights} |
| licence of the weights | {license} |
| licence of `groupmixformer.py` | MIT |

## Use

The network is no part of timm. This folder installs it:

```bash
pip install ./FOLDER  # without ./, pip would look for a package of that name
```

```python
import groupmixformer  # registers the network with timm
import timm
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or hf-hub:<user>/<repository>
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
classes = model.pretrained_cfg.get("label_names")
image = Image.open("photo.jpg").convert("{mode}")
probabilities = model(transform(image)[None]).{probabilities}
```

In GroupMixFormer's own code: `python test.py --resume FOLDER --data-path DIR`.

## Measured

{numbers}

## Data

{data}

## Training

{recipe}
"""
NOT_STORED = "Not stored with these weights."


def _as_markdown(text: str) -> str:
    """A name that people chose, shown letter by letter: it neither formats nor ends what is around it."""
    return re.sub(r"([\\`*_{}\[\]<>#|!~$&])", r"\\\1", printable(text))


def _kind(weights: Weights) -> str:
    """'raw weights' or 'ema weights', without the path, which is nobody else's business."""
    return weights.about.partition(" of ")[0]


def _numbers(source: Path, weights: Weights, config: CfgNode) -> list[str]:
    """The evaluations of these very weights in the folder of their run, and the accuracy that the run saw."""
    checkpoint, kind = weights.checkpoint, _kind(weights)
    lines = []
    if checkpoint.get("is_best") and kind.startswith(str(checkpoint.get("best_weights"))):
        number = "mAP" if config.DATA.MULTI_LABEL else "Acc@1"
        lines.append(f"{number} {checkpoint['max_accuracy']:.3f} on the run's validation images, after training.")
    rows = []
    for path in sorted(source.resolve().parent.glob("evaluation/*/metrics.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["file"] != str(source.resolve()) or not found["weights"].startswith(kind):
                continue
            low, high = found["acc1_interval"]
            on = _as_markdown(f"{Path(found['data']).name}, {found['val_set'] or 'val'}")
            numbers = f"{found['acc1']:.3f} ({low:.2f} to {high:.2f}) | {found['acc5']:.3f} | {found['nll']:.4f}"
            rows.append(f"| {on} | {found['image_size']} | {found['counted']:,} | {numbers} | {found['ece']:.4f} |")
        except (OSError, ValueError, KeyError, TypeError):  # of another task, or not whole
            continue
    if rows:
        header = "| data | size | images | Acc@1 (95 % interval) | Acc@5 | NLL | calibration error |"
        lines += [*([""] if lines else []), header, "|---|---|---|---|---|---|---|", *rows]
    return lines or [NOT_STORED]


def _data(weights: Weights, description: Mapping[str, Any]) -> str:
    stored = stored_config(weights.checkpoint) or {}
    folder = Path(str(stored.get("DATA.DATA_PATH", ""))).name
    folder, names = printable(folder).replace("`", "'"), list(map(_as_markdown, description.get("label_names", [])))
    lines = [f"Trained on a folder called `{folder}`."] * bool(folder)
    if start := printable(Path(str(stored.get("MODEL.PRETRAINED", ""))).name).replace("`", "'"):
        lines.append(f"Training started from other weights, a file called `{start}`.")
    lines += [f"Classes, in order: {list_names(names, 20)}."] * bool(names)
    return "\n".join(lines) or NOT_STORED


def _recipe(weights: Weights, keys: Mapping[str, Key]) -> str:
    stored = stored_config(weights.checkpoint)
    if not stored:
        return NOT_STORED
    progress = {name: weights.checkpoint.get(name) for name in ("epoch", "num_updates", "global_batch")}
    done = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in progress.items() if value is not None)
    recipe = {name: value for name, value in stored.items() if name in keys and keys[name].scope == "recipe"}
    recipe = {name: value for name, value in recipe.items() if keys[name].kind != "file"}
    text = yaml.safe_dump(recipe, default_flow_style=None, sort_keys=False, width=1000)
    return f"{done}.\n\n```yaml\n{text}```"
