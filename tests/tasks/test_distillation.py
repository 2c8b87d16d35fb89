"""DISTILL: a teacher's logits beside the labels."""

import json

import pytest
import runs
import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision.transforms.functional import normalize

from configs import UserError, with_num_classes
from data.normalization import pixel_statistics
from tasks.classification.distillation import Teacher, distillation_loss
from utils.checkpoint import load_file

TEACHER = "test_vit"  # timm's for tests: fixed image size, pixels from -1 to 1
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Of a teacher of three classes and images of 32 pixels."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    network = timm.create_model(TEACHER, num_classes=3, img_size=32)
    torch.save({"state_dict": {name: 3 * value for name, value in network.state_dict().items()}}, path)
    return path


@pytest.fixture
def config_of(make_config, weights):
    def build(*opts, name=TEACHER, path=weights, classes=3):
        words = ("DISTILL.TEACHER", name, "DISTILL.WEIGHTS", path, *opts)
        return with_num_classes(make_config("--opts", *runs.TINY, *words), classes)

    return build


def test_logits_are_those_of_timms_network(config_of, weights):
    """The student's normalisation is undone for the teacher's; no gradient reaches the teacher."""
    network = timm.create_model(TEACHER, num_classes=3, img_size=32).eval()
    network.load_state_dict(load_file(weights)["state_dict"])
    pixels = torch.rand(2, 3, 32, 32)
    expected = network(normalize(pixels, [0.5] * 3, [0.5] * 3))
    teacher = Teacher(config_of(), CPU)
    logits = teacher(normalize(pixels, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD).requires_grad_())
    torch.testing.assert_close(logits, expected)
    assert not logits.requires_grad and not teacher.network.training
    assert expected.std() > 0.1


@pytest.mark.parametrize(("name", "mean", "std"), [(TEACHER, 0.5, 0.5), ("test_efficientnet", None, None)])
def test_a_teacher_of_grey_images(config_of, tmp_path, name, mean, std):
    """Its stem for colour is summed; grey values are normalised by the means over its colours."""
    torch.manual_seed(0)
    path, size = tmp_path / "weights.pth", {"img_size": 32} if name == TEACHER else {}
    torch.save({"state_dict": timm.create_model(name, num_classes=3, **size).state_dict()}, path)
    teacher = Teacher(config_of("MODEL.GMA.IN_DIM", "1", name=name, path=path), CPU)
    grey = torch.rand(2, 1, 32, 32)
    (usual_mean,), (usual_std,) = pixel_statistics(1)
    images = normalize(grey, [usual_mean], [usual_std])
    expected = teacher.network(normalize(grey, [mean or usual_mean], [std or usual_std]))
    torch.testing.assert_close(teacher(images), expected)
    assert mean or torch.equal(teacher(images), teacher.network(images)), "with the same statistics, the same bits"


def test_other_names_of_classes_are_one_line(config_of, tmp_path):
    """Classes in another order would teach each the outputs of another."""
    path, notices = tmp_path / "ckpt_best.pth", []
    weights = timm.create_model("groupmixformer_miny", num_classes=3).state_dict()
    torch.save({"model": weights, "classes": ["ant", "bee", "cat"]}, path)
    config = config_of(name="groupmixformer_miny", path=path)
    Teacher(config, CPU, ["ant", "bee", "cat"], notices.append)
    assert notices == []
    Teacher(config, CPU, ["ant", "cat", "bee"], notices.append)
    (line,) = notices
    assert line.startswith(f"DISTILL.WEIGHTS {path}: 2 of its 3 classes have other names than the data's, the first")


def test_a_teacher_of_this_family_from_a_checkpoint(config_of, tmp_path):
    """Names as checkpoints have them; of its weights, those that the checkpoint was kept for."""
    torch.manual_seed(0)
    raw, ema = (timm.create_model("groupmixformer_miny", num_classes=3).eval() for _ in range(2))
    path = tmp_path / "ckpt_best.pth"
    torch.save({"model": raw.state_dict(), "model_ema": ema.state_dict(), "best_weights": "ema"}, path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(Teacher(config_of(name="groupmixformer_miny", path=path), CPU)(images), ema(images))


def test_the_loss_by_hand(config_of):
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    p, q = ((x / 3).softmax(1) for x in (teacher, student))
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(config_of("DISTILL.TEMPERATURE", "3"), student, teacher), expected)
    hard = distillation_loss(config_of("DISTILL.KIND", "hard"), student, teacher)
    torch.testing.assert_close(hard, F.cross_entropy(student, teacher.argmax(1)))


