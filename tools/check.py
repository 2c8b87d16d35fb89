"""Inspect a data set before a long run: every file is read, hashed and decoded as training would decode it.

    python -m tools.check --data-path DIR [--dataset imagenet_21k] [--zip] [--workers N] [--strict]
                         [--report FILE] [--manifest FILE] [--json FILE]

Exit status: 0 nothing that would harm training or evaluation, 1 something would (with --strict: anything found at all),
2 wrong use. The report lists errors first, then warnings, then what is merely unusual; `--report` and `--json` hold
every line of it (`--json -`: to standard output, and the report to standard error). The manifest has one line per
image, sorted by path: path, size in bytes, SHA-256, class index, with tabs between. The fingerprint printed at the end
is a hash of the manifest: same fingerprint, same data.
"""

import argparse
import hashlib
import json
import os
import signal
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configs import SPLIT_NAMES, UserError
from configs.commands import CommandParser, command
from data.loaders import available_cores

from .inspection import inspect_all
from .listing import File, Problem, Split, list_folders, list_zips

ERROR, WARNING, NOTE = "error", "warning", "note"
LEVEL_TITLES = {
    ERROR: "ERRORS: these harm training or evaluation",
    WARNING: "WARNINGS",
    NOTE: "UNUSUAL, for information",
}

# kind -> (level, what it means), in the order of the report
KINDS = {
    "split": (ERROR, "split missing or misnamed"),
    "no-classes": (ERROR, "split without classes"),
    "class": (ERROR, "class in one split only"),
    "empty-class": (ERROR, "class without images"),
    "map-line": (ERROR, "line of a map file that is wrong"),
    "unread-image": (ERROR, "image that training does not read"),
    "broken-link": (ERROR, "symbolic link to nothing"),
    "link-loop": (ERROR, "symbolic link that leads back"),
    "unreadable": (ERROR, "file or folder that cannot be read"),
    "special-file": (ERROR, "pipe, socket or device"),
    "zero-byte": (ERROR, "empty file"),
    "text": (ERROR, "text instead of an image"),
    "header-only": (ERROR, "header without pixels"),
    "truncated": (ERROR, "image that ends too early"),
    "corrupt": (ERROR, "file that does not decode"),
    "bomb": (ERROR, "file that decodes to too much"),
    "crash": (ERROR, "file that ends or blocks the process that decodes it"),
    "train-and-val": (ERROR, "file that is in both train and val"),
    "duplicate": (WARNING, "file that occurs twice in a split"),
    "hidden": (WARNING, "hidden file or folder"),
    "not-image": (WARNING, "file that is no image; training does not read it"),
    "extra": (WARNING, "folder or zip file that belongs to no split"),
    "unlisted": (WARNING, "file in the zip that the map does not name"),
    "large": (WARNING, "image of very many pixels"),
    "cmyk": (NOTE, "CMYK"),
    "deep": (NOTE, "more than 8 bits per channel"),
    "palette": (NOTE, "palette"),
    "alpha": (NOTE, "alpha channel or transparent colour, which training drops"),
    "exif-orientation": (NOTE, "EXIF orientation, which training ignores"),
    "other-format": (NOTE, "format other than the suffix says"),
}
LINES_PER_KIND = 10  # on the console


@dataclass
class Report:
    """The result of a check; `problems` are in the order of the report."""

    data_path: str
    dataset: str
    zipped: bool
    splits: dict[str, Split]
    modes: dict[str, int]  # number of images of each of Pillow's modes
    problems: list[Problem]
    manifest: str
    fingerprint: str

    def count(self, level: str) -> int:
        return sum(KINDS[problem.kind][0] == level for problem in self.problems)

    def exit_code(self, strict: bool) -> int:
        return int(bool(self.problems if strict else self.count(ERROR)))


# ------------------------------------------------------------------------------------------------------------ the check


