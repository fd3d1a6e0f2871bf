"""Data sets from folders, tars and lists; samplers; images that cannot be read."""

import io
import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from timm.data import auto_augment
from torch.utils.data import DataLoader

from conftest import parse, write_images, write_tar
from datasets import ImageTar, build_collate, build_dataset, build_transform
from runtime import UserError
from samplers import RASampler, ShardSampler


def build(split, root, *flags):
    args = parse("--data-path", root, "--data-set", "FOLDER", "--input-size", 32, *flags)
    return build_dataset(split == "train", args)


def contents(dataset):
    return [(image, target) for image, target in dataset]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, b) and x == y for (a, x), (b, y) in zip(first, second, strict=True)
    )


# Folders and tars

ARCNAMES = {
    "plain": "",
    "dotted": "./",
    "in a folder": "any/",
    "in folders": "any/where/val/",
    "absolute": "/any/where/val/",
}


@pytest.mark.parametrize("layout", [*ARCNAMES, "tar of tars", "tar of tars in folders", "tar of tars of folders"])
def test_a_tar_yields_the_same_samples_as_its_folder_in_the_same_order(image_root, tmp_path, layout):
    folder, _ = build("val", image_root)
    if layout in ARCNAMES:
        write_tar(tmp_path / "val.tar", image_root / "val", ARCNAMES[layout])
    else:
        for name in ("cat", "ant", "bee"):
            write_tar(tmp_path / f"{name}.tar", image_root / "val" / name, name if "of folders" in layout else "")
        with tarfile.open(tmp_path / "val.tar", "w") as tar:
            for name in ("cat", "ant", "bee"):
                tar.add(tmp_path / f"{name}.tar", f"{'a/b/' if 'in folders' in layout else ''}{name}.tar")
    tar, nb_classes = build("val", tmp_path, "--load-tar")
    assert nb_classes == 3 and tar.classes == folder.classes == ["ant", "bee", "cat"]
    assert len(tar) == 24 and same(contents(tar), contents(folder))


def test_several_workers_read_the_same_from_a_tar(image_root):
    dataset, _ = build("val", image_root, "--load-tar")
    dataset[0]  # opens the file before the workers start
    loader = DataLoader(dataset, 1, num_workers=2)
    assert same([(image[0], int(target)) for image, target in loader], contents(dataset))
    assert same(contents(pickle.loads(pickle.dumps(dataset))), contents(dataset))  # as a spawned worker gets it


def test_no_file_is_written_beside_a_tar(image_root, tmp_path):
    shutil.copy(image_root / "val.tar", tmp_path)
    build("val", tmp_path, "--load-tar")
    assert os.listdir(tmp_path) == ["val.tar"]


@pytest.mark.parametrize("data_set", ["FOLDER", "IMNET"])
@pytest.mark.parametrize("evaluation", [[], ["--eval"]])
@pytest.mark.parametrize("flags", [[], ["--load-tar"]])
def test_validation_classes_are_numbered_as_in_training(tmp_path, flags, evaluation, data_set):
    write_images(tmp_path / "train", ("a", "b", "c", "d"), 1)
    write_images(tmp_path / "val", ("b", "d"), 1)
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}.tar", tmp_path / split)
    classes = {"FOLDER": 4, "IMNET": 1000}[data_set]
    dataset, nb_classes = build("val", tmp_path, *flags, *evaluation, "--data-set", data_set)
    assert nb_classes == classes and [target for _, target in dataset] == [1, 3]
    assert build("train", tmp_path, *flags, "--data-set", data_set)[1] == classes


@pytest.mark.parametrize("flags", [[], ["--load-tar"]])
def test_a_validation_class_that_is_missing_in_training_is_named(tmp_path, flags):
    write_images(tmp_path / "train", ("a", "b"), 1)
    write_images(tmp_path / "val", ("a", "zebra"), 1)
    for split in ("train", "val"):
        write_tar(tmp_path / f"{split}.tar", tmp_path / split)
    with pytest.raises(UserError, match="1 classes that are missing in training, such as zebra"):
        build("val", tmp_path, *flags)


