"""The report page: its numbers, that it fetches nothing and runs nothing, and which pictures it contains."""

import base64
import io
import json
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tasks.classification.outputs import summarize, write_outputs
from tasks.classification.predictions import Predictions
from tools import report

EVIL = '<script src="http://x.test/a.js"></script>'


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    return write_evaluation(tmp_path, ["ant", EVIL, "cat"])


def write_evaluation(tmp_path: Path, classes: list[str], **about: Any) -> Path:
    """Six images of three classes, four right, in a run folder; metrics.json names the data."""
    paths = [f"{'abc'[i // 2]}/{i}.png" for i in range(6)]
    for number, path in enumerate(paths):
        file = tmp_path / "data" / "val" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 60, 3), 40 * number, dtype=np.uint8)).save(file)
    top = np.array([[0, 1, 2], [1, 0, 2], [1, 0, 2], [1, 0, 2], [2, 0, 1], [0, 2, 1]])
    shares = np.tile(np.array([[0.5, 0.3, 0.2]], dtype=np.float32), (6, 1))
    shares[5] = (0.9, 0.06, 0.04)  # the surest mistake
    labels = np.array([0, 0, 1, 1, 2, 2])
    probability = np.array([0.5, 0.3, 0.5, 0.5, 0.5, 0.06], dtype=np.float32)
    predictions = Predictions(paths, labels, probability, -np.log(probability), top, shares, classes)
    folder = tmp_path / "run" / "evaluation" / "val"
    write_outputs(folder, predictions, {"data": str(tmp_path / "data")} | about | summarize(predictions))
    return folder


class _Addresses(HTMLParser):
    """Whatever a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action", "data")]


def test_page_holds_the_numbers_escapes_names_and_names_no_other_file(evaluation: Path, tmp_path: Path) -> None:
    assert report.main([str(evaluation), "--json", str(tmp_path / "content.json")]) == 0
    page = (evaluation / "report.html").read_text()
    assert "66.667 %" in page and page.count("data:image/jpeg;base64,") == 2
    assert "&lt;script" in page and "<script" not in page
    addresses = _Addresses()
    addresses.feed(page)
    assert len(addresses.found) == 3 and all(a.startswith("data:image/") for a in addresses.found)
    assert "@import" not in page and "url(" not in page
    pictures = [Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))) for address in addresses.found]
    assert [picture.size for picture in pictures] == [(506, 506), (60, 40), (60, 40)], "calibration first"
    content = json.loads((tmp_path / "content.json").read_text())
    assert [m["path"] for m in content["mistakes"]] == ["c/5.png", "a/1.png"], "the surest first"
    assert [c["name"] for c in content["worst_classes"]] == ["ant", "cat", EVIL]
    pairs = [(p["label"], p["predicted"], p["images"], p["of"]) for p in content["confused_pairs"]]
    assert pairs == [("ant", EVIL, 1, 2), ("cat", "ant", 1, 2)]


def test_page_says_what_was_evaluated_and_puts_wordnet_ids_in_words(tmp_path: Path) -> None:
    about = dict(model="a_model", weights="ema weights of <b>.pth", data="/d", val_set="v2", tta="flip")
    about |= dict(image_size=48, crop=False)
    folder = write_evaluation(tmp_path, ["n01440764", "n01443537", "n02123045"], **about)
    assert report.main([str(folder), "--json", str(tmp_path / "content.json")]) == 0
    page = (folder / "report.html").read_text()
    assert "a_model \N{MIDDLE DOT} ema weights of &lt;b&gt;.pth \N{MIDDLE DOT} data /d" in page
    assert "validation set v2 \N{MIDDLE DOT} 48 x 48 pixels \N{MIDDLE DOT} flip<" in page
    content = json.loads((tmp_path / "content.json").read_text())
    assert [c["name"] for c in content["worst_classes"]] == [
        *("tench (n01440764)", "tabby (n02123045)", "goldfish (n01443537)")
    ]


def test_pictures_that_are_missing_damaged_or_outside_the_data_are_left_out(evaluation: Path, tmp_path: Path) -> None:
    data = tmp_path / "data" / "val"
    (data / "c/5.png").write_bytes(b"no picture")
    assert report.main([str(evaluation)]) == 0
    assert (evaluation / "report.html").read_text().count("data:image/jpeg") == 1
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    rows = (evaluation / "predictions.csv").read_text().replace("a/1.png", "../../secret.png")
    (evaluation / "predictions.csv").write_text(rows)
    assert report.main([str(evaluation)]) == 0
    assert (evaluation / "report.html").read_text().count("data:image/jpeg") == 0
    shutil.rmtree(tmp_path / "data")
    assert report.main([str(evaluation)]) == 0
    assert "give their folder with --data-path" in (evaluation / "report.html").read_text()


@pytest.mark.parametrize("broken", ["metrics.json", "predictions.csv", "--data-path"])
def test_mistakes_are_one_line(
    evaluation: Path, tmp_path: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [str(evaluation)]
    if broken == "--data-path":
        (tmp_path / "empty").mkdir()
        args += [broken, str(tmp_path / "empty")]
    else:
        (evaluation / broken).unlink()
    assert report.main(args) == 2
    error = capsys.readouterr().err
    assert broken in error and error.count("\n") == 1
