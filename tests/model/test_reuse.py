"""Other projects use the network, also those with `models`, `utils`, `data` and `configs` of their own."""

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from small_networks import NAMES, ROOT, SMALL, small_network

OWN_MODULES = ("models/__init__.py", "utils/__init__.py", "data/__init__.py", "configs.py")
BEGINNING = """
import sys, warnings
warnings.simplefilter("error")
import configs, data, models, utils
assert all(module.OURS for module in (configs, data, models, utils))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with modules named like those of this one."""
    folder = tmp_path / "project"
    for name in OWN_MODULES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("OURS = True\n")
    return folder


def run(project: Path, script: str, *paths: Path) -> str:
    """What a script of the project prints; `paths` are folders with installed modules."""
    (project / "script.py").write_text(BEGINNING + script)
    environment = {"PATH": "", "HOME": str(project), "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(map(str, paths))}
    result = subprocess.run(
        [sys.executable, "script.py"], cwd=project, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: building leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "models", folder / "source" / "models")
    for name in ("pyproject.toml", "README.md", "LICENSE", "hubconf.py", "train.py"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder]
    result = subprocess.run([*map(str, command), str(folder / "source")], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_one_module_that_requires_torch_and_timm(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requirements = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    assert names == ["groupmixformer.py"]
    assert sorted(requirement.split(">")[0] for requirement in requirements) == ["timm", "torch"]


@pytest.mark.launch
def test_an_installed_network_and_torch_hub_work_in_a_project_with_the_same_names(
    wheel: Path, project: Path, tmp_path: Path
) -> None:
    """Also in one process: neither warns that the other has registered the variants."""
    network, site = small_network().double(), tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    # A released training checkpoint holds a pickled CfgNode, which timm must be allowed to read.
    checkpoint, images = tmp_path / "released.pth", torch.rand(1, 3, 32, 32).double()
    yacs = pytest.importorskip("yacs.config")
    torch.save({"model": network.state_dict(), "config": yacs.CfgNode({"A": 1})}, checkpoint)
    torch.save((images, network(images)), tmp_path / "expected.pth")
    script = f"""
import groupmixformer, timm, torch
assert groupmixformer.__file__.startswith({str(site)!r})
images, expected = torch.load({str(tmp_path / "expected.pth")!r})
options = {SMALL!r}
installed = timm.create_model("groupmixformer_miny", checkpoint_path={str(checkpoint)!r}, **options)
weights = torch.load({str(checkpoint)!r}, weights_only=True)
for source in ({str(checkpoint)!r}, weights, weights["model"], None):
    hub = torch.hub.load({str(ROOT)!r}, "groupmixformer_miny", source="local", weights=source, **options)
    if source is not None:
        assert torch.equal(hub.double().eval()(images), expected)
assert torch.equal(installed.double().eval()(images), expected)
assert type(hub) is not type(installed), "hub takes the folder that it is given"
print([module.__file__ for module in (models, configs)])
"""
    assert run(project, script, site).count(str(project)) == 2


@pytest.mark.launch
def test_torch_hub_alone_knows_every_variant(project: Path) -> None:
    """Without the module installed, from another project, where `import models` is that project's."""
    script = f"""
import torch
folder = {str(ROOT)!r}
for name in ('miny', 'large'):
    with torch.device("meta"):
        network = torch.hub.load(folder, f"groupmixformer_{{name}}", source="local", num_classes=3)
    print(network.default_cfg["architecture"], network.num_classes)
backbone = torch.hub.load(folder, "groupmixformer_miny", source="local", features_only=True, group_sizes=(3, 5, 3))
print(*backbone.feature_info.channels())
import runpy
print(*(name for name, value in runpy.run_path(folder + "/hubconf.py").items() if callable(value) and name[0] != "_"))
"""
    lines = run(project, script).splitlines()
    assert lines[:2] == ["groupmixformer_miny 3", "groupmixformer_large 3"]
    assert lines[2] == "40 80 160 160"
    assert set(lines[3].split()) == {f"groupmixformer_{name}" for name in NAMES}