def test_imnet_has_a_thousand_classes_and_folder_counts_them(image_root, tmp_path):
    assert build("val", image_root, "--data-set", "IMNET")[1] == 1000
    for number in range(1001):
        (tmp_path / "val" / str(number)).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "val" / str(number) / "0.png")
    assert build("val", tmp_path)[1] == 1001
    with pytest.raises(UserError, match="1001 classes, but --data-set IMNET has 1000: use --data-set FOLDER"):
        build("val", tmp_path, "--data-set", "IMNET")


# Tars that cannot be read


def test_a_truncated_tar_is_refused_wherever_it_ends(image_root, tmp_path):
    whole = (image_root / "val.tar").read_bytes()
    with tarfile.open(image_root / "val.tar") as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    cuts = [0, 100, members[3].offset, members[3].offset + 200, members[3].offset_data + 100, end - 600, end]
    for number, cut in enumerate(cuts):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "val.tar").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="val.tar is truncated"):
            build("val", tmp_path / str(number), "--load-tar")


def test_a_truncated_tar_inside_a_tar_is_named(image_root, tmp_path):
    write_tar(tmp_path / "ant.tar", image_root / "val" / "ant")
    (tmp_path / "ant.tar").write_bytes((tmp_path / "ant.tar").read_bytes()[:-9000])
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(tmp_path / "ant.tar", "ant.tar")
    with pytest.raises(UserError, match=r"tar ant.tar in .*val.tar is truncated"):
        build("val", tmp_path, "--load-tar")


def test_a_damaged_header_in_a_tar_is_not_mistaken_for_its_end(image_root, tmp_path):
    with tarfile.open(image_root / "val.tar") as tar:
        offset = tar.getmembers()[5].offset
    data = bytearray((image_root / "val.tar").read_bytes())
    data[offset : offset + 512], data[offset + 512 : offset + 1024] = b"x" * 512, bytes(512)
    (tmp_path / "val.tar").write_bytes(data)
    with pytest.raises(UserError, match="val.tar is truncated or damaged"):
        build("val", tmp_path, "--load-tar")


def test_a_compressed_tar_is_refused(image_root, tmp_path):
    with tarfile.open(tmp_path / "val.tar", "w:gz") as tar:
        tar.add(image_root / "val", "")
    with pytest.raises(UserError, match="compressed"):
        build("val", tmp_path, "--load-tar")


def test_a_tar_without_class_folders_or_images_is_refused(image_root, tmp_path):
    write_tar(tmp_path / "val.tar", image_root / "val" / "ant" / "more")
    with pytest.raises(UserError, match="5.png in .*val.tar is in no class folder"):
        build("val", tmp_path, "--load-tar")
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "train.tar", tmp_path / "empty")
    with pytest.raises(UserError, match="train.tar holds no images"):
        build("train", tmp_path, "--load-tar")


def tar_of(path, names):
    """A tar with one image under each name."""
    data = io.BytesIO()
    Image.new("RGB", (40, 40)).save(data, "PNG")
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))
    return path


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["train/ant/1.png", "train/bee/1.png", "meta/logo.png"],
            "train/ant/1.png in .* is too deep, because folder train holds no image",
        ),
        (["train/ant/1.png", "train/bee/1.png", "val/ant/1.png"], "is too deep, because folder train"),
        (
            ["train/ant/1.png", "train/bee/1.png", "train/logo.png"],
            "are in one class folder, train, some of them in subfolders, such as train/ant/1.png",
        ),
        (["train/ant/1.png", "train/bee/1.png", "logo.png"], "logo.png in .* is in no class folder"),
    ],
)
def test_a_tar_with_another_layout_is_refused_and_the_error_shows_the_expected_one(tmp_path, names, words):
    tar_of(tmp_path / "train.tar", names)
    with pytest.raises(UserError, match=f"{words}.*: a tar must hold CLASS/IMAGE"):
        build("train", tmp_path, "--load-tar")


def test_a_tar_with_a_single_class_is_read(tmp_path):
    tar_of(tmp_path / "val.tar", ["val/ant/1.png", "val/ant/2.png"])
    assert build("val", tmp_path, "--load-tar")[0].classes == ["ant"]


def test_hard_links_in_a_tar_yield_the_images_that_they_link_to(tmp_path):
    write_images(tmp_path / "val", ("ant", "bee"), 3)
    os.link(tmp_path / "val" / "bee" / "2.png", tmp_path / "val" / "ant" / "9.png")
    write_tar(tmp_path / "val.tar", tmp_path / "val", "/any/val")
    with tarfile.open(tmp_path / "val.tar") as tar:
        assert sum(member.islnk() for member in tar) == 1
    tar, folder = (build("val", tmp_path, *flags)[0] for flags in (["--load-tar"], []))
    assert len(tar) == 7 and same(contents(tar), contents(folder))


