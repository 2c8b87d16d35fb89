"""Pascal VOC and YOLO become COCO's JSON, which the detection task reads."""

import json

import detection_data
import pytest
from image_data import message_of
from PIL import Image

from tasks.detection.coco import open_split
from tasks.detection.images import TrainImages
from tasks.detection.metrics import score as score_of
from tools.prepare.__main__ import main
from tools.prepare.annotations import convert, read_voc, read_yolo

VOC = """<annotation><filename>{name}.jpg</filename>
<object><name>cat</name><bndbox><xmin>3</xmin><ymin>5</ymin><xmax>12</xmax><ymax>24</ymax></bndbox></object>
</annotation>"""


def picture(path, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


@pytest.fixture
def voc(tmp_path):
    for number in range(5):
        picture(tmp_path / "JPEGImages" / f"{number}.jpg")
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        (tmp_path / "Annotations" / f"{number}.xml").write_text(VOC.format(name=number))
    return tmp_path


@pytest.fixture
def yolo(tmp_path):
    for split in ("train", "valid"):
        for name in ("a", "b"):
            picture(tmp_path / split / "images" / f"{name}.png")
        (tmp_path / split / "labels").mkdir()
        (tmp_path / split / "labels" / "a.txt").write_text("1 0.5 0.5 0.2 0.4\n0 0.1 0.1 0.5 0.1 0.5 0.9\n")
    (tmp_path / "data.yaml").write_text("names: [dog, cat]\n")
    return tmp_path


def test_voc_becomes_a_data_set_that_trains(voc, capsys):
    assert main(["voc", "--data-path", str(voc)]) == 0
    written = capsys.readouterr().out
    assert "instances_train.json: 4 pictures, 4 objects" in written
    assert written.endswith(f"1 classes: cat\nready: --data-path {voc}\n")
    split = open_split(detection_data.config_of("--data-path", voc), "val")
    assert split.file(0) == voc / "JPEGImages" / "4.jpg" and split.file(0).is_file()
    assert split.categories == {1: "cat"} and split.objects(0)[0]["bbox"] == [2, 4, 10, 20]


@pytest.mark.parametrize("form", ["voc", "yolo"])
def test_training_on_boxes_as_they_come_names_the_command(form, request, tmp_path):
    request.getfixturevalue(form)
    message = message_of(open_split, detection_data.config_of("--data-path", tmp_path), "train")
    command = f"python -m tools.prepare {form} --data-path {tmp_path}"
    assert message.endswith(f"run {command}") and main(command.split()[3:]) == 0
    assert len(open_split(detection_data.config_of("--data-path", tmp_path), "train"))


def test_difficult_objects_are_not_learned_and_count_neither_way(voc):
    xml = voc / "Annotations" / "4.xml"
    hard = "<object><name>cat</name><difficult>1</difficult><bndbox><xmin>21</xmin><ymin>1</ymin><xmax>40</xmax>"
    plain = VOC.format(name=4).replace("</name>", "</name><difficult>0</difficult>")
    xml.write_text(plain.replace("</annotation>", f"{hard}<ymax>20</ymax></bndbox></object></annotation>"))
    main(["voc", "--data-path", str(voc)])
    split = open_split(detection_data.config_of("--data-path", voc), "val")
    assert [entry["iscrowd"] for entry in split.objects(0)] == [0, 1]
    targets = TrainImages(split, {1: 1}, lambda *sample: sample, with_masks=False).targets(0)
    assert targets["boxes"].tolist() == [[2, 4, 12, 24]]
    found = [
        {"image_id": 1, "category_id": 1, "bbox": entry["bbox"], "score": score}
        for entry, score in zip(split.objects(0), (0.5, 0.9))
    ]
    assert score_of(split, found[:1], "box").numbers["ap"] == 100  # missed
    assert score_of(split, found, "box").numbers["ap"] == 100  # found, and more surely than the other


def test_voc_keeps_its_splits(voc):
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "ImageSets" / "Main" / "train.txt").write_text("1\n2\n")
    (voc / "ImageSets" / "Main" / "val.txt").write_text("0\n")
    contents = convert(voc, read_voc)
    assert [len(contents[split]["images"]) for split in ("train", "val")] == [2, 1]


