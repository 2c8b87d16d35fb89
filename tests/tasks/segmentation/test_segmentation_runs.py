"""Runs of train.py and test.py on segmentation: continued runs, any number of processes, what is written."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from image_data import message_of
from PIL import Image
from ranks import run_ranks, train_in_fork
from segmentation_data import CARD, CLASSES, SMALL, small_config, write_folder

import tasks
import train
from configs import UserError
from tasks.segmentation import inference
from tasks.segmentation.evaluation import folder_name
from tasks.segmentation.weights import load_segmenter
from utils.checkpoint import load_file
from utils.session import run_script, start_session


def arguments(data: Path, output: Path, *opts: str, flags: tuple[str, ...] = ()) -> list[str]:
    paths = ["--cfg", CARD, "--data-path", str(data), "--output", str(output), "--tag", "run"]
    return [*paths, *flags, "--opts", *SMALL, *opts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("segmentation") / "shapes")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    """The run folder of a short training."""
    output = tmp_path_factory.mktemp("trained")
    status, log = train_in_fork(arguments(folder, output))
    assert status == 0, log
    return runs.run_folder(output)


def test_a_run_validates_keeps_the_best_and_knows_its_classes(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    numbers = [line[name] for line in lines for name in ("miou_raw", "miou_ema")]
    best = load_file(trained / "ckpt_best.pth")
    assert best["max_accuracy"] == max(numbers) and lines[0]["decides"] == "miou"
    assert best["classes"] == list(CLASSES)
    assert {"mean_acc_raw", "pixel_acc_ema", "train_main", "train_auxiliary"} <= set(lines[0])
    # The parts of the loss: the auxiliary head's is weighted by 0.4.
    for line in lines:
        assert line["train_loss"] == pytest.approx(line["train_main"] + 0.4 * line["train_auxiliary"], rel=1e-5)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_stopped_and_continued_run_ends_with_the_same_bits(folder, tmp_path, processes):
    batch = ("DATA.BATCH_SIZE", "3") if processes == 1 else ("MODEL.HEAD", "semantic_fpn", "DATA.BATCH_SIZE", "1")

    def run(name: str, stop_at: int) -> Path:
        ended = run_ranks(
            __file__, arguments(folder, tmp_path / name, *batch), processes, {"STOP_AT": str(stop_at)}
        )  # this file is the script that is started
        assert ended.codes == [75 if stop_at else 0] * processes, ended.stderr
        return runs.run_folder(tmp_path / name)

    straight = run("straight", 0)
    stopped = run("stopped", 3)
    assert list(stopped.glob("ckpt_epoch_*_update_*.pth"))
    run("stopped", 0)
    for name in ("ckpt_epoch_1.pth", "ckpt_best.pth"):
        assert runs.digest(stopped / name) == runs.digest(straight / name)


@pytest.mark.launch
def test_a_run_killed_in_validation_ends_with_the_same_bits(folder, trained, tmp_path):
    args = arguments(folder, tmp_path)
    # After each of two epochs, the network and its average see five images each.
    for call in (3, 13):
        status, text = train_in_fork(args, runs.kill_at_call(inference, "predict_classes", call))
        assert status == -signal.SIGKILL, text
    written = runs.run_folder(tmp_path)
    assert (written / "ckpt_epoch_0.pth").exists() and not (written / "ckpt_epoch_1.pth").exists()
    status, text = train_in_fork(args)
    assert status == 0, text
    for name in ("ckpt_epoch_1.pth", "ckpt_best.pth"):
        assert runs.digest(written / name) == runs.digest(trained / name)


def test_an_update_that_is_not_finite_changes_nothing(folder, tmp_path, monkeypatch):
    seen = []

    def action(number, network):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return (lambda loss: loss * float("nan")) if number == 2 else None

    runs.in_update(monkeypatch.setattr, action)
    assert runs.train_here(monkeypatch, arguments(folder, tmp_path)) == 0
    assert all(torch.equal(seen[2][name], seen[3][name]) for name in seen[2])
    assert any(not torch.equal(seen[3][name], seen[4][name]) for name in seen[3])


def evaluate(folder, trained, output, *opts, processes=1, flags=()):
    """Run test.py to its end; returns the folder that it wrote."""
    weights = ("--resume", str(trained / "ckpt_best.pth"), *flags)
    ended = run_ranks("test.py", arguments(folder, output, *opts, flags=weights), processes)
    assert ended.codes == [0] * processes, ended.stderr
    (written,) = (runs.run_folder(output) / "evaluation").iterdir()
    return written


def contents(written: Path) -> dict[str, bytes]:
    return {str(path.relative_to(written)): path.read_bytes() for path in written.rglob("*") if path.is_file()}


@pytest.mark.long
def test_numbers_have_the_same_bytes_on_any_number_of_processes(folder, trained, tmp_path):
    options = ("TEST.MODE", "slide", "TEST.SCALES", "[1.0, 1.5]", "TEST.FLIP", "True", "TEST.SAVE_MASKS", "True")
    written = [contents(evaluate(folder, trained, tmp_path / str(n), *options, processes=n)) for n in (1, 2, 3)]
    assert written[0] == written[1] == written[2]
    masks = {f"masks/{number:03d}.png" for number in range(6, 11)}
    others = {"metrics.json", "per_class.csv", "confusion.csv", "confusion.png", "images.csv", "predictions.png"}
    assert set(written[0]) == masks | others | {"report.html"}


def test_test_py_finds_what_training_validated(folder, trained, tmp_path):
    written = evaluate(folder, trained, tmp_path, "TEST.SAVE_MASKS", "True")
    metrics = json.loads((written / "metrics.json").read_text())
    best = load_file(trained / "ckpt_best.pth")
    assert metrics["miou"] == best["max_accuracy"] and metrics["images"] == 5
    # The saved masks give the same number again.
    hits = total = 0
    for path in (written / "masks").iterdir():
        true = np.asarray(Image.open(folder / "annotations" / "validation" / path.name))
        counted = true != 255
        hits += (np.asarray(Image.open(path)) == true)[counted].sum()
        total += counted.sum()
    assert metrics["pixel_acc"] == 100 * hits / total
    page = (written / "report.html").read_text()
    assert page.count("<figure>") == 10 and "<h2>Worst" in page and "<h2>Random" in page


SLIDE = ("TEST.MODE", "slide")
OWN_FOLDERS = [
    *("DATA.TRAIN_IMAGES", "a", "DATA.TRAIN_MASKS", "b"),
    *("DATA.VAL_IMAGES", "images/validation", "DATA.VAL_MASKS", "annotations/validation"),
]


@pytest.mark.parametrize(
    ("opts", "name"),
    [
        ((), "0"),
        (SLIDE, "0-slide-32x32-20x20"),
        ((*SLIDE, "TEST.WINDOW", "[32, 64]"), "0-slide-32x64-20x20"),
        ((*SLIDE, "TEST.STRIDE", "[16, 20]"), "0-slide-32x32-16x20"),
        (("TEST.ABSENT_CLASSES", "zero", "TEST.FLIP", "True"), "0-flip-absent_zero"),
        (("DATA.MAX_LONG_SIDE", "60", "AMP_OPT_LEVEL", "O1"), "0-to60-bfloat16"),
        (("TEST.WEIGHTS", "raw", "TEST.SCALES", "[1.0, 1.5]"), "raw-0-1x1.5"),
        (OWN_FOLDERS, "images_validation-annotations_validation-0"),
    ],
)
def test_evaluations_that_differ_have_names_of_their_own(folder, opts, name):
    config = small_config(*opts, flags=("--data-path", str(folder)))
    assert folder_name(config, "x/best.pth", torch.device("cpu")) == f"best-shapes-{name}"


def test_no_evaluation_overwrites_one_of_other_weights(folder, trained, tmp_path, monkeypatch):
    def evaluate_here(weights):
        given = arguments(folder, tmp_path / "out", *SLIDE, flags=("--resume", str(weights)))
        monkeypatch.setattr("sys.argv", ["test.py", *given])
        tasks.evaluate(start_session("", tasks.keys_of))

    evaluate_here(trained / "ckpt_best.pth")
    (written,) = (runs.run_folder(tmp_path / "out") / "evaluation").iterdir()
    metrics = json.loads((written / "metrics.json").read_text())
    assert metrics["window"] == [32, 32] and metrics["stride"] == [20, 20]
    other = shutil.copy(trained / "ckpt_best.pth", tmp_path)
    assert f"{written.name}: holds the evaluation of" in message_of(evaluate_here, other)


def test_pictures_get_a_class_map_and_shares(folder, trained, tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.png").write_bytes((folder / "images" / "validation" / "006.png").read_bytes())
    (pictures / "b.jpg").write_bytes(b"no image")
    for _ in range(2):  # the second time, what the first has written is no picture
        weights = ("--resume", str(trained / "ckpt_best.pth"), "--images", str(pictures))
        ended = run_ranks("test.py", arguments(folder, tmp_path / "out", flags=weights))
        assert ended.returncode == 1 and "1 of 2 pictures: see above" in ended.stdout, ended.stderr
    shares = json.loads((pictures / "a.png.classes.json").read_text())["classes"]
    assert sum(entry["share"] for entry in shares) == pytest.approx(1, abs=1e-5)
    mask = np.asarray(Image.open(pictures / "a.png.mask.png"))
    assert mask.shape == (48, 64)
    for entry in shares:
        assert CLASSES[entry["class"]] == entry["name"]
        assert (mask == entry["class"]).mean() == pytest.approx(entry["share"], abs=1e-5)
    assert Image.open(pictures / "a.png.classes.png").height >= 48


def test_sizes_and_speed(folder, tmp_path):
    target = tmp_path / "numbers.json"
    for flag in ("--flops", "--throughput"):
        ended = run_ranks("test.py", arguments(folder, tmp_path, flags=(flag, "--json", str(target))))
        assert ended.codes == [0], ended.stderr
        numbers = json.loads(target.read_text())
        assert numbers["image_size"] == [64, 96] and numbers.get("flops", 1) > 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state["classes"].pop(), "was trained on 2 classes, but the data has 3"),
        (lambda state: state.update(model={"head.weight": torch.zeros(1)}), "holds no segmentation network"),
        (lambda state: state["model"].pop("head.fuse.0.weight"), r"weights of another network.*1 missing"),
    ],
)
def test_weights_that_do_not_fit_are_named(trained, tmp_path, change, expected):
    state = load_file(trained / "ckpt_best.pth")
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=expected):
        load_segmenter(small_config("TEST.WEIGHTS", "raw"), str(tmp_path / "weights.pth"), CLASSES)


def test_settings_that_segmentation_cannot_do_are_refused():
    for key, flag in (("COMPILE", "--compile"), ("TEST.FUSE", "--fuse"), ("DATA.ZIP_MODE", "--zip")):
        with pytest.raises(UserError, match=f"{key} = True: segmentation cannot do this; leave it out"):
            small_config(flags=(flag,))


if __name__ == "__main__":
    stop_at, last = int(os.environ["STOP_AT"]), int(os.environ.get("WORLD_SIZE", "1")) - 1

    def stop(number: int, _: torch.nn.Module) -> None:
        if number == stop_at - 1 and int(os.environ.get("RANK", "0")) == last:
            os.kill(os.getpid(), signal.SIGUSR1)

    runs.in_update(setattr, stop)
    run_script(train.main)