def append(path, name, kind, linkname=""):
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, linkname
        tar.addfile(member)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "ant/3.png in tar .* is a symbolic link, which cannot be read"),
        (tarfile.GNUTYPE_SPARSE, "ant/3.png in tar .* is a sparse file, which cannot be read"),
        (tarfile.LNKTYPE, "ant/3.png in tar .* is a hard link to ant/none.png, which is not in the tar"),
    ],
)
def test_a_tar_member_without_content_of_its_own_is_named(tmp_path, kind, words):
    append(tar_of(tmp_path / "val.tar", ["ant/1.png", "bee/1.png"]), "ant/3.png", kind, "ant/none.png")
    with pytest.raises(UserError, match=words):
        build("val", tmp_path, "--load-tar")


@pytest.mark.parametrize("flags", [[], ["--load-tar"]])
def test_attribute_files_of_macos_are_no_images(tmp_path, flags):
    write_images(tmp_path / "val", ("ant", "bee"), 2)
    (tmp_path / "val" / "ant" / "._1.png").write_bytes(b"attributes")
    write_tar(tmp_path / "val.tar", tmp_path / "val")
    assert len(contents(build("val", tmp_path, *flags)[0])) == 4


@pytest.mark.parametrize("flags", [[], ["--load-tar"]])
@pytest.mark.parametrize("folder", [".ipynb_checkpoints", "ant/.ipynb_checkpoints", ".Trash/bee"])
def test_hidden_folders_are_no_classes_and_hold_no_images(tmp_path, capsys, flags, folder):
    root = tmp_path / ".cache"  # what the data set lies in may be hidden
    for split in ("train", "val"):
        write_images(root / split, ("ant", "bee"), 2)
        (root / split / folder).mkdir(parents=True)
        shutil.copy(root / split / "ant" / "0.png", root / split / folder / "0-checkpoint.png")
        write_tar(root / f"{split}.tar", root / split, "mnt/.data")
        dataset, nb_classes = build(split, root, *flags)
        assert nb_classes == 2 and dataset.classes == ["ant", "bee"] and len(dataset) == 4
        (note,) = capsys.readouterr().out.splitlines()
        assert note.startswith(f"note: 1 images in hidden folders of {root / split}")
        assert note.endswith(f"{folder}/0-checkpoint.png")


def test_an_empty_hidden_folder_is_no_class(tmp_path, capsys):
    write_images(tmp_path / "val", ("ant", "bee"), 2)
    (tmp_path / "val" / ".ipynb_checkpoints").mkdir()
    assert build("val", tmp_path)[1] == 2 and not capsys.readouterr().out


def test_images_outside_of_class_folders_are_refused(tmp_path):
    write_images(tmp_path / "all", ("ant",), 2)
    shutil.move(tmp_path / "all" / "ant", tmp_path / "val")
    with pytest.raises(UserError) as caught:
        build("val", tmp_path)
    assert str(caught.value) == (f"{tmp_path}/val is not a folder of class folders with images: it has no class folder")


@pytest.mark.parametrize("flags", [[], ["--load-tar"]])
def test_images_of_kinds_that_are_not_read_are_counted_in_a_note(tmp_path, capsys, flags):
    write_images(tmp_path / "val", ("ant", "bee"), 2)
    for name in ("a.gif", "b.JFIF", "notes.txt", "._c.heic"):
        shutil.copy(tmp_path / "val" / "ant" / "0.png", tmp_path / "val" / "bee" / name)
    write_tar(tmp_path / "val.tar", tmp_path / "val")
    assert len(build("val", tmp_path, *flags)[0]) == 4
    (note,) = capsys.readouterr().out.splitlines()
    assert note.startswith(f"note: 2 images in {tmp_path / 'val'}") and "bee/a.gif: save them as one of .jpg" in note


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        (["1", "2", "10"], "so 10 is class 1, counted from 0"),
        (["c2", "c10"], "so c10 is class 0"),
        (["01", "02", "10"], None),
        (["1", "2"], None),
        (["1", "2", "ten"], None),
        (["a2", "b10"], None),
    ],
)
def test_classes_whose_order_by_name_is_not_that_of_their_numbers_are_noted(tmp_path, capsys, classes, said):
    for split in ("train", "val"):
        write_images(tmp_path / split, classes, 1)
    for split, flags, notes in (("train", [], 1), ("val", ["--eval"], 1), ("val", [], 0)):
        assert build(split, tmp_path, *flags)[0].classes == sorted(classes)
        out = capsys.readouterr().out
        assert out.count("note: ") == (notes if said else 0) and (not notes or (said or "") in out)