def test_yolo_keeps_boxes_polygons_and_pictures_without_objects(yolo):
    contents = convert(yolo, read_yolo)
    train, val = contents["train"], contents["val"]
    assert [image["file_name"] for image in val["images"]] == ["valid/images/a.png", "valid/images/b.png"]
    assert train["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    box, polygon = train["annotations"]
    assert (box["bbox"], box["area"], box["category_id"]) == ([16, 9, 8, 12], 96, 1)
    assert polygon["segmentation"] == [[4, 3, 20, 3, 20, 27]] and polygon["bbox"] == [4, 3, 16, 24]


@pytest.mark.parametrize(
    ("text", "words"),
    [("7 0 0 1 1", "known class"), ("0 a 0 1 1", "known class"), ("0 0 0 1", "four numbers"), ("0 nan 0 1 1", "four")],
)
def test_a_wrong_line_of_yolo_is_named(yolo, text, words):
    (yolo / "train" / "labels" / "a.txt").write_text(text)
    message = message_of(convert, yolo, read_yolo)
    assert words in message and "a.txt, line 1" in message


def test_what_cannot_be_converted_is_one_line(voc, tmp_path):
    assert "data.yaml nor classes.txt" in message_of(convert, voc, read_yolo)
    (voc / "classes.txt").write_text("cat\n")
    assert "has no texts of YOLO" in message_of(convert, voc, read_yolo)
    (voc / "Annotations" / "0.xml").write_text("<annotation>")
    assert "0.xml: not an annotation of Pascal VOC" in message_of(convert, voc, read_voc)
    (voc / "Annotations" / "0.xml").write_text(VOC.format(name="gone"))
    (voc / "JPEGImages" / "0.jpg").unlink()
    assert "its picture, gone.jpg, is not below" in message_of(convert, voc, read_voc)
    (voc / "empty").mkdir()
    assert "holds no annotations" in message_of(convert, voc / "empty", read_voc)


def test_boxes_are_of_the_picture_as_programs_show_it(voc, yolo):
    turned = Image.Exif()
    turned[0x0112] = 6
    for path in (voc / "JPEGImages" / "0.jpg", yolo / "train" / "images" / "a.png"):
        Image.new("RGB", (40, 30)).save(path, exif=turned)

    def sizes(reader):
        images = convert(voc, reader)["train"]["images"]
        return {image["file_name"]: (image["width"], image["height"]) for image in images}

    assert sizes(read_yolo)["train/images/a.png"] == (30, 40)
    path = voc / "Annotations" / "0.xml"
    size = "<annotation><size><width>{}</width><height>{}</height></size>"
    for width, height, expected in ((0, 0, (30, 40)), (30, 40, (30, 40)), (40, 30, (40, 30))):
        path.write_text(VOC.format(name="0").replace("<annotation>", size.format(width, height)))
        assert sizes(read_voc)["JPEGImages/0.jpg"] == expected
    path.write_text(VOC.format(name="0").replace("<annotation>", size.format(80, 60)))
    assert "0.jpg: has 40 x 30 pixels, its annotations are of 80 x 60" in message_of(convert, voc, read_voc)


def test_pictures_of_one_name_keep_their_own_boxes(tmp_path):
    (tmp_path / "c").mkdir()
    for number, folders in enumerate(
        (("train", "train"), ("val", "val"), ("marks/a", "shots/a"), ("marks/b", "shots/b"))
    ):
        marks, shots = (tmp_path / folder for folder in folders)
        picture(shots / "1.jpg", (40 + number, 30))
        marks.mkdir(parents=True, exist_ok=True)
        (marks / "1.xml").write_text(VOC.format(name="1").replace("cat", folders[1]))
    contents = convert(tmp_path, read_voc)
    for content in contents.values():
        names = {category["id"]: category["name"] for category in content["categories"]}
        for image, annotation in zip(content["images"], content["annotations"], strict=True):
            assert image["file_name"] == f"{names[annotation['category_id']]}/1.jpg"
    (tmp_path / "c" / "1.xml").write_text(VOC.format(name="1"))
    assert "c/1.xml: its picture may be" in message_of(convert, tmp_path, read_voc)


def test_test_pictures_validate_only_where_nothing_else_does(yolo, capsys):
    (yolo / "valid").rename(yolo / "test")
    (yolo / "train" / "images" / "._a.png").write_bytes(b"what macOS leaves")
    assert [image["file_name"][:4] for image in convert(yolo, read_yolo)["val"]["images"]] == ["test"] * 2
    picture(yolo / "valid" / "images" / "c.png")
    contents = convert(yolo, read_yolo)
    assert [len(contents[split]["images"]) for split in ("train", "val")] == [2, 1]


def test_wrong_use_is_one_line(tmp_path, capsys):
    assert main(["voc", "--data-path", str(tmp_path / "gone")]) == 2
    assert main(["coco", "--data-path", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_json_is_one_that_others_read(yolo):
    main(["yolo", "--data-path", str(yolo)])
    content = json.loads((yolo / "annotations" / "instances_val.json").read_text())
    assert set(content) == {"info", "images", "annotations", "categories"}


def test_a_json_of_others_is_not_lost(yolo, capsys):
    path = yolo / "annotations" / "instances_val.json"
    path.parent.mkdir()
    path.write_text('{"images": []}')
    assert main(["yolo", "--data-path", str(yolo)]) == 2
    assert "is there already, and not by tools.prepare" in capsys.readouterr().err
    assert path.read_text() == '{"images": []}' and not path.with_name("instances_train.json").exists()
    path.unlink()
    assert main(["yolo", "--data-path", str(yolo)]) == main(["yolo", "--data-path", str(yolo)]) == 0


BOM = b"\xef\xbb\xbf"


def test_texts_as_windows_writes_them(voc, yolo):
    (yolo / "data.yaml").write_bytes(BOM + b"names:\r\n  0: no\r\n  1: cat\r\n")
    (yolo / "train" / "labels" / "a.txt").write_bytes(BOM + b"1 0.5 0.5 0.2 0.4\r\n0 0.5 0.5 0.2 0.4\r\n\r\n")
    names = [category["name"] for category in convert(yolo, read_yolo)["train"]["categories"]]
    assert names == ["cat", "no"]
    (yolo / "data.yaml").unlink()
    (yolo / "classes.txt").write_bytes(BOM + b"no\r\ncat\r\n")
    assert [category["name"] for category in convert(yolo, read_yolo)["train"]["categories"]] == names
    (voc / "ImageSets" / "Main").mkdir(parents=True)
    (voc / "ImageSets" / "Main" / "train.txt").write_bytes(BOM + b"1\r\n2.jpg\r\n")
    for folder, suffix in (("JPEGImages", "jpg"), ("Annotations", "xml")):
        (voc / folder / f"0.{suffix}").rename(voc / folder / f"my cat.{suffix}")
    (voc / "ImageSets" / "Main" / "val.txt").write_bytes(BOM + b"my cat\r\n")
    contents = convert(voc, read_voc)
    assert [len(contents[split]["images"]) for split in ("train", "val")] == [2, 1]
    for split in ("train", "val"):
        (voc / "ImageSets" / "Main" / f"{split}.txt").write_text("others\n")
    assert "ImageSets/Main names none of its XML files" in message_of(convert, voc, read_voc)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("data.yaml", "names: {cat: 0, dog: 1}", "names must be a list"),
        ("data.yaml", "- cat", "must hold keys"),
        ("data.yaml", b"names: [caf\xe9]", "not a text in UTF-8"),
        ("train/labels/a.txt", b"0 .5 .5 .1 \xe9", "not a text in UTF-8"),
        ("train/labels/a.txt", "0 20 15 10 8", "not in pixels"),
        ("train/labels/a.txt", "0 .5 .5 -.1 .1", "shares of the picture"),
        ("train/labels/a.txt", "0 3 4 30 5 20 20", "not in pixels"),
    ],
)
def test_what_yolo_does_not_allow_is_one_line(yolo, file, content, words):
    (yolo / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = message_of(convert, yolo, read_yolo)
    assert words in message and file in message


def test_pictures_without_any_object_are_refused(yolo):
    for split in ("train", "valid"):
        (yolo / split / "labels" / "a.txt").write_text("")
    assert "none of its 4 pictures has an object" in message_of(convert, yolo, read_yolo)


def test_an_unknown_encoding_of_xml_is_named(voc):
    (voc / "Annotations" / "0.xml").write_text(f'<?xml version="1.0" encoding="x-none"?>{VOC.format(name=0)}')
    assert "0.xml: not an annotation" in message_of(convert, voc, read_voc)


def test_texts_without_a_picture_are_counted(yolo, capsys):
    (yolo / "train" / "labels" / "gone.txt").write_text("0 .5 .5 .1 .1")
    assert main(["yolo", "--data-path", str(yolo)]) == 0
    assert "1 texts have no picture that is read, such as" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["folders", "lists", "up", "elsewhere", "same", "root"])
def test_splits_of_yolo_are_those_of_data_yaml(how, tmp_path):
    for number in range(6):
        folder = "a" if number < 4 else "b"
        picture(tmp_path / "images" / folder / f"{number}.jpg")
        (tmp_path / "labels" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "labels" / folder / f"{number}.txt").write_text("0 0.5 0.5 0.2 0.4\n")
        with open(tmp_path / f"{folder}.txt", "a") as file:
            file.write(f"./images/{folder}/{number}.jpg\n")
    splits = {
        "folders": ("images/a", "[images/b]"),
        "lists": ("a.txt", "b.txt"),
        "up": ("../images/a", "../images/b"),
        "elsewhere": ("/gone/a", "/gone/b"),
        "same": ("images/a", "images/a"),
        "root": ("images", "images/b"),
    }
    train, val = splits[how]
    (tmp_path / "data.yaml").write_text(f"path: ../gone\ntrain: {train}\nval: {val}\nnames: [cat]\n")
    found = {split: [i["file_name"] for i in c["images"]] for split, c in convert(tmp_path, read_yolo).items()}
    of_b = [f"images/b/{number}.jpg" for number in (4, 5)]
    assert found["val"] == (["images/b/4.jpg"] if how in ("elsewhere", "same") else of_b)


def test_pictures_in_no_split_of_data_yaml_are_counted(yolo, capsys):
    picture(yolo / "others" / "c.png")
    (yolo / "data.yaml").write_text("train: train/images\nval: valid/images\nnames: [dog, cat]\n")
    assert main(["yolo", "--data-path", str(yolo)]) == 0
    assert f"1 pictures are in no split of {yolo / 'data.yaml'}: they are left out" in capsys.readouterr().out