def test_the_teacher_sees_the_students_images_and_is_in_no_checkpoint(data, tmp_path, monkeypatch, weights):
    """A share of 0 ends with the bits of a run without a teacher; one that is stopped, with those of its own."""
    seen = []
    call = Teacher.__call__

    def watched(teacher, images):
        seen.append((images, teacher.network.training))
        return call(teacher, images)

    monkeypatch.setattr(Teacher, "__call__", watched)

    def run(name, *opts, stop_at=None):
        args = runs.arguments(data, tmp_path / name, *opts)
        assert runs.train_here(monkeypatch, args, stop_at) == (0 if stop_at is None else 75)
        return runs.run_folder(tmp_path / name)

    def inputs_of(number, network):
        network.conv_stem.register_forward_pre_hook(lambda _, args: shown.append(args[0]))

    distill = ("DISTILL.TEACHER", TEACHER, "DISTILL.WEIGHTS", str(weights))
    plain, none = run("plain"), run("none", *distill, "DISTILL.WEIGHT", "0")
    for name in ("ckpt_epoch_1.pth", "ckpt_best.pth"):
        leave_out = ("progress",)  # has the parts of the loss
        assert runs.digest(plain / name, leave_out) == runs.digest(none / name, leave_out)

    seen.clear()
    shown = []
    with monkeypatch.context() as patch:
        runs.in_update(patch.setattr, inputs_of)
        run("watched", *distill, stop_at=1)
    (_, _), (images, training) = seen  # the first is the trial before training
    assert torch.equal(images, shown[0]) and not training

    distill = (*distill, "DISTILL.KIND", "hard", "DISTILL.WEIGHT", "0.3")
    one = run("one", *distill)
    line = json.loads((one / "metrics.jsonl").read_text().splitlines()[0])
    assert line["train_loss"] == pytest.approx(0.7 * line["train_labels"] + 0.3 * line["train_teacher"], rel=1e-5)
    assert line["train_labels"] != pytest.approx(line["train_teacher"], rel=1e-3)
    assert "\tlabels " in (one / "log_rank0.txt").read_text() and "\tteacher " in (one / "log_rank0.txt").read_text()
    run("two", *distill, stop_at=3)
    run("two", *distill)
    ends = [runs.final_state(tmp_path / name, 2) for name in ("one", "two", "plain")]
    assert ends[0] == ends[1] != ends[2]


def test_a_teacher_takes_all_sizes_of_training_or_is_refused(config_of, tmp_path):
    sizes = ("DATA.IMG_SIZE", "48", "DATA.TRAIN_SIZES", "[[48, 0], [40, 1]]")
    path = tmp_path / "weights.pth"
    for name, options in ((TEACHER, {"img_size": 48}), ("test_convnext", {})):
        torch.save({"state_dict": timm.create_model(name, num_classes=3, **options).state_dict()}, path)
        if name == TEACHER:
            with pytest.raises(UserError, match=r"does not take images of 40 x 40"):
                Teacher(config_of(*sizes, name=name, path=path), CPU)
        else:
            Teacher(config_of(*sizes, name=name, path=path), CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(name="resnet17"), r"TEACHER = 'resnet17': timm has no such network; did you mean resnet1"),
        (dict(name="test_resnet"), r"teacher.pth: no weights of test_resnet for 3 classes: .*Missing key"),
        (dict(classes=4), r"teacher.pth: no weights of test_vit for 4 classes: .*size mismatch"),
        (dict(path="none.pth"), r"none.pth: no such file"),
    ],
)
def test_what_does_not_fit_is_told_before_training(config_of, change, message):
    with pytest.raises(UserError, match=message) as caught:
        Teacher(config_of(**change), CPU)
    assert "\n" not in str(caught.value)


def test_a_teacher_without_weights_is_refused_and_weights_without_a_teacher(make_config):
    with pytest.raises(
        UserError, match=r"DISTILL.TEACHER = 'resnet18': needs a file of its weights in DISTILL.WEIGHTS"
    ):
        make_config("--opts", "DISTILL.TEACHER", "resnet18")
    with pytest.raises(UserError, match=r"^DISTILL.WEIGHTS = 'w.pth': are weights of a teacher; name its network in"):
        make_config("--opts", "DISTILL.WEIGHTS", "w.pth")
