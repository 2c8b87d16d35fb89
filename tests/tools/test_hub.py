"""`tools.convert --to hub`: a folder that timm alone loads, with equal logits, and that test.py takes as weights."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import timm
import torch
import yaml
from image_data import message_of
from PIL import Image

import tasks
from configs import read_command
from models import GroupMixFormer
from models.groupmixformer import HUB_TAG
from tasks import evaluate, keys_of
from tasks.classification.transforms import eval_transform
from tools.convert import convert, main
from tools.hub import describe
from utils.checkpoint import load_file
from utils.session import start_session

OTHER = ("DATA.IMG_SIZE", "48", "MODEL.GMA.NUM_HEADS", "16", "DATA.INTERPOLATION", "bilinear", "TEST.CROP", "True")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The best checkpoint of a run whose size, heads and preprocessing are not the variant's, evaluated once."""
    output = tmp_path_factory.mktemp("trained")
    short = ("TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    with pytest.MonkeyPatch.context() as patch:
        assert runs.train_here(patch, runs.arguments(data, output, *OTHER, *short)) == 0
        path = runs.run_folder(output) / "ckpt_best.pth"
        patch.setattr("sys.argv", ["test.py", "--resume", str(path), "--data-path", str(data)])
        evaluate(start_session("", keys_of))
    return path


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "ants and bees"
    convert(trained, "hub", path, license="cc-by-4.0")
    return path


def test_grey_input_and_any_height_and_width_are_described():
    """Pixels that timm would prepare from these files are those of test.py."""
    shape = ("MODEL.GMA.IN_DIM", "1", "DATA.IMG_SIZE", "[48, 80]", "TEST.CROP", "True")
    digits = str(runs.ROOT / "configs" / "groupmixformer_digits.yaml")
    _, config, keys = read_command(["--cfg", digits, "--opts", *shape], keys_of, print)
    described = describe(config, keys, [])["pretrained_cfg"]
    assert tuple(described["input_size"]) == (1, 48, 80)
    transform = timm.data.create_transform(**timm.data.resolve_data_config(described))
    picture = Image.effect_noise((100, 70), 50)
    assert torch.equal(transform(picture), eval_transform(config)(picture))


def own_network(trained):
    """The network as test.py builds it, with the weights that the checkpoint was kept for."""
    checkpoint = load_file(trained)
    network = GroupMixFormer(3, embed_dims=(20, 20), depths=(1, 1), mlp_ratios=(2, 2), num_heads=16)
    network.load_state_dict(checkpoint["model_ema" if checkpoint["best_weights"] == "ema" else "model"])
    return network.eval()


def test_timm_gives_the_logits_of_the_run_with_classes_and_size(folder, trained):
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 48, 48)
    assert torch.equal(network(images), own_network(trained)(images))
    described = network.pretrained_cfg
    assert list(described["label_names"]) == ["ant", "bee", "cat"] and tuple(described["input_size"]) == (3, 48, 48)


@pytest.mark.parametrize("crop", [True, False])
def test_timms_transform_shows_the_network_what_test_py_does(folder, trained, tmp_path, make_config, crop):
    """With timm's own way of saving, the size stays 224."""
    content = load_file(trained)
    content["config"] = content["config"].replace("CROP: true", f"CROP: {str(crop).lower()}")
    torch.save(content, tmp_path / "ckpt.pth")
    convert(tmp_path / "ckpt.pth", "hub", tmp_path / "hub")
    network = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    config = make_config("--opts", *runs.TINY, *OTHER[:-1], str(crop))
    image = Image.effect_noise((90, 61), 80).convert("RGB")
    assert torch.equal(transform(image), eval_transform(config)(image))


@pytest.mark.parametrize("way", ["without --cfg", "with --cfg"])
def test_test_py_takes_the_folder(folder, data, tmp_path, monkeypatch, capsys, way):
    cfg = ["--cfg", str(runs.ROOT / "configs" / "groupmixformer_digits.yaml")] if way == "with --cfg" else []
    opts = ["--opts", *runs.TINY, *OTHER] if cfg else []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test.py", "--resume", str(folder), "--data-path", str(data), *cfg, *opts])
    evaluate(start_session("", keys_of))
    out = capsys.readouterr().out
    (measured,) = re.findall(r"\| data, val \| 48 \| 6 \| (\S+) ", (folder / "README.md").read_text())
    assert out.splitlines()[-1].startswith(f" * Acc@1 {measured} ")


def test_the_card_tells_numbers_data_recipe_and_licence_and_no_path(folder, trained):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\nlibrary_name: timm\n") and "# tiny\n" in card
    assert "a folder called `data`" in card and "ant, bee, cat" in card
    assert "TRAIN.EPOCHS: 1\n" in card and re.search(r"EMA weights|ema weights|raw weights", card)
    assert str(trained.parent) not in card and "tmp" not in (folder / "config.json").read_text()


