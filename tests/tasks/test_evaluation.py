"""`evaluation/`: predictions, metrics, comparison, and what test.py writes."""

import copy
import csv
import json
import logging
import multiprocessing
import re
import shutil
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import sklearn.metrics
import torch
import torch.distributed as dist
from PIL import Image
from scipy.optimize import minimize_scalar
from torch import nn
from torchvision.transforms import functional

from configs import UserError, read_config, with_num_classes
from tasks import keys_of
from tasks.classification import evaluation as run
from tasks.classification import inference, metrics, outputs, predictions
from tasks.classification.images import open_split
from tasks.classification.inference import predict
from tasks.classification.predictions import Predictions
from tasks.classification.transforms import eval_transform
from tasks.networks import build_model
from tools import compare as compare_script
from tools.digits import write_digits
from utils import files
from utils import processes as distributed
from utils.precision import Precision
from utils.processes import Processes
from utils.session import start_session
from utils.supervision import RunSupervisor

FLOAT32 = Precision("cpu", torch.float32, enabled=False)


def make_session(config, rank=0, world_size=1):
    logger = logging.getLogger("nowhere")
    logger.addHandler(logging.NullHandler())
    logger.propagate = False
    processes = Processes(rank, rank, world_size, torch.device("cpu"))
    supervisor = RunSupervisor(processes, timeout_seconds=60)
    return SimpleNamespace(processes=processes, logger=logger, config=config, supervisor=supervisor)