# Images that cannot be read


@pytest.fixture
def broken(tmp_path):
    """A truncated image and a text file with an image's suffix, and their tar."""
    write_images(tmp_path / "val", ("ant",), 2)
    data = (tmp_path / "val" / "ant" / "0.png").read_bytes()
    (tmp_path / "val" / "ant" / "cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "val" / "ant" / "text.jpg").write_text("no image")
    write_tar(tmp_path / "val.tar", tmp_path / "val")
    return tmp_path


@pytest.mark.parametrize(("name", "workers"), [("cut.png", 0), ("text.jpg", 0), ("cut.png", 1)])
@pytest.mark.parametrize("flags", [[], ["--load-tar"]])
def test_an_unreadable_image_is_named_with_and_without_workers(broken, flags, workers, name):
    dataset, _ = build("val", broken, *flags)
    index = ["0.png", "1.png", "cut.png", "text.jpg"].index(name)
    with pytest.raises(UserError) as caught:
        list(DataLoader(dataset, sampler=[index], num_workers=workers))
    where = f"ant/{name} in {broken}/val.tar" if flags else f"{broken}/val/ant/{name}"
    assert str(caught.value).startswith(f"image {where} cannot be read: ") and "\n" not in str(caught.value)


def test_an_image_truncated_in_a_tar_is_named(image_root, tmp_path):
    shutil.copy(image_root / "val.tar", tmp_path)
    dataset = ImageTar(str(tmp_path / "val.tar"), lambda image: image)
    os.truncate(tmp_path / "val.tar", int(dataset.index.offsets[4]) + 50)  # after the scan
    with pytest.raises(UserError, match=r"image .* in .*val.tar cannot be read"):
        dataset[4]


# Transforms


def test_validation_resizes_by_256_over_224_and_crops_the_centre():
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (500, 700, 3), np.uint8))
    for size, resized in ((224, 256), (384, 438), (32, 36)):
        side = image.resize((700 * resized // 500, resized), Image.BICUBIC)
        left, top = round((side.width - size) / 2), round((side.height - size) / 2)
        crop = np.asarray(side.crop((left, top, left + size, top + size)), np.float32) / 255
        expected = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        result = build_transform(False, parse("--input-size", size))(image)
        assert np.allclose(result, expected.transpose(2, 0, 1), atol=1e-5)


def test_resplit_erases_only_in_the_second_half_of_a_batch():
    samples = [(torch.full((3, 32, 32), 9.0), 0)] * 8
    images, _ = build_collate(parse("--resplit", "--reprob", 1))(samples)
    changed = [(image != 9).any().item() for image in images]
    assert changed == [False] * 4 + [True] * 4


# Samplers


@pytest.mark.parametrize("n_images", [1000, 300])
def test_repeated_augmentation_samples_the_published_share_of_the_copies(n_images):
    for processes in (1, 2, 3):
        samplers = [RASampler(range(n_images), processes, rank) for rank in range(processes)]
        for epoch in (0, 5):
            for sampler in samplers:
                sampler.set_epoch(epoch)
            shares = [list(sampler) for sampler in samplers]
            count = n_images // 256 * 256 // processes
            assert [len(share) for share in shares] == [len(s) for s in samplers] == [count] * processes
            dealt = [index for turn in zip(*shares, strict=True) for index in turn]
            assert all(len(set(dealt[i : i + 3])) == 1 for i in range(0, len(dealt) - 2, 3))
            assert len(set(dealt)) == -(-len(dealt) // 3)
    other = RASampler(range(n_images), 1, 0)
    first = list(other)
    other.set_epoch(1)
    assert list(other) != first


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0"])
def test_pillow_accepts_every_magnitude_of_an_augmentation(policy):
    transform = build_transform(True, parse("--aa", policy)).transforms
    for operation in next(t for t in transform if hasattr(t, "ops")).ops:
        operation.prob = 1.0
        operation(Image.new("RGB", (8, 8), "red"))
    assert (
        auto_augment.NAME_TO_OP["PosterizeIncreasing"](Image.new("RGB", (8, 8), "red"), 0).getextrema() == ((0, 0),) * 3
    )


def test_repeated_augmentation_of_a_small_data_set_draws_as_many_samples_as_it_has_images():
    assert [len(RASampler(range(100), 3, rank)) for rank in range(3)] == [34] * 3


def test_shards_are_a_partition_for_any_number_of_ranks():
    for length in (0, 1, 7, 24):
        for processes in (1, 2, 3, 8):
            shards = [list(ShardSampler(range(length), processes, rank)) for rank in range(processes)]
            assert sorted(index for shard in shards for index in shard) == list(range(length))


# CIFAR and iNaturalist


def test_cifar_without_files_says_what_to_download_and_where(tmp_path):
    with pytest.raises(UserError, match=r"cifar-100-python: download https://\S+python.tar.gz and unpack it in "):
        build("train", tmp_path, "--data-set", "CIFAR")


@pytest.mark.parametrize("size", [32, 64])
def test_cifar_has_a_hundred_classes_and_keeps_its_own_size(tmp_path, monkeypatch, size):
    cifar = torchvision.datasets.CIFAR100
    pixels = np.random.RandomState(0).randint(0, 255, (2, 3072), np.uint8)
    (tmp_path / cifar.base_folder).mkdir()
    for name in ("train", "test"):
        (tmp_path / cifar.base_folder / name).write_bytes(pickle.dumps({"data": pixels, "fine_labels": [7, 99]}))
    (tmp_path / cifar.base_folder / "meta").write_bytes(pickle.dumps({"fine_label_names": ["x"] * 100}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5: True)
    dataset, nb_classes = build("val", tmp_path, "--data-set", "CIFAR", "--input-size", size)
    assert nb_classes == 100 and [target for _, target in dataset] == [7, 99] and dataset[0][0].shape == (3, size, size)
    if size == 32:
        colours = dataset[0][0].permute(1, 2, 0).numpy() * [0.229, 0.224, 0.225] + [0.485, 0.456, 0.406]
        assert np.allclose(colours, pixels[0].reshape(3, 32, 32).transpose(1, 2, 0) / 255, atol=1e-6)
    train, _ = build("train", tmp_path, "--data-set", "CIFAR", "--input-size", size)
    assert train[0][0].shape == (3, size, size)
    assert isinstance(train.transform.transforms[0], torchvision.transforms.RandomCrop) == (size == 32)


@pytest.mark.parametrize(("data_set", "year"), [("INAT", 2018), ("INAT19", 2019)])
def test_inaturalist_numbers_the_values_of_the_chosen_level(tmp_path, data_set, year):
    write_images(tmp_path / "images", ("a",), 3)
    categories = [
        {"id": 0, "name": "z", "genus": "g"},
        {"id": 1, "name": "y", "genus": "g"},
        {"id": 2, "name": "x", "genus": "f"},
    ]
    listing = {
        "images": [{"id": 10 + i, "file_name": f"images/a/{i}.png"} for i in range(3)],
        "annotations": [{"image_id": 12 - i, "category_id": i} for i in range(3)],
    }
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    (tmp_path / f"val{year}.json").write_text(json.dumps(listing))
    dataset, nb_classes = build("val", tmp_path, "--data-set", data_set)
    assert nb_classes == 3 and [target for _, target in dataset] == [2, 1, 0]
    assert [name for name, _ in dataset.samples] == [f"images/a/{i}.png" for i in (2, 1, 0)]
    genus, nb_classes = build("val", tmp_path, "--data-set", data_set, "--inat-category", "genus")
    assert nb_classes == 2 and [target for _, target in genus.samples] == [1, 1, 0]
    with pytest.raises(UserError, match="lack --inat-category 'family'"):
        build("val", tmp_path, "--data-set", data_set, "--inat-category", "family")
    with pytest.raises(UserError, match=f"train{year}.json cannot be read"):
        build("train", tmp_path, "--data-set", data_set)