def test_classes_of_imagenet_are_ids_with_words(trained, tmp_path):
    content = load_file(trained) | {"classes": ["n01440764", "n01443537", "n01484850"]}
    torch.save(content, tmp_path / "ckpt.pth")
    convert(tmp_path / "ckpt.pth", "hub", tmp_path / "hub")
    described = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert described["label_names"][0] == "n01440764" and "tench" in described["label_descriptions"]["n01440764"]


def test_names_of_any_letters_are_shown_and_kept(trained, tmp_path):
    names = ["<b>a</b>", "b: `c` | _d_ #", "caf\udce9\n---\n# e"]
    torch.save(load_file(trained) | {"classes": names}, tmp_path / "ckpt.pth")
    convert(tmp_path / "ckpt.pth", "hub", tmp_path / "hub", name="# a | b", license="other: [mine]")
    card = (tmp_path / "hub" / "README.md").read_text()
    header, _, text = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(header)["license"] == "other: [mine]" and text.startswith("# \\# a \\| b\n")
    assert r"order: \<b\>a\</b\>, b: \`c\` \| \_d\_ \#, caf\\udce9\\n---\\n\# e." in text
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["label_names"] == names
    assert tasks.load_model(tmp_path / "hub").classes == names


def test_released_weights_get_the_variants_configuration(tmp_path):
    network = timm.create_model("groupmixformer_miny", num_classes=5).eval()
    torch.save({"model": network.state_dict()}, tmp_path / "released.pth")
    convert(tmp_path / "released.pth", "hub", tmp_path / "hub")
    described = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert described["architecture"] == f"groupmixformer_miny.{HUB_TAG}" and "label_names" not in described
    assert described["pretrained_cfg"]["input_size"] == [3, 224, 224]
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), network(images))
    assert "Not stored with these weights" in (tmp_path / "hub" / "README.md").read_text()


def test_what_is_wrong_is_one_line(trained, folder, tmp_path, capsys):
    other = GroupMixFormer(3, embed_dims=(30, 30), depths=(1, 1), mlp_ratios=(2, 2))
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    assert "name its YAML file with --cfg" in message_of(convert, tmp_path / "other.pth", "hub", tmp_path / "a")
    torch.save({"model": {k: v for k, v in load_file(trained)["model"].items() if "head" not in k}}, tmp_path / "b.pth")
    digits = str(runs.ROOT / "configs" / "groupmixformer_digits.yaml")
    assert "takes classifiers" in message_of(convert, tmp_path / "b.pth", "hub", tmp_path / "a", cfg=digits)
    assert main([str(trained), "--to", "hub", "--output", str(folder), "--license", "mit"]) == 2
    assert "README.md: already exists with other content" in capsys.readouterr().err
    assert main([str(trained), "--to", "hub", "--output", str(folder), "--license", "cc-by-4.0"]) == 0
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "broken" / "config.json").write_text("{")
    assert "config.json: does not describe" in message_of(load_file, tmp_path / "broken")


def process(cwd: Path, script: str, *paths: Path) -> subprocess.CompletedProcess:
    environment = {"PATH": "", "HOME": str(cwd), "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(map(str, paths))}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.launch
def test_a_process_of_torch_timm_and_the_one_module_gives_equal_logits(folder, trained, tmp_path):
    site = tmp_path / "site"
    copy = tmp_path / "copy"  # building leaves folders behind
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(site), str(copy)], check=True, capture_output=True, timeout=300)
    images = torch.randn(2, 3, 48, 48)
    torch.save((images, own_network(trained)(images).detach()), tmp_path / "expected.pth")
    card = (folder / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    Image.new("RGB", (60, 50)).save(tmp_path / "photo.jpg")
    code = code.replace("FOLDER", str(folder)).replace("photo.jpg", str(tmp_path / "photo.jpg"))
    script = f"""{code}
import sys, torch
images, expected = torch.load({str(tmp_path / "expected.pth")!r})
assert torch.equal(model(images), expected) and list(classes) == ["ant", "bee", "cat"]
assert groupmixformer.__file__.startswith({str(site)!r}) and not {{"configs", "utils", "models"}} & set(sys.modules)
print(probabilities.shape)
"""
    result = process(tmp_path, script, site)
    assert result.returncode == 0 and result.stdout == "torch.Size([1, 3])\n", result.stderr

    result = process(tmp_path, f"import timm; timm.create_model('local-dir:{folder}', pretrained=True)")
    said = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and "needs pip install of this folder, then import groupmixformer" in said