def some_predictions(count=12, num_classes=7, seed=0, with_logits=True):
    """Predictions as a network gives them, every fourth image without a label."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, 2, (count, num_classes)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, num_classes, count))
    labels[3::4] = predictions.UNLABELLED
    columns = {name: value.numpy() for name, value in inference.summarize_batch(logits, labels, with_logits).items()}
    names = ['tench, "Tinca"', "new\nline", "ä\udcff", *(f"class {i}" for i in range(3, num_classes))][:num_classes]
    paths = [f"{i}/\udcff,{i}.png" for i in range(count)]
    return Predictions(paths, classes=names, **columns)


COLUMNS = ("labels", "probabilities", "nll", "top", "top_probabilities")


# ------------------------------------------------------------------------------------------------------------- the pass
COUNTS = (1, 2, 3, 7, 8, 17)  # images: fewer than processes, shares that differ, and that do not


def predict_as(rank, world_size, config, source, folder):
    """What a process does: predict the first COUNTS images; the main one writes what it gets."""
    torch.set_num_threads(1)
    distributed.GATHERED_ROWS = 3  # so that a share travels in several pieces
    if world_size > 1:
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    session = make_session(config, rank, world_size)
    torch.manual_seed(0)
    network = build_model(config)
    nn.init.normal_(network.head.weight)  # fresh heads rank all classes nearly alike
    results = {}
    for count in COUNTS:
        part = copy.copy(source)
        part.samples = source.samples[:count]
        result = predict(session, config, network, part, FLOAT32)
        assert (result is None) == (rank > 0)
        if result is not None:
            results |= {f"{name} {count}": getattr(result, name) for name in (*COLUMNS, "logits")}
            results[f"paths {count}"] = np.array(result.paths)
    if rank == 0:
        np.savez(folder / f"{world_size}.npz", **results)


@pytest.fixture(scope="module")
def predicted(data, make_config, tmp_path_factory):
    """Predictions of COUNTS images on 1, 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("predicted")
    config = make_config("--data-path", data, "--opts", *runs.TINY, "DATA.BATCH_SIZE", "2")
    config = with_num_classes(config, 6)
    source = open_split(config, "train", 0, 1)
    source.classes = list("abcdef")
    order = torch.randperm(len(source.samples), generator=torch.Generator().manual_seed(0)).tolist()
    source.samples = [source.samples[i] for i in order]
    context = multiprocessing.get_context("fork")
    for world_size in (1, 2, 4):
        children = [
            context.Process(target=predict_as, args=(rank, world_size, config, source, folder))
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(120)
        assert [child.exitcode for child in children] == [0] * world_size
        (folder / "store").unlink(missing_ok=True)
    return config, source, {n: dict(np.load(folder / f"{n}.npz")) for n in (1, 2, 4)}


@pytest.mark.parametrize("world_size", [2, 4])
def test_predictions_have_the_same_bits_on_any_number_of_processes(predicted, world_size):
    alone, together = predicted[2][1], predicted[2][world_size]
    assert alone.keys() == together.keys() and len(alone) == 7 * len(COUNTS)
    for name, values in alone.items():
        assert values.dtype == together[name].dtype
        assert np.array_equal(values, together[name]), name


def test_predictions_are_those_of_a_plain_loop(predicted):
    config, source, results = predicted
    torch.manual_seed(0)
    network = build_model(config)
    nn.init.normal_(network.head.weight)
    network.eval()
    transform = eval_transform(config)
    with torch.no_grad():
        logits = torch.cat([network(transform(Image.open(path).convert("RGB"))[None]) for path, _ in source.samples])
    logits = logits[:17]
    labels = torch.tensor([label for _, label in source.samples[:17]])
    alone = {name.removesuffix(" 17"): values for name, values in results[1].items() if name.endswith(" 17")}
    assert alone["paths"].tolist() == [path.removeprefix(f"{source.root}/") for path, _ in source.samples[:17]]
    assert np.array_equal(alone["labels"], labels)
    assert alone["logits"] == pytest.approx(logits.numpy(), abs=1e-5)
    assert np.array_equal(alone["top"], logits.topk(5).indices)
    assert alone["top_probabilities"] == pytest.approx(logits.softmax(1).topk(5).values.numpy(), rel=1e-4)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    assert alone["nll"] == pytest.approx(losses.numpy(), rel=1e-4)
    assert alone["probabilities"] == pytest.approx(np.exp(-losses.numpy()), rel=1e-4)


class Pixels(nn.Module):
    """Class scores from five places of the image, different for its mirror image."""

    def forward(self, images):
        return images[:, 0, (0, 0, 9, 20, 31), (0, 31, 5, 20, 2)] * torch.tensor([2, 1.9, 2.1, 1.7, 2.3])


def expected_views(path, config, tta):
    """The views that TEST.TTA names, cut from the resized image by hand."""
    size = config.DATA.IMG_SIZE
    image = Image.open(path).convert("RGB")
    edge = int(size * 256 / 224)
    resized = functional.resize(image, edge, functional.InterpolationMode.BICUBIC)
    last, middle = edge - size, round((edge - size) / 2)
    corners = [(middle, middle)] if tta in ("none", "flip") else [(0, 0), (0, last), (last, 0), (last, last)]
    corners += [(middle, middle)] if "crop" in tta else []
    crops = [functional.crop(resized, top, left, size, size) for top, left in corners]
    if tta in ("flip", "ten-crop"):
        crops += [functional.hflip(crop) for crop in crops]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return torch.stack([functional.normalize(functional.to_tensor(crop), mean, std) for crop in crops])


@pytest.mark.parametrize(("tta", "views"), [("none", 1), ("flip", 2), ("five-crop", 5), ("ten-crop", 10)])
def test_softmax_is_averaged_over_the_views(data, make_config, tta, views):
    config = make_config("--data-path", data, "--tta", tta, "--opts", *runs.TINY, "TEST.CROP", "True")
    source = open_split(config, "val", 0, 1)
    source.classes = list("abcde")
    result = predict(make_session(config), config, Pixels(), source, FLOAT32)
    for row, (path, _) in enumerate(source.samples):
        images = expected_views(path, config, tta)
        assert len(images) == views
        shares = Pixels()(images).softmax(dim=1).mean(dim=0)
        assert result.top[row].tolist() == shares.argsort(descending=True).tolist()
        assert result.top_probabilities[row] == pytest.approx(shares.sort(descending=True).values.numpy(), rel=1e-5)


def test_crops_need_cropping(make_config):
    with pytest.raises(UserError, match=r"^TEST.TTA = 'ten-crop': needs TEST.CROP True"):
        make_config("--tta", "ten-crop", "--opts", "TEST.CROP", "False")


def test_too_many_logits_are_not_kept_and_change_nothing_else(data, make_config, monkeypatch):
    config = make_config("--data-path", data, "--opts", *runs.TINY)
    source = open_split(config, "val", 0, 1)
    source.classes = list("abcde")
    kept = predict(make_session(config), config, Pixels(), source, FLOAT32)
    monkeypatch.setattr(inference, "MAX_LOGITS_BYTES", 4 * 6 * 5 - 1)
    left_out = predict(make_session(config), config, Pixels(), source, FLOAT32)
    assert kept.logits.shape == (6, 5) and left_out.logits is None
    before, after = outputs.summarize(kept), outputs.summarize(left_out)
    assert before.pop("temperature") and after.pop("temperature") is None
    assert repr(before) == repr(after)  # NaN, of empty bins, is not equal to itself


# ------------------------------------------------------------------------------------------------- the predictions file
@pytest.mark.parametrize("num_classes", [1, 3, 7])
def test_a_predictions_file_reads_back_as_it_was(tmp_path, num_classes):
    before = some_predictions(num_classes=num_classes)
    before.save(tmp_path / "p.csv")
    after = Predictions.load(tmp_path / "p.csv")
    assert after.paths == before.paths and after.logits is None
    for name in COLUMNS:
        assert np.array_equal(getattr(before, name), getattr(after, name), equal_nan=name in COLUMNS[1:3]), name
        assert getattr(before, name).dtype == getattr(after, name).dtype
    seen = {*before.labels[before.labelled], *before.top[:, 0]}
    assert all(after.classes[i] == before.classes[i] for i in seen)
    assert list(tmp_path.iterdir()) == [tmp_path / "p.csv"]


def test_the_columns_of_a_predictions_file(tmp_path):
    some_predictions(num_classes=3, count=4).save(tmp_path / "p.csv")
    with open(tmp_path / "p.csv", newline="", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert ",".join(header) == "path,label,label_name,probability,nll,top1,top1_name,p1,top2,p2,top3,p3"
    assert rows[3][:5] == ["3/\udcff,3.png", "-1", "", "", ""]
    assert predictions.column_names(5)[-4:] == ["top4", "p4", "top5", "p5"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "not a predictions file"),
        ("path,label\na,1\n", "its columns are path, label"),
        ("path,label,label_name,probability,nll,top1,top1_name,p1\na,1\n", r"p.csv:2: 2 fields, the header has 8"),
        ("path,label,label_name,probability,nll,top1,top1_name,p1\na,x,b,1,0,1,b,1\n", "not a predictions file: .*'x'"),
        ("path\n\0\n", "not a predictions file|cannot be read"),
    ],
)
def test_what_is_no_predictions_file(tmp_path, content, message):
    if content is not None:
        (tmp_path / "p.csv").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        Predictions.load(tmp_path / "p.csv")
    assert str(tmp_path / "p.csv") in str(caught.value) and "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------------- metrics