def check_data_set(
    data_path: str, dataset: str = "imagenet", zipped: bool = False, workers: int | None = None
) -> Report:
    """Inspect the data set below `data_path`, in as many processes as there are cores unless `workers` says otherwise.

    The report does not depend on the number of processes. Raises UserError where the folder is not there.
    """
    root = Path(data_path)
    if not root.is_dir():
        raise UserError(f"--data-path {data_path}: no such folder")
    listing = (list_zips if zipped else list_folders)(root, dataset)
    files, problems = listing.files, listing.problems
    sizes = np.full(len(files), -1, np.int64)
    digests = np.zeros((len(files), 32), np.uint8)
    is_hashed, is_sound = np.zeros(len(files), bool), np.zeros(len(files), bool)
    modes: Counter[str] = Counter()
    with tqdm(total=len(files), desc="inspecting", unit="file", disable=None) as progress:
        for index, (size, digest, mode, findings) in inspect_all(root, listing, workers or available_cores()):
            sizes[index] = size
            if digest:
                digests[index] = np.frombuffer(digest, np.uint8)
                is_hashed[index] = True
            if mode:
                is_sound[index] = True
                modes[mode] += 1
            problems += [Problem(kind, files[index].path, reason) for kind, reason in findings]
            progress.update()

    by_path = sorted((i for i, file in enumerate(files) if file.label is not None), key=lambda i: files[i])
    problems += _repeated(files, digests, np.array([i for i in by_path if is_sound[i]], np.int64))
    for i in by_path:
        listing.splits[files[i].split].num_bytes += max(0, int(sizes[i]))
    manifest = "".join(
        f"{_printable(files[i].path)}\t{sizes[i] if sizes[i] >= 0 else '-'}"
        f"\t{digests[i].tobytes().hex() if is_hashed[i] else '-'}\t{files[i].label}\n"
        for i in by_path
    )
    order = {kind: position for position, kind in enumerate(KINDS)}
    return Report(
        data_path=data_path,
        dataset=dataset,
        zipped=zipped,
        splits=listing.splits,
        modes=dict(sorted(modes.items())),
        problems=sorted(problems, key=lambda problem: (order[problem.kind], problem.path, problem.reason)),
        manifest=manifest,
        fingerprint=hashlib.sha256(manifest.encode()).hexdigest()[:16],
    )


def _repeated(files: list[File], digests: np.ndarray, candidates: np.ndarray) -> Iterator[Problem]:
    """Problems of files with the same content. `candidates` are the indices of the sound images, sorted by path."""
    if not len(candidates):
        return
    keys = digests[candidates].view(np.uint64)
    order = np.lexsort(keys.T)  # stable: equal ones stay sorted by path
    is_first = np.append(True, (keys[order][1:] != keys[order][:-1]).any(axis=1))
    starts = np.flatnonzero(is_first)
    lengths = np.diff(np.append(starts, len(order)))
    for start, length in zip(starts[lengths > 1], lengths[lengths > 1]):
        group = [files[i] for i in candidates[order[start : start + length]]]
        by_split: defaultdict[str, list[File]] = defaultdict(list)
        for file in group:
            by_split[file.split].append(file)
        train, val = by_split["train"], by_split["val"]
        pairs = [("train-and-val", file, train[0]) for file in val if train]
        pairs += [("duplicate", file, train[0]) for file in train[1:]]
        pairs += [("duplicate", file, val[0]) for file in val[1:] if not train]
        for kind, file, first in pairs:
            if file.path != first.path:  # a map may name a member twice
                label = "" if file.label == first.label else f", but class {file.label} instead of {first.label}"
                yield Problem(kind, file.path, f"same content as {first.path}{label}")


# ------------------------------------------------------------------------------------------------------------ reporting


def format_report(report: Report, strict: bool, lines_per_kind: int | None = None) -> str:
    """The report as text, each problem in one line; no more than `lines_per_kind` of a kind, where that is given."""
    lines = []
    for level, title in LEVEL_TITLES.items():
        found: dict[str, list[Problem]] = defaultdict(list)
        for problem in report.problems:
            if KINDS[problem.kind][0] == level:
                found[problem.kind].append(problem)
        if not found:
            continue
        lines += [title]
        for kind, problems in found.items():
            lines += [f"  {kind}: {KINDS[kind][1]} ({len(problems):,})"]
            shown = problems[:lines_per_kind]
            lines += [f"    {_printable(problem.path)}: {_printable(problem.reason)}" for problem in shown]
            if len(problems) > len(shown):
                lines += [f"    and {len(problems) - len(shown):,} more"]
        lines += [""]
    form = "zip files" if report.zipped else "folders"
    lines += [f"data set     {_printable(report.data_path)} ({report.dataset}, {form})"]
    for split, content in report.splits.items():
        lines += [f"{split:12} {_describe(content)}"]
    if report.modes:
        lines += [f"modes        {', '.join(f'{mode} {count:,}' for mode, count in report.modes.items())}"]
    lines += [f"fingerprint  {report.fingerprint} (of the manifest: paths, sizes, SHA-256, classes)"]
    counts = ", ".join(f"{report.count(level):,} {level}s" for level in LEVEL_TITLES)
    verdict = "do not train on it as it is" if report.exit_code(strict) else "ready"
    return "\n".join([*lines, f"result       {counts}: {verdict}", ""])


