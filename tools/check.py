"""Inspect a data set before a long run: python -m tools.check --data-path DIR [--zip] [--json FILE] [--strict]

The splits are opened, and every image is read and decoded, as training does it, on all cores. The report names what is
missing, misnamed, empty, damaged, or stored twice, above all in both train and val. Exit status: 0 nothing that harms
training or evaluation; 1 something does (with --strict: anything was found); 2 wrong use.

With --cfg FILE of a detector or segmenter, its data are checked: annotations or masks, and the images. With one of a
classifier, there must be images enough for an update; if it sets DATA.VAL_SHARE, a folder without validation images is
checked in the two parts that training makes of it.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader
from tqdm import tqdm

from configs import SPLIT_NAMES, UserError, read_config, with_values
from configs.commands import CommandParser, command
from configs.errors import first_line, one_line
from configs.text import printable
from data.decoding import decode_image, lost_content
from data.files import IMAGE_FORMATS, class_folders, files_below, is_image_name, loose_files
from data.holdout import has_validation, open_parts
from data.sources import MAX_MEMBER_BYTES, FolderSource, Source, ZipSource, count_images, fingerprint
from data.splits import one_level_too_many, open_source, with_classes, without_images
from data.workers import available_cores, set_parent_death_signal
from tasks import TASKS, keys_of
from tasks.problems import ERROR, WARNING, Problem
from utils.schedule import global_batch_size
from utils.shortages import named_shortages

# kind -> (level, what it means), in the order of the report
KINDS = {
    "split": (ERROR, "split that training cannot open"),
    "classes": (ERROR, "val has classes that train has not"),
    "unreadable": (ERROR, "file that cannot be read"),
    "empty": (ERROR, "empty file"),
    "damaged": (ERROR, "file that does not decode"),
    "bomb": (ERROR, "file that decodes to too much"),
    "few-images": (ERROR, "fewer training images than one update takes"),
    "train-and-val": (ERROR, "image that is in both train and val"),
    "nearly-constant": (WARNING, "image that comes out nearly constant, though its file is not"),
    "levels": (WARNING, "folders that may be one level too deep"),
    "class-not-in-val": (WARNING, "classes without validation images"),
    "unread-image": (WARNING, "image that training does not read"),
    "duplicate": (WARNING, "image that is in a split twice"),
    "misnamed": (WARNING, "image of another format than its suffix says; training reads it"),
    "not-image": (WARNING, "file that is no image; training does not read it"),
}
LINES_PER_KIND = 10  # on the console
FILES_PER_TASK = 16
SECONDS_PER_TASK = 600  # then a decoder is stuck


class Inspection(NamedTuple):
    """The result for one image. `digest` is empty if it does not decode."""

    digest: bytes = b""  # 16 bytes of its SHA-256
    problem: tuple[str, str] | None = None  # kind and reason


@dataclass
class Report:
    """The result of a check; `problems` are in the order of the report."""

    data_path: str
    splits: dict[str, Source]
    problems: list[Problem] = field(default_factory=list)
    kinds: Mapping[str, tuple[str, str]] = field(default_factory=lambda: KINDS)

    def count(self, level: str) -> int:
        return sum(self.kinds[problem.kind][0] == level for problem in self.problems)

    def exit_code(self, strict: bool) -> int:
        return int(bool(self.problems if strict else self.count(ERROR)))


# ------------------------------------------------------------------------------------------------------------ the check
def check_data_set(
    data_path: str, dataset: str, zipped: bool, workers: int, val_share: float = 0, images_per_update: int = 1
) -> Report:
    """Inspect both splits of the data set below `data_path` in `workers` processes.

    With `val_share`, DATA.VAL_SHARE, they are parts of the training images where there are no others. The report does
    not depend on the number of processes. Raises UserError if the folder does not exist.
    """
    if not Path(data_path).is_dir():
        raise UserError(f"--data-path {data_path}: no such folder")
    report = Report(data_path, {})
    problems, digests = report.problems, {}
    parts = val_share > 0 and not has_validation(data_path, dataset, zipped)
    names = {split: name for split, name in SPLIT_NAMES[dataset].items() if split == "train" or not parts}
    for split, name in names.items():
        try:
            if parts:
                report.splits = open_parts(data_path, dataset, val_share, zipped)
            else:
                report.splits[split] = open_source(data_path, dataset, split, zipped, "no", 0, 1)
        except UserError as error:
            problems.append(Problem("split", f"{name}{'.zip' * zipped}", error.one_line()))
    problems += _match_classes(report)
    if "train" in report.splits and (images := len(report.splits["train"].samples)) < images_per_update:
        few = f"{images} images, and an update takes {images_per_update}"
        flags = f"--opts DATA.BATCH_SIZE {max(1, images // 3)}"
        problems.append(Problem("few-images", names["train"], f"{few}: add {flags} (docs/fine-tuning.md)"))
    for split, source in report.splits.items():
        if split in names and (odd := one_level_too_many(source)):
            problems.append(Problem("levels", SPLIT_NAMES[dataset][split], odd))
        digests[split] = np.zeros(len(source.samples), "S16")
        inspected = tqdm(inspect_all(source, workers), split, len(source.samples), unit="image", disable=None)
        index = -1
        try:
            for index, found in enumerate(inspected):
                digests[split][index] = found.digest
                if found.problem:
                    kind, reason = found.problem
                    problems.append(Problem(kind, _name(source, source.samples[index][0]), reason))
        except RuntimeError as error:
            where = _name(source, source.samples[index + 1][0])
            raise UserError(
                f"{where}, or an image soon after it, ends or blocks the process that decodes it: {first_line(error)}"
            ) from None
        if isinstance(source, FolderSource) and split in names:
            problems += _not_read(source)
    problems += _repeated(report.splits, digests)
    order = list(KINDS)
    problems.sort(key=lambda problem: (order.index(problem.kind), problem.path, problem.reason))
    return report


def _match_classes(report: Report) -> Iterator[Problem]:
    """Give the validation images the class indices of the training images, as training does."""
    if len(report.splits) < 2:
        return
    try:
        report.splits["val"] = with_classes(report.splits["val"], report.splits["train"].classes, report.data_path)
    except UserError as error:
        yield Problem("classes", ".", error.one_line())
        return
    if few := without_images(report.splits["val"]):
        yield Problem("class-not-in-val", ".", few)


def _name(source: Source, path: str) -> str:
    """The path of a file of this source below the data path."""
    if isinstance(source, ZipSource):
        return f"{source.path.name}/{path}"
    return source.root.name + path.removeprefix(str(source.root))


def _not_read(source: FolderSource) -> Iterator[Problem]:
    """The files of a split that training passes over, without companions."""
    others = [(path, "in no class folder") for path in loose_files(source.root)]
    for name in class_folders(source.root):
        files = files_below(source.root / name, source.root)
        others += ((path, "another suffix than an image has") for path in files if not is_image_name(path))
    for path, why in others:
        if no_file := _why_no_file(Path(path)):
            yield Problem("unreadable", _name(source, path), no_file)
            continue
        try:
            Image.open(path, formats=IMAGE_FORMATS).close()
            kind = "unread-image"
        except Exception:  # Pillow raises nearly anything on files that are no images
            kind = "not-image"
        yield Problem(kind, _name(source, path), why)


def _why_no_file(path: Path) -> str:
    """Why a path is no regular file, '' if it is one. Reading anything else may never end."""
    if path.is_file():
        return ""
    return "not a regular file" if path.exists() else "a link to nothing, or a file that is gone"


def _repeated(sources: dict[str, Source], digests: dict[str, np.ndarray]) -> Iterator[Problem]:
    """Images with the same bytes. Each is compared to the first of its kind, which is in train if any is."""
    if not digests:
        return
    every = np.concatenate(list(digests.values()))
    starts = np.cumsum([0, *map(len, digests.values())])
    splits = list(digests)

    def locate(position: int) -> tuple[str, str, str]:
        """Split, name and class of an image."""
        number = int(np.searchsorted(starts, position, "right")) - 1
        source = sources[splits[number]]
        path, label = source.samples[int(position - starts[number])]
        return splits[number], _name(source, path), source.classes[label]

    _, group, counts = np.unique(every, return_inverse=True, return_counts=True)
    first: dict[int, int] = {}
    for position in np.flatnonzero((counts[group] > 1) & (every != b"")):
        original = first.setdefault(group[position], position)
        if position != original:
            (split, name, label), (first_split, first_name, first_label) = locate(position), locate(original)
            reason = f"same content as {first_name}"
            reason += f", but class {label} instead of {first_label}" if label != first_label else ""
            yield Problem("duplicate" if split == first_split else "train-and-val", name, reason)


# ------------------------------------------------------------------------------------------------- inspecting one image
def inspect(source: Source, index: int) -> Inspection:
    """Read, hash and decode one image. It never raises: what goes wrong is in the result."""
    path = Path(source.samples[index][0])
    if isinstance(source, FolderSource):
        if no_file := _why_no_file(path):
            return Inspection(problem=("unreadable", no_file))
        if path.stat().st_size > MAX_MEMBER_BYTES:
            return Inspection(problem=("bomb", f"{path.stat().st_size:,} bytes, more than {MAX_MEMBER_BYTES:,}"))
    try:
        encoded = source.read(index)
    except OSError as error:
        return Inspection(problem=("unreadable", one_line(error)))
    except Exception as error:  # damaged or encrypted members of zip files
        return Inspection(problem=("damaged", one_line(error)))
    if not encoded:
        return Inspection(problem=("empty", "0 bytes"))
    try:
        with Image.open(BytesIO(encoded), formats=IMAGE_FORMATS) as header:
            form = header.format or ""
        decode_image(encoded)
        lost = lost_content(encoded)
    except Image.DecompressionBombError as error:
        return Inspection(problem=("bomb", one_line(error)))
    except UnidentifiedImageError:
        return Inspection(problem=("damaged", f"not an image: begins {encoded[:24]!r}"))
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        return Inspection(problem=("damaged", one_line(error)))
    form = "JPEG" if form == "MPO" else form  # what cameras write: a JPEG, and more after it
    expected = Image.registered_extensions().get(path.suffix.lower(), form)
    problem = None if form == expected else ("misnamed", f"{form}, not {expected}")
    problem = ("nearly-constant", lost) if lost else problem
    return Inspection(hashlib.sha256(encoded).digest()[:16], problem)


# ------------------------------------------------------------------------------------------------ inspecting all images
def inspect_all(source: Source, workers: int) -> Iterator[Inspection]:
    """Inspect the images of a source in `workers` processes, in order. RuntimeError where one is lost or stuck."""
    loader = DataLoader(
        range(len(source.samples)),
        batch_size=FILES_PER_TASK,
        collate_fn=lambda indices: [inspect(source, index) for index in indices],
        num_workers=workers,
        worker_init_fn=_start_worker,
        timeout=SECONDS_PER_TASK,
        multiprocessing_context="fork",  # shares the source, which may be gigabytes, instead of copying it
    )
    with named_shortages("lower --workers"):
        for found in loader:
            yield from found


def _start_worker(worker_id: int) -> None:
    set_parent_death_signal(signal.SIGKILL)  # or it would outlive a check that is killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # libtiff and others report every damaged file there


# ------------------------------------------------------------------------------------------------------------ reporting
def format_report(report: Report, strict: bool) -> str:
    """The report as text, errors first, each problem in one line, at most LINES_PER_KIND of a kind."""
    found: dict[str, list[Problem]] = defaultdict(list)
    for problem in report.problems:
        found[problem.kind].append(problem)
    lines = []
    for kind, problems in found.items():
        level, meaning = report.kinds[kind]
        lines.append(f"{level}: {kind}: {meaning} ({len(problems):,})")
        lines += [
            f"    {printable(problem.path)}: {printable(problem.reason)}" for problem in problems[:LINES_PER_KIND]
        ]
        if len(problems) > LINES_PER_KIND:
            lines.append(f"    and {len(problems) - LINES_PER_KIND:,} more; --json FILE names all")
    for split, source in report.splits.items():
        sizes = count_images(source)
        if source.left_out:
            lines.append(f"{split:8} left out: {source.left_out}")
        lines.append(
            f"{split:8} {sum(sizes):,} images of {len(sizes):,} classes, {min(sizes):,} to {max(sizes):,} a class"
        )
    verdict = "usable, with what the warnings say" if report.problems else "ready"
    verdict = "do not train on it as it is" if report.exit_code(strict) else verdict
    return "\n".join(
        [*lines, f"result   {report.count(ERROR):,} errors, {report.count(WARNING):,} warnings: {verdict}", ""]
    )


def format_json(report: Report, strict: bool) -> str:
    """The whole report, for programs. `fingerprint` is what training notes in its checkpoints."""
    content = {
        "data_path": report.data_path,
        "exit_code": report.exit_code(strict),
        "counts": {level: report.count(level) for level in (ERROR, WARNING)},
        "splits": {
            split: {"classes": dict(zip(source.classes, count_images(source))), "fingerprint": fingerprint(source)}
            for split, source in report.splits.items()
        },
        "problems": [{"level": report.kinds[problem.kind][0], **problem._asdict()} for problem in report.problems],
    }
    return json.dumps(content, indent=1) + "\n"


# --------------------------------------------------------------------------------------------------------- command line
def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("tools.check", __doc__)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="folder that holds the splits")
    parser.add_argument(
        "--cfg", nargs="+", metavar="FILE", help="YAML files of the run; default: classification, with two splits"
    )
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="with --cfg: set configuration keys")
    parser.add_argument("--dataset", choices=tuple(SPLIT_NAMES), default="imagenet", help="decides the splits' names")
    parser.add_argument("--zip", action="store_true", help="check train.zip and val.zip instead of folders")
    parser.add_argument("--workers", type=int, default=available_cores(), metavar="N", help="processes, one per core")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings too")
    parser.add_argument("--json", metavar="FILE", help="write the report for programs; - is standard output")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    if args.json not in (None, "-") and not os.access(Path(args.json).absolute().parent, os.W_OK):
        raise UserError(f"--json {args.json}: cannot be written: no folder that may be written to")  # not after an hour
    return args


def _check(args: argparse.Namespace) -> Report:
    """The report of images in class folders, or of another task that --cfg configures, by its module `check`."""
    share, images_per_update = 0.0, 1
    if args.cfg:
        opts = ["--opts", *args.opts] if args.opts else []
        config = read_config(["--cfg", *args.cfg, "--data-path", args.data_path, *opts], keys_of)
        if config.TASK != "classification":
            task = import_module(f"{TASKS[config.TASK]}.check")
            problems = task.check(with_values(config, {"DATA.NUM_WORKERS": args.workers}))
            return Report(args.data_path, {}, problems, task.KINDS)
        share, images_per_update = config.DATA.VAL_SHARE, global_batch_size(config, world_size=1)
    return check_data_set(args.data_path, args.dataset, args.zip, args.workers, share, images_per_update)


@command("tools.check")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit status. `argv` are the arguments without the program's name."""
    args = _parse(argv)
    try:
        report = _check(args)
    except KeyboardInterrupt:
        print("tools.check: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    (sys.stderr if args.json == "-" else sys.stdout).write(format_report(report, args.strict))
    if args.json == "-":
        sys.stdout.write(format_json(report, args.strict))
    elif args.json is not None:
        try:
            Path(args.json).write_text(format_json(report, args.strict), encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot be written: {error.strerror}") from None
    return report.exit_code(args.strict)


if __name__ == "__main__":
    sys.exit(main())