@pytest.fixture(scope="module")
def noisy():
    """3,000 logits of 7 classes, the last of which no image has, and labels drawn from their softmax."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 1.5, (3000, 7)).astype(np.float32)
    logits[:, 6] -= 20
    shares = torch.from_numpy(logits).double().softmax(1).numpy()
    labels = np.array([rng.choice(7, p=row / row.sum()) for row in shares])
    top = np.argsort(-logits, axis=1)[:, :5]
    return SimpleNamespace(logits=logits, labels=labels, shares=shares, top=top, first=top[:, 0] == labels)


def test_accuracies_and_confusion_are_scikit_learns(noisy):
    labels, predicted, every = noisy.labels, noisy.top[:, 0], np.arange(7)
    correct = {k: (noisy.top[:, :k] == labels[:, None]).any(1) for k in (1, 5)}
    for k in (1, 5):
        expected = sklearn.metrics.top_k_accuracy_score(labels, noisy.logits, k=k, labels=every)
        assert metrics.accuracy(correct[k]) == pytest.approx(100 * expected, rel=1e-12)
    expected = sklearn.metrics.confusion_matrix(labels, predicted, labels=every)
    assert np.array_equal(metrics.confusion_matrix(labels, predicted, 7).toarray(), expected)

    nll = -np.log(noisy.shares[np.arange(3000), labels])
    assert nll.mean() == pytest.approx(sklearn.metrics.log_loss(labels, noisy.shares, labels=every), rel=1e-9)
    results = metrics.class_results(labels, noisy.top, nll, 7)
    assert np.array_equal(results.images, expected.sum(1)) and np.array_equal(results.predicted, expected.sum(0))
    recall = sklearn.metrics.recall_score(labels, predicted, labels=every[:6], average=None)
    precision = sklearn.metrics.precision_score(labels, predicted, labels=every[:6], average=None)
    assert results.acc1[:6] == pytest.approx(100 * recall) and results.precision[:6] == pytest.approx(100 * precision)
    for i in range(6):
        mine = labels == i
        assert results.acc5[i] == pytest.approx(100 * correct[5][mine].mean())
        assert results.nll[i] == pytest.approx(nll[mine].mean())
        others = np.where(every == i, -1, expected[i])
        assert (results.confused_with[i], results.confused[i]) == (others.argmax(), others.max())
    assert results.images[6] == 0 and np.isnan([results.acc1[6], results.nll[6], results.precision[6]]).all()
    assert results.confused_with[6] == -1


def test_calibration_of_known_predictions():
    """Bins (0.4, 0.6] and (0.8, 1.0]: |0.55 - 1/2| of 2 images and |0.95 - 3/3| ... by hand."""
    confidence = np.array([0.5, 0.6, 0.9, 1.0, 1.0, 0.2], dtype=np.float64)
    correct = np.array([True, False, True, True, False, False])
    result = metrics.calibration(confidence, correct, bins=5)
    assert result.edges.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert result.counts.tolist() == [1, 0, 2, 0, 3], "an edge belongs to the bin below it"
    assert result.confidence[[0, 2, 4]] == pytest.approx([0.2, 0.55, 2.9 / 3])
    assert result.accuracy[[0, 2, 4]] == pytest.approx([0, 0.5, 2 / 3])
    assert np.isnan(result.confidence[[1, 3]]).all()
    assert result.ece == pytest.approx((1 * 0.2 + 2 * 0.05 + 3 * 0.3) / 6)
    assert len(metrics.calibration(confidence, correct).counts) == 15


def test_a_calibrated_network_has_a_small_calibration_error(noisy):
    assert metrics.calibration(noisy.shares.max(1), noisy.first).ece < 0.03
    assert metrics.calibration(np.full(3000, 0.999), noisy.first).ece > 0.3


def test_the_fitted_temperature_minimises_the_loss(noisy):
    def loss(temperature):
        return metrics.at_temperature(noisy.logits, noisy.labels, temperature)[0].mean()

    fitted = metrics.fit_temperature(noisy.logits, noisy.labels)
    assert fitted == pytest.approx(1, abs=0.05), "the labels were drawn at temperature 1"
    assert fitted == pytest.approx(minimize_scalar(loss, bounds=(0.2, 5), method="bounded").x, abs=1e-3)
    sharpened = metrics.fit_temperature(3 * noisy.logits, noisy.labels)
    assert sharpened == pytest.approx(3 * fitted, rel=1e-3)
    nll, confidence = metrics.at_temperature(noisy.logits, noisy.labels, 1.0)
    assert nll == pytest.approx(-np.log(noisy.shares[np.arange(3000), noisy.labels]), abs=1e-9)
    assert confidence == pytest.approx(noisy.shares.max(1))


def test_a_temperature_without_a_minimum_is_the_end_of_its_range():
    logits = np.eye(3, dtype=np.float32)
    assert metrics.fit_temperature(logits, np.arange(3)) == metrics.TEMPERATURE_RANGE[0]
    assert metrics.fit_temperature(logits, (np.arange(3) + 1) % 3) == metrics.TEMPERATURE_RANGE[1]


def test_the_accuracy_interval_is_the_bootstraps(noisy):
    correct = noisy.first[:400]
    means = np.random.default_rng(0).choice(correct, (20_000, 400)).mean(axis=1)
    expected = 100 * np.quantile(means, (0.025, 0.975))
    assert metrics.accuracy_interval(correct) == pytest.approx(expected, abs=0.26), "one image"
    assert metrics.accuracy_interval(np.ones(9, bool)) == (100, 100)
    assert np.isnan(metrics.accuracy_interval(np.empty(0, bool))).all() and np.isnan(metrics.accuracy(np.empty(0)))


def test_a_comparison_of_known_results():
    first = np.array([True] * 6 + [True] * 10 + [False] * 4)
    second = np.array([False] * 6 + [True] * 10 + [False] * 4)
    result = metrics.compare(first, second)
    assert (result.only_first, result.only_second, result.accuracies) == (6, 0, (80, 50))
    assert result.difference == pytest.approx(-30)
    assert result.p_value == pytest.approx(2 / 2**6), "six heads in a row, or six tails"
    same = metrics.compare(first, first)
    assert (same.difference, same.interval, same.p_value) == (0, (0, 0), 1)


def test_the_interval_of_a_difference_is_the_paired_bootstraps(noisy):
    first, second = noisy.first[:500], (noisy.top[:, 1] == noisy.labels)[:500]
    difference = second.astype(float) - first
    means = np.random.default_rng(1).choice(difference, (10_000, 500)).mean(axis=1)
    expected = 100 * np.quantile(means, (0.025, 0.975))
    result = metrics.compare(first, second)
    assert result.interval == pytest.approx(expected, abs=0.41), "two images"
    assert result == metrics.compare(first, second), "seeded"


# ----------------------------------------------------------------------------------------------------------- comparison
def save_two(tmp_path, **changes):
    """Predictions of two networks on the same images, the second file in another order."""
    first, second = some_predictions(40, seed=3), some_predictions(40, seed=3)
    better = second.top.copy()
    better[:20, 0] = second.labels[:20]
    values = {**vars(second), "top": better} | changes
    order = np.random.default_rng(0).permutation(len(values["paths"]))
    shuffled = {name: np.asarray(values[name])[order] for name in COLUMNS}
    first.save(tmp_path / "a.csv")
    second = Predictions([values["paths"][i] for i in order], classes=second.classes, **shuffled)
    second.save(tmp_path / "b.csv")
    return [str(tmp_path / "a.csv"), str(tmp_path / "b.csv")]


def test_two_files_are_compared_image_by_image(tmp_path, capsys):
    files = save_two(tmp_path)
    assert compare_script.main(files) == 0
    text = capsys.readouterr().out
    first, known = some_predictions(40, seed=3), some_predictions(40, seed=3).labelled
    gained = np.count_nonzero(known[:20] & ~first.correct(1)[:20])
    assert gained > 5 and f"0 images only A has right, {gained} only B: McNemar p = {2 / 2**gained:.3g}" in text
    assert compare_script.main([*files, "--json", "-"]) == 0
    captured = capsys.readouterr()
    content = json.loads(captured.out)
    assert captured.err == text
    assert content["acc1"]["images"] == np.count_nonzero(known) and content["acc1"]["only_second"] == gained


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paths": [f"{i}/else.png" for i in range(40)]}, "not about the same images: 40 are only in the first file"),
        ({"paths": ["0/\udcff,0.png"] * 40}, "the second file names an image twice"),
        ({"labels": np.zeros(40, np.int64)}, r"the labels of \d+ images differ"),
    ],
)
def test_what_cannot_be_compared(tmp_path, capsys, changes, message):
    assert compare_script.main(save_two(tmp_path, **changes)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1


def test_wrong_use_of_the_comparison_is_one_line(tmp_path, capsys):
    assert compare_script.main(["a.csv"]) == 2
    assert compare_script.main([*save_two(tmp_path), "--json", str(tmp_path)]) == 2
    assert [line.partition(": error: ")[1] for line in capsys.readouterr().err.splitlines()] == [": error: "] * 2


# ---------------------------------------------------------------------------------------------------------- test.py
@pytest.fixture
def evaluate(data, tmp_path, monkeypatch):
    """Run test.py's work in this process; gives the folder of evaluations."""
    weights = tmp_path / "weights.pth"
    config = with_num_classes(read_config(runs.arguments(data, tmp_path), keys_of), 3)
    torch.manual_seed(0)
    network = build_model(config)
    nn.init.normal_(network.head.weight)
    torch.save({"model": network.state_dict()}, weights)

    def run_with(*opts, flags=()):
        args = runs.arguments(data, tmp_path, *opts, flags=["--resume", str(weights), *flags])
        monkeypatch.setattr("sys.argv", ["test.py", *args])
        run.evaluate(start_session("", keys_of))
        return runs.run_folder(tmp_path) / "evaluation"

    run_with.weights = weights
    return run_with