def _describe(split: Split) -> str:
    sizes = split.class_sizes or [0]
    return (
        f"{sum(sizes):,} images of {len(split.classes):,} classes, {split.num_bytes / 2**20:,.1f} MiB; "
        f"class size {min(sizes):,} / {statistics.median(sizes):,g} / {max(sizes):,} (minimum / median / maximum); "
        f"paths and classes {split.fingerprint[:16]}"
    )


def format_json(report: Report, strict: bool) -> str:
    """Everything that the report says, for programs."""
    content = {
        "data_path": report.data_path,
        "dataset": report.dataset,
        "zip": report.zipped,
        "exit_code": report.exit_code(strict),
        "fingerprint": report.fingerprint,
        "counts": {level: report.count(level) for level in LEVEL_TITLES},
        "splits": {
            split: {
                "name": content.name,
                "images": sum(content.class_sizes),
                "bytes": content.num_bytes,
                "classes": dict(zip(content.classes, content.class_sizes)),
                "class_size_min": min(content.class_sizes, default=0),
                "class_size_median": statistics.median(content.class_sizes or [0]),
                "class_size_max": max(content.class_sizes, default=0),
                "fingerprint": content.fingerprint,
            }
            for split, content in report.splits.items()
        },
        "modes": report.modes,
        "problems": [
            {"level": KINDS[kind][0], "kind": kind, "meaning": KINDS[kind][1], "path": path, "reason": reason}
            for kind, path, reason in report.problems
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def _printable(text: str) -> str:
    """One line without control characters, so that a file's name can neither fake a line nor steer the terminal."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(c if c.isprintable() and c != "\\" else ascii(c)[1:-1] for c in text)


# --------------------------------------------------------------------------------------------------------- command line


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser("tools.check", __doc__)
    parser.add_argument("--data-path", required=True, metavar="DIR", help="folder that holds the splits")
    parser.add_argument("--dataset", choices=tuple(SPLIT_NAMES), default="imagenet", help="decides the splits' names")
    parser.add_argument("--zip", action="store_true", help="check train.zip and val.zip instead of folders")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings and unusual images too")
    parser.add_argument("--report", metavar="FILE", help="write the report here too, with every line")
    parser.add_argument("--manifest", metavar="FILE", help="write path, size, SHA-256 and class index of every image")
    parser.add_argument("--json", metavar="FILE", help="write the report for programs; - is standard output")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: at least 1")
    for name in (args.report, args.manifest, args.json):
        # Found out now rather than after an hour.
        if name not in (None, "-") and (Path(name).is_dir() or not _is_writable(Path(name))):
            raise UserError(f"{name}: cannot be written: a folder, or in none that exists and may be written to")
    return args


def _is_writable(path: Path) -> bool:
    return os.access(path if path.exists() else path.absolute().parent, os.W_OK)


@command("tools.check")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit status. `argv` are the arguments without the program's name."""
    try:
        args = _parse(argv)
        report = check_data_set(args.data_path, args.dataset, args.zip, args.workers)
        console = sys.stderr if args.json == "-" else sys.stdout
        console.write(format_report(report, args.strict, LINES_PER_KIND))
        if args.report is not None:
            _write(args.report, format_report(report, args.strict))
        if args.json == "-":
            sys.stdout.write(format_json(report, args.strict))
        elif args.json is not None:
            _write(args.json, format_json(report, args.strict))
        if args.manifest is not None:
            _write(args.manifest, report.manifest)
    except OSError as error:  # a folder that vanished meanwhile
        print(f"tools.check: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tools.check: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return report.exit_code(args.strict)


def _write(name: str, text: str) -> None:
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{name}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main())
