"""Detectors under the run's promises: the same bits after a stop, and on any number of processes."""

import json
import os
import shutil
import signal

import detection_data
import pytest
import runs
import torch
from image_data import message_of
from ranks import run_ranks, train_in_fork

import tasks
import train
from tasks.detection import inference
from tasks.detection.coco import open_split
from tasks.detection.evaluation import folder_name
from utils.checkpoint import load_file
from utils.optimizer import build_optimizer
from utils.session import run_script, start_session

RUN = ("tiny", "run")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return detection_data.make_data(tmp_path_factory.mktemp("scenes") / "data")


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """The folder of a finished run."""
    output = tmp_path_factory.mktemp("trained")
    status, text = train_in_fork(detection_data.arguments(scenes, output))
    assert status == 0, text
    return output.joinpath(*RUN)


def final(folder):
    return runs.digest(folder / "ckpt_epoch_1.pth")


def test_a_run_learns_saves_and_says_what_it_found(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    parts = ("classifier", "box_reg", "mask", "objectness", "rpn_box_reg")
    assert lines[-1]["train_loss"] == pytest.approx(sum(lines[-1][f"train_{name}"] for name in parts), rel=1e-5)
    assert {"box_ap_raw", "mask_ap_ema", "box_ap50_ema", "mask_ar_large_raw"} <= set(lines[-1])
    assert lines[-1]["decides"] == "box_ap"
    saved = load_file(trained / "ckpt_best.pth")
    assert saved["classes"] == ["bar", "dot"] and saved["category_ids"] == [2, 7]
    assert any(name.startswith("backbone.maps.body.conv_stem") for name in saved["model_ema"])


@pytest.mark.launch
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_and_continued_run_ends_with_the_same_bits(scenes, trained, tmp_path, processes):
    size = ("DATA.BATCH_SIZE", str(4 // processes))
    if processes == 1:
        straight = trained
    else:
        ended = run_ranks("train.py", detection_data.arguments(scenes, tmp_path / "a", *size), processes)
        assert ended.returncode == 0, ended.stderr
        straight = (tmp_path / "a").joinpath(*RUN)
    args = detection_data.arguments(scenes, tmp_path / "b", *size)
    stopped = run_ranks(__file__, args, processes, {"STOP_AT": "3"})
    assert stopped.codes == [75] * processes, stopped.stderr
    assert (tmp_path / "b").joinpath(*RUN, "ckpt_epoch_1_update_1.pth").exists()
    assert run_ranks("train.py", args, processes).returncode == 0
    assert final((tmp_path / "b").joinpath(*RUN)) == final(straight)


@pytest.mark.launch
def test_a_run_killed_in_validation_ends_with_the_same_bits(scenes, trained, tmp_path):
    args = detection_data.arguments(scenes, tmp_path)
    # After each of two epochs, the network and its average see five images each.
    for call in (3, 13):
        status, text = train_in_fork(args, runs.kill_at_call(inference, "detect", call))
        assert status == -signal.SIGKILL, text
    folder = tmp_path.joinpath(*RUN)
    assert (folder / "ckpt_epoch_0.pth").exists() and not (folder / "ckpt_epoch_1.pth").exists()
    status, text = train_in_fork(args)
    assert status == 0, text
    for name in ("ckpt_epoch_1.pth", "ckpt_best.pth"):
        assert runs.digest(folder / name) == runs.digest(trained / name)


@pytest.mark.launch
def test_results_have_the_same_bytes_on_any_number_of_processes(scenes, trained, tmp_path):
    written = []
    for processes in (1, 2, 3):
        output = tmp_path / str(processes)
        args = [*detection_data.arguments(scenes, output), "--resume", str(trained / "ckpt_best.pth")]
        ended = run_ranks("test.py", args, processes)
        assert ended.returncode == 0, ended.stderr
        (folder,) = output.joinpath(*RUN, "evaluation").iterdir()
        names = ("predictions.json", "predictions_masks.json", "per_class.csv", "metrics.json", "predictions.png")
        written.append([(folder / name).read_bytes() for name in names])
    assert written[0] == written[1] == written[2]
    results = json.loads(written[0][0])
    assert results and {"image_id", "category_id", "bbox", "score"} == set(results[0])
    assert {result["category_id"] for result in results} <= {2, 7}
    assert set(json.loads(written[0][1])[0]) == {"image_id", "category_id", "score", "segmentation"}
    page = (folder / "report.html").read_text()
    assert "Worst pictures" in page and "<td>bar</td>" in page and "http" not in page.replace("http-equiv", "")


def test_no_evaluation_overwrites_one_of_other_weights(scenes, trained, tmp_path, monkeypatch):
    def evaluate(weights, which):
        arguments = [
            *detection_data.arguments(scenes, tmp_path / "out", "TEST.WEIGHTS", which),
            "--resume",
            str(weights),
        ]
        monkeypatch.setattr("sys.argv", ["test.py", *arguments])
        tasks.evaluate(start_session("", tasks.keys_of))

    evaluate(trained / "ckpt_best.pth", "raw")
    evaluate(trained / "ckpt_best.pth", "ema")
    names = {path.name for path in (tmp_path / "out").joinpath(*RUN, "evaluation").iterdir()}
    assert names == {f"ckpt_best-data-instances_val-{which}-32" for which in ("raw", "ema")}
    other = shutil.copy(trained / "ckpt_best.pth", tmp_path)
    assert "holds the evaluation of" in message_of(evaluate, other, "raw")


@pytest.mark.parametrize(
    ("opts", "name"),
    [
        ((), "32"),
        (("TEST.MAX_SIZE", "60", "AMP_OPT_LEVEL", "O1"), "32-to60-bfloat16"),
        (("TEST.MAX_DETECTIONS", "10", "TEST.WEIGHTS", "ema"), "ema-32-top10"),
    ],
)
def test_evaluations_that_differ_have_names_of_their_own(scenes, opts, name):
    config = detection_data.config_of("--data-path", scenes, "--opts", *detection_data.TINY, *opts)
    found = folder_name(config, "x/best.pth", open_split(config, "val"), torch.device("cpu"))
    assert found == f"best-data-instances_val-{name}"


@pytest.mark.launch
@pytest.mark.parametrize("detector", ["faster_rcnn", "retinanet"])
def test_the_other_detectors_learn_boxes_alone(tmp_path, detector):
    data = detection_data.make_data(tmp_path / "data", masks=False, train=6, val=3)
    args = detection_data.arguments(
        data,
        tmp_path,
        *("MODEL.DETECTOR", detector, "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "DATA.BATCH_SIZE", "3"),
        *("MODEL.STAGE_NORM", "layer", "TRAIN.USE_CHECKPOINT", "True"),
    )
    ended = run_ranks("train.py", [*args, "DATA.BATCH_SIZE", "1"], processes=2)
    assert ended.returncode == 0, ended.stderr
    line = json.loads((tmp_path.joinpath(*RUN) / "metrics.jsonl").read_text())
    assert "box_ap_raw" in line and "mask_ap_raw" not in line


def test_images_without_objects_train_and_an_update_that_is_not_finite_is_skipped(tmp_path, monkeypatch):
    data = detection_data.make_data(tmp_path / "data", train=8, val=3)
    content = json.loads((data / "annotations" / "instances_train.json").read_text())
    kept = [entry for entry in content["annotations"] if entry["image_id"] == 10]  # the others have none
    detection_data.write(data, "train", content | {"annotations": kept})

    def spoil(number, network):
        return (lambda loss: loss * float("nan")) if number == 1 else None

    runs.in_update(monkeypatch.setattr, spoil)
    args = detection_data.arguments(data, tmp_path, "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    assert runs.train_here(monkeypatch, args) == 0
    log = (tmp_path.joinpath(*RUN) / "log_rank0.txt").read_text()
    assert "update 1 skipped" in log


def test_layer_decay_reaches_from_the_heads_to_the_stem():
    from tasks.detection.detectors import build_detector

    config = detection_data.tiny_config("TRAIN.LAYER_DECAY", "0.5")
    network = build_detector(config, 2)
    optimizer = build_optimizer(config, network, lr=1.0)
    scales = {id(parameter): group["lr_scale"] for group in optimizer.param_groups for parameter in group["params"]}
    of = {name: scales[id(parameter)] for name, parameter in network.named_parameters()}
    body = "backbone.maps.body."
    heads = [of[name] for name in of if not name.startswith(body)]
    assert set(heads) == {1.0}
    blocks = [
        {of[name] for name in of if name.startswith(f"{body}groupmixformer_backbone.{stage}.")} for stage in range(4)
    ]
    assert all(len(scales) == 1 for scales in blocks)
    blocks = [scales.pop() for scales in blocks]
    assert blocks == sorted(blocks) and blocks[-1] == 0.5 and len(set(blocks)) == 4
    assert of[f"{body}conv_stem.proj1.weight"] == min(of.values()) < blocks[0]


if __name__ == "__main__":
    stop_at, last = int(os.environ["STOP_AT"]), int(os.environ.get("WORLD_SIZE", "1")) - 1

    def stop(number: int, network: torch.nn.Module) -> None:
        if number == stop_at - 1 and int(os.environ.get("RANK", "0")) == last:
            os.kill(os.getpid(), signal.SIGUSR1)

    runs.in_update(setattr, stop)
    run_script(train.main)