@pytest.mark.long
def test_the_best_checkpoint_has_the_accuracy_that_its_run_told(tmp_path, monkeypatch, capsys):
    """Validation in training and test.py are two loops."""
    write_digits(tmp_path / "digits")
    opts = (*runs.PLAIN, "DATA.BATCH_SIZE", "32", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    args = runs.arguments(tmp_path / "digits", tmp_path, *opts)
    assert runs.train_here(monkeypatch, args) == 0
    folder = runs.run_folder(tmp_path)
    (told,) = re.findall(r"Best acc1: (\S+)", (folder / "log_rank0.txt").read_text())
    assert 15 < float(told) < 100, "more than chance, so that it is a number to agree on"
    monkeypatch.setattr("sys.argv", ["test.py", *args, "MODEL.RESUME", str(folder / "ckpt_best.pth")])
    run.evaluate(start_session("", keys_of))
    assert capsys.readouterr().out.splitlines()[-1].startswith(f" * Acc@1 {told} ")


def test_an_evaluation_in_another_way_replaces_no_other(evaluate):
    folder = evaluate()
    assert evaluate(flags=["--fuse"]) == folder
    assert sorted(path.name for path in folder.iterdir()) == [
        *("weights-val-data-32-uncropped", "weights-val-data-32-uncropped-fused"),
    ]
    evaluate(flags=["--amp-opt-level", "O1"])
    assert (folder / "weights-val-data-32-uncropped-bfloat16").is_dir()
    assert evaluate(flags=["--amp-opt-level", "O0"]) and len(list(folder.iterdir())) == 3, "O0 is a CPU's default"


def test_a_compiled_evaluation_has_a_folder_of_its_own(make_config):
    names = [run._name(make_config(*flags), "w.pth", torch.device("cpu")) for flags in ([], ["--compile"])]
    assert names[1] == f"{names[0]}-compiled"


def test_a_temperature_at_the_end_of_what_is_tried_is_told(data, make_config):
    config = make_config("--data-path", data, "--opts", *runs.TINY)
    source = open_split(config, "val", 0, 1)
    source.classes = list("abcde")
    predictions = predict(make_session(config), config, Pixels(), source, FLOAT32)
    for labels, limit in ((predictions.top[:, 0], "0.010 (the limit of what is tried)"), (predictions.labels, None)):
        summary = outputs.summarize(replace(predictions, labels=labels))
        assert any(f"at temperature {limit}" in line for line in outputs.describe(summary)) == (limit is not None)


def test_what_an_evaluation_writes(evaluate, capsys):
    folder = evaluate() / "weights-val-data-32-uncropped"
    last = capsys.readouterr().out.splitlines()[-1]
    assert sorted(path.name for path in folder.iterdir()) == [
        *("confusion.csv", "metrics.json", "per_class.csv", "predictions.csv"),
    ]
    content = json.loads((folder / "metrics.json").read_text())
    saved = Predictions.load(folder / "predictions.csv")
    assert len(saved) == content["images"] == content["counted"] == 6
    assert last == f" * Acc@1 {content['acc1']:.3f} Acc@5 {content['acc5']:.3f}"
    assert content["acc1"] == pytest.approx(100 * saved.correct(1).mean()) and content["acc5"] == 100
    assert content["nll"] == pytest.approx(saved.nll.astype(float).mean(), rel=1e-6)
    assert content["temperature"]["nll"] <= content["nll"]
    assert content["acc1_interval"] == list(metrics.accuracy_interval(saved.correct(1)))
    with open(folder / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["class"], row["name"], row["images"]) for row in rows] == [
        *(("0", "ant", "2"), ("1", "bee", "2"), ("2", "cat", "2"))
    ]
    assert np.mean([float(row["acc1"]) for row in rows]) == pytest.approx(content["mean_class_acc1"], rel=1e-5)
    with open(folder / "confusion.csv", newline="") as file:
        cells = {(row["label_name"], row["predicted_name"]): int(row["images"]) for row in csv.DictReader(file)}
    assert sum(cells.values()) == 6 and all(cells.values())
    for path, label, top in zip(saved.paths, saved.labels, saved.top):
        assert path.startswith(saved.classes[label])
        assert cells[saved.classes[label], saved.classes[top[0]]] > 0


