"""docs/tour.ipynb runs from its first cell to its last, without a network and without Jupyter."""

import json
import sys

import pytest
import runs
from ranks import in_fork

NOTEBOOK = json.loads((runs.ROOT / "docs" / "tour.ipynb").read_text())
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def shortened(cell, folder):
    """With little training, and in folders of the test's own."""
    places = {"EPOCHS, UPDATES = 20, 375": "EPOCHS, UPDATES = 1, 12", 'Path("datasets")': f'Path("{folder}/data")'}
    places |= {'Path("output")': f'Path("{folder}/output")'}
    for written, used in places.items():
        assert written in cell, f"{written!r} is not in the notebook any more"
        cell = cell.replace(written, used)
    return cell


def test_no_outputs_are_kept():
    assert not any(cell.get("outputs") for cell in NOTEBOOK["cells"])


@pytest.mark.launch
def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")

    def follow():
        names = {}
        for cell in (shortened(CELLS[0], tmp_path), *CELLS[1:]):
            exec(cell, names)
        sys.stdout.flush()

    status, text = in_fork(follow)
    assert status == 0, text
    for written in ("groupmixformer_digits/tour/maps.png", "groupmixformer_digits/tour/pictures/pictures.csv"):
        assert (tmp_path / "output" / written).is_file(), text
    assert list((tmp_path / "output/detection_digits/tour/evaluation").glob("*/predictions.png"))
