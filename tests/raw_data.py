"""Small data sets in the forms that people get them in: ImageNet's archives, Kaggle's folders, Parquet shards."""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from image_data import encoded
from PIL import Image

WNIDS = ("n01440764", "n01443537", "n01484850")
TRAIN, VAL = 4, 5  # images: of each class; in all
# As in the real kit, the numbers of the classes do not follow their names.
CLASS_NUMBERS = {"n01440764": 2, "n01443537": 3, "n01484850": 1}
VAL_NUMBERS = (3, 1, 2, 2, 1)


def jpeg(number: int) -> bytes:
    rng = np.random.default_rng(number)
    return encoded(Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)), "JPEG")


def train_images() -> dict[str, bytes]:
    """{'<class>/<file>': image}."""
    names = [f"{wnid}/{wnid}_{number}.JPEG" for wnid in WNIDS for number in range(TRAIN)]
    return {name: jpeg(i) for i, name in enumerate(names)}


def val_images() -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(100 + i) for i in range(1, VAL + 1)}


def labelled_val_images() -> dict[str, bytes]:
    wnid_of = {number: wnid for wnid, number in CLASS_NUMBERS.items()}
    return {f"{wnid_of[n]}/{name}": image for n, (name, image) in zip(VAL_NUMBERS, val_images().items())}


def tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_kit(root: Path, counts: Sequence[int] = (TRAIN,) * 3, archive: bool = True) -> Path:
    """The development kit: meta.mat as MATLAB keeps it, with a group of classes behind the classes."""
    from scipy.io import savemat

    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O"), ("num_train_images", "O")]
    rows = [(float(CLASS_NUMBERS[w]), w, "fish", 0.0, float(n)) for w, n in zip(WNIDS, counts)]
    rows = [*sorted(rows), (4.0, "n02512053", "all fish", 3.0, 0.0)]
    synsets = np.empty((len(rows), 1), dtype=fields)
    for number, row in enumerate(rows):
        synsets[number, 0] = row
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets})
    files = {
        "ILSVRC2012_devkit_t12/data/meta.mat": buffer.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "".join(
            f"{number}\n" for number in VAL_NUMBERS
        ).encode(),
    }
    if archive:
        with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as packed:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                packed.addfile(member, io.BytesIO(content))
        return root / "ILSVRC2012_devkit_t12.tar.gz"
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root / "ILSVRC2012_devkit_t12"


def write_tars(root: Path) -> Path:
    """What image-net.org gives: an archive of archives, a flat one, and the kit."""
    root.mkdir()
    images = train_images()
    of_class = {w: {n.split("/")[1]: c for n, c in images.items() if n.startswith(w)} for w in WNIDS}
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar({f"{w}.tar": tar(of_class[w]) for w in WNIDS}))
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(val_images()))
    write_kit(root)
    return root


def write_kaggle(root: Path) -> Path:
    """What Kaggle gives: class folders to train, a flat folder to validate, tables."""
    folder = root / "ILSVRC" / "Data" / "CLS-LOC"
    images = {f"train/{name}": image for name, image in train_images().items()}
    images |= {f"val/{name}": image for name, image in val_images().items()}
    for name, image in images.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(image)
    lists = root / "ILSVRC" / "ImageSets" / "CLS-LOC"
    lists.mkdir(parents=True)
    lines = [f"{name.removesuffix('.JPEG')} {number}\n" for number, name in enumerate(train_images())]
    (lists / "train_cls.txt").write_text("".join(lines))
    pairs = [name.removesuffix(".JPEG").split("/") for name in labelled_val_images()]
    rows = [f"{image},{wnid} 1 2 30 31 " for wnid, image in pairs]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]) + "\n")
    return root


def write_shard(path: Path, rows: Sequence[tuple[bytes, str | None, int]], names: Sequence[str] = ()) -> None:
    """A Parquet file of (image bytes, path, label), with the names of the classes as Hugging Face's hub stores them."""
    import pyarrow
    import pyarrow.parquet

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", image), ("label", pyarrow.int64())])
    if names:
        label = {"names": list(names), "_type": "ClassLabel"}
        info = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
        schema = schema.with_metadata({"huggingface": json.dumps(info)})
    images = [{"bytes": content, "path": name} for content, name, _ in rows]
    table = pyarrow.table({"image": images, "label": [label for *_, label in rows]}, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)


def write_shards(root: Path) -> Path:
    """ImageNet as the hub has it: two shards to train, one to validate; the class stands in the names of the images."""

    def row(name: str, content: bytes) -> tuple[bytes, str, int]:
        wnid, file = name.split("/")
        return content, file.replace(".JPEG", f"_{wnid}.JPEG"), WNIDS.index(wnid)

    train = [row(*item) for item in train_images().items()]
    names = ("tench", "goldfish", "great white shark, white shark")
    write_shard(root / "data" / "train-00000-of-00002.parquet", train[::2], names)
    write_shard(root / "data" / "train-00001-of-00002.parquet", train[1::2], names)
    val = [row(*item) for item in labelled_val_images().items()]
    write_shard(root / "data" / "validation-00000-of-00001.parquet", val, names)
    return root


def write_class_folders(root: Path) -> Path:
    for name, image in train_images().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image)
    return root


def content_of(root: Path) -> dict[str, bytes]:
    """{relative path: content} of all files below a folder; links are followed."""
    files = (Path(folder) / name for folder, _, names in os.walk(root, followlinks=True) for name in names)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