def test_several_sizes_end_in_a_table(evaluate, tmp_path, capsys):
    target = tmp_path / "sizes.json"
    folder = evaluate(flags=["--sizes", "32", "48", "40", "--json", str(target), "--tta", "flip"])
    *_, header, small, large, middle, last = capsys.readouterr().out.splitlines()
    assert header.split() == ["size", "Acc@1", "Acc@5", "NLL", "ECE"]
    content = json.loads(target.read_text())
    assert [(row["image_size"], row["tta"]) for row in content] == [(32, "flip"), (48, "flip"), (40, "flip")]
    for line, row in zip((small, large, middle), content):
        assert line.split() == [str(row["image_size"]), *(f"{row[k]:.3f}" for k in ("acc1", "acc5")), *line.split()[3:]]
    assert last == f" * Acc@1 {content[2]['acc1']:.3f} Acc@5 {content[2]['acc5']:.3f}"
    assert {path.name for path in folder.iterdir()} == {
        f"weights-val-data-{size}-flip-uncropped" for size in (32, 48, 40)
    }
    losses = [row["nll"] for row in content]
    assert len(set(losses)) == 3, "every size is really another"


def test_evaluations_that_differ_do_not_replace_each_other(evaluate, tmp_path):
    folder = evaluate()
    evaluate("TEST.CROP", "True")
    evaluate("DATA.FAST_LOADING", "all")
    names = [f"weights-val-data-32{how}" for how in ("-uncropped", "-uncropped-fast", "")]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert json.loads((folder / names[1] / "metrics.json").read_text())["fast_loading"] is True
    evaluate()  # the same once more
    before = (folder / names[0] / "predictions.csv").read_bytes()
    other = tmp_path / "other" / "weights.pth"
    other.parent.mkdir()
    shutil.copy(evaluate.weights, other)
    with pytest.raises(
        UserError, match=r"weights-val-data-32-uncropped: holds the evaluation of .*/weights.pth; .* another --tag"
    ):
        evaluate(flags=["--resume", str(other)])
    assert (folder / names[0] / "predictions.csv").read_bytes() == before


def test_weights_that_give_no_numbers_write_nothing(evaluate, tmp_path):
    state = torch.load(evaluate.weights)
    state["model"]["head.bias"][0] = float("nan")
    torch.save(state, evaluate.weights)
    with pytest.raises(UserError, match=r"weights.pth: gives outputs that are not finite"):
        evaluate()
    assert not (runs.run_folder(tmp_path) / "evaluation").exists()


def test_a_folder_that_cannot_be_written_is_named(evaluate, tmp_path):
    folder = runs.run_folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "evaluation").write_text("a file")
    with pytest.raises(
        UserError, match=r"evaluation/weights-val-data-32-uncropped: cannot be written: Not a directory"
    ):
        evaluate()


@pytest.mark.parametrize(
    ("flag", "keys"),
    [
        ("--flops", {"model", "image_size", "flops", "parameters"}),
        ("--throughput", {"images_per_second", "peak_memory_mib", "batch_size", "device", "precision"}),
        ("--eval", {"acc1", "acc5", "ece"}),
    ],
)
def test_json_on_standard_output_is_nothing_but_json(evaluate, capsys, flag, keys):
    evaluate("DATA.BATCH_SIZE", "1", flags=[flag, "--json", "-"])
    captured = capsys.readouterr()
    assert keys <= json.loads(captured.out).keys()
    assert "command: test.py" in captured.err


def test_a_json_file_that_cannot_be_written_is_told_before_the_work(evaluate, tmp_path):
    with pytest.raises(UserError, match=r"^--json .*/none/x.json: cannot be written"):
        evaluate(flags=["--json", str(tmp_path / "none" / "x.json")])
    assert not (runs.run_folder(tmp_path) / "evaluation").exists()


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("/dev/null")
    files.check_json_target(str(link))
    files.write_json(str(link), {})
    assert link.is_symlink() and list(tmp_path.iterdir()) == [link]


def test_numbers_that_are_none_are_null_in_json(tmp_path):
    files.write_json(str(tmp_path / "x.json"), {"a": [float("nan"), 1.5], "b": (float("inf"),)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [None, 1.5], "b": [None]}
