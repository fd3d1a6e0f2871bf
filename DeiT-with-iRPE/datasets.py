"""The data sets of ``--data-set``, and the transforms of DeiT's recipe.

This module has its own tar reader. timm's ReaderImageInTar writes a pickled index next to the data and keeps one open
tarfile, whose file position forked workers share. Here the headers are scanned once into arrays, and each image is read
from a newly opened file. The order is torchvision's, so a folder and its tar give equal results.
"""

import argparse
import functools
import glob
import io
import itertools
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torchvision
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch.utils.data import Dataset, default_collate
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS

from images import Oddities, naming, oddities, to_rgb, without_ends
from runtime import UserError, print_once

IMAGENET_CLASSES = 1000
CIFAR_SIZE = 32


def build_dataset(is_train: bool, args: argparse.Namespace) -> tuple[Dataset, int]:
    """The training or validation set that ``args`` describe, and its number of classes.

    Raises ``UserError`` if files are missing or if training and validation have different classes.
    """
    transform = build_transform(is_train, args)
    if not os.path.isdir(args.data_path):
        raise UserError(f"--data-path {args.data_path} is not a folder")
    if args.data_set == "CIFAR":
        return _build_cifar(args.data_path, is_train, transform), 100
    if args.data_set in ("INAT", "INAT19"):
        dataset = INaturalist(
            args.data_path, is_train, 2018 if args.data_set == "INAT" else 2019, args.inat_category, transform
        )
        return dataset, len(dataset.classes)
    dataset = _build_split(is_train, args, transform)
    if is_train or args.eval:  # training reads both splits, and one note is enough
        _note_odd_classes(dataset.classes, args)
    if args.data_set == "FOLDER":
        return dataset, len(dataset.classes)
    if len(dataset.classes) > IMAGENET_CLASSES:
        raise UserError(
            f"{args.data_path} has {len(dataset.classes)} classes, but --data-set IMNET has "
            f"{IMAGENET_CLASSES}: use --data-set FOLDER, which counts them"
        )
    return dataset, IMAGENET_CLASSES


def _note_odd_classes(classes: list[str], args: argparse.Namespace) -> None:
    """Print a note for names or numbers of class folders that are probably a mistake."""
    _note_numbered_classes(classes, args.data_path)
    if args.data_set == "FOLDER" and len(classes) == 1:
        print_once(
            f"note: {args.data_path} has a single class, {classes[0]}, so there is nothing to learn: "
            "--data-path must be the folder whose train/ and val/ hold a folder for each class"
        )
    if args.data_set == "IMNET" and len(classes) < IMAGENET_CLASSES:
        print_once(
            f"note: {args.data_path} has only {len(classes)} class folders, but --data-set IMNET builds a "
            f"model with {IMAGENET_CLASSES} classes; --data-set FOLDER builds one with as many as there are folders"
        )


def _note_numbered_classes(classes: list[str], path: str) -> None:
    """Print a note if names such as 2 and 10, or class2 and class10, do not sort as their numbers do."""
    parts = [re.fullmatch(r"(\D*)([0-9]+)", name) for name in classes]
    if not all(parts) or len({part[1] for part in parts}) != 1:
        return
    ordered = sorted(classes, key=lambda name: int(re.sub(r"\D", "", name)))
    if differing := [name for name, other in zip(classes, ordered, strict=True) if name != other]:
        name = differing[0]
        print_once(
            f"note: the classes of {path} are numbered in the alphabetical order of their names, so {name} is class "
            f"{classes.index(name)}, counted from 0: a checkpoint trained elsewhere, for example with timm, may "
            "number them differently; leading zeros (002, 010) make both orders the same"
        )


# Transforms


def build_transform(is_train: bool, args: argparse.Namespace) -> Callable[[Image.Image], Any]:
    """Transform of one image to a normalised (3, ``args.input_size``, ``args.input_size``) tensor.

    Training uses DeiT's augmentation with the settings of the flags; validation resizes the short side to
    ⌊256/224·size⌋ and crops the centre. CIFAR at its native 32 pixels is instead padded and cropped at random in
    training, and not resized in validation. Raises ``UserError`` for values that timm does not know.
    """
    size = args.input_size
    own_size = args.data_set == "CIFAR" and size == CIFAR_SIZE
    if is_train:
        transform = _train_transform(args)
        if own_size:
            transform.transforms[0] = transforms.RandomCrop(size, padding=4)
        return transform
    resize = (
        []
        if own_size
        else [
            without_ends,
            transforms.Resize(size * 256 // 224, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
        ]
    )
    return transforms.Compose(
        [*resize, transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    )


def _train_transform(args: argparse.Namespace) -> transforms.Compose:
    try:
        transform = create_transform(
            args.input_size,
            is_training=True,
            scale=(args.min_crop, 1.0),
            hflip=args.hflip,
            color_jitter=args.color_jitter,
            auto_augment=None if args.aa in ("", "none") else args.aa,
            interpolation=args.train_interpolation,
            re_prob=0.0 if args.resplit else args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
        )
    except (AssertionError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"--aa {args.aa!r}, --train-interpolation {args.train_interpolation!r} or --remode "
            f"{args.remode!r} is unknown to timm: {str(error) or repr(error)}"
        ) from error
    crop = transform.transforms[0]
    transform.transforms[0] = RandomResizedCrop(crop.size, crop.scale, crop.ratio, args.train_interpolation)
    return transform


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random crop, but at least one pixel large: timm rounds sides down to 0 for images of a few pixels."""

    @staticmethod
    def get_params(img: Image.Image, scale: tuple[float, float], ratio: tuple[float, float]) -> tuple[int, ...]:
        """Top, left, height and width of the crop, in pixels."""
        top, left, height, width = RandomResizedCropAndInterpolation.get_params(img, scale, ratio)
        return min(top, img.height - 1), min(left, img.width - 1), max(1, height), max(1, width)


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's posterize, also for 0 bits, its highest magnitude, for which newer Pillow raises an error."""
    return auto_augment.posterize(image, bits, **options) if bits else image.point(lambda value: 0)


auto_augment.NAME_TO_OP.update(Posterize=_posterize, PosterizeIncreasing=_posterize)


def build_collate(args: argparse.Namespace) -> Callable[[list], Any]:
    """The function that collates training samples; with ``--resplit``, it erases nothing in a batch's first half."""
    if not (args.resplit and args.reprob > 0):
        return default_collate
    erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, num_splits=2, device="cpu")
    return functools.partial(_collate_and_erase, erase)


def _collate_and_erase(erase: RandomErasing, samples: list) -> Any:
    images, targets = default_collate(samples)
    return erase(images), targets


# Images


def load_image(path: str) -> Image.Image:
    """Read an RGB image. Raises ``UserError`` that names the file if it is missing, truncated or not an image."""
    with naming(path):
        return read_image(path)[0]


def read_image(source: str | BinaryIO) -> tuple[Image.Image, int]:
    """Read an RGB image from a path or an open file; returns it and its ``images.oddities``."""
    with Image.open(source) as image:
        return to_rgb(image), oddities(image)


class NamedImages(Dataset):
    """A data set of image files, whose errors name the image.

    A subclass defines ``source(i)``, the path or file of image i, ``target(i)``, its class, and ``name(i)``, its name
    in messages. Its constructor sets ``transform`` and ``oddities``; all workers share the latter.
    """

    transform: Callable[[Image.Image], Any]
    oddities: Oddities

    def __getitem__(self, i: int) -> tuple[Any, int]:
        with naming(self.name(i)):
            image, odd = read_image(self.source(i))
        self.oddities.add(i, odd)
        with naming(self.name(i), "transformed"):
            return self.transform(image), self.target(i)


# Class folders, in a folder or in a tar file


def _build_split(is_train: bool, args: argparse.Namespace, transform: Callable) -> Dataset:
    """DIR/train or DIR/val, or their tar files. Validation uses the class numbers of training."""
    train, val = (os.path.join(args.data_path, split + (".tar" if args.load_tar else "")) for split in ("train", "val"))
    kind = ImageTar if args.load_tar else ImageFolder
    if is_train:
        return kind(train, transform)
    has_train = os.path.isfile(train) if args.load_tar else os.path.isdir(train)
    # Scanning ImageNet's 150 GB of training images takes minutes, which evaluation avoids if val.tar has all classes.
    if has_train and args.load_tar and args.eval and args.data_set == "IMNET":
        has_train = len(kind.class_names(val)) != IMAGENET_CLASSES
    return kind(val, transform, kind.class_names(train) if has_train else None)


# File types of images that torchvision's ImageFolder skips silently.
OTHER_IMAGES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpx", ".jxl", ".tga")


class Sieve:
    """Selects the images among the files of a data set, and records which ones it skips, for a note.

    Args:
        top: path of the data set's folder; the paths of all files start with it.
    """

    def __init__(self, top: str = "") -> None:
        self.top = top
        self.hidden: list[str] = []
        self.of_other_kinds: list[str] = []

    def is_image(self, path: str) -> bool:
        """Whether a file is an image of a supported type."""
        name = posixpath.basename(path)
        if name.startswith("._"):  # macOS stores attributes of NAME.jpg in a file ._NAME.jpg, also in tar files
            return False
        if name.lower().endswith(OTHER_IMAGES):
            self.of_other_kinds.append(path)
        return name.lower().endswith(IMG_EXTENSIONS)

    def is_visible(self, path: str) -> bool:
        """Whether an image is outside of hidden folders, such as .ipynb_checkpoints, which contain copies."""
        if "/." in "/" + posixpath.dirname(path[len(self.top) :]):
            self.hidden.append(path)
            return False
        return True

    def print_notes(self, where: str) -> None:
        """Print a note for each reason why images of the data set at ``where`` were skipped."""
        if self.hidden:
            print_once(
                f"note: {len(self.hidden)} images in hidden folders of {where} are skipped, such as {self.hidden[0]}"
            )
        if self.of_other_kinds:
            print_once(
                f"note: {len(self.of_other_kinds)} images in {where} are skipped because of their file type, such as "
                f"{self.of_other_kinds[0]}: save them as one of {', '.join(IMG_EXTENSIONS)}"
            )


def _number_classes(names: list[str], known: list[str] | None, path: str) -> tuple[list[str], dict[str, int]]:
    """All classes, which are ``known`` unless it is None, and the index of each of ``names`` among them.

    Raises ``UserError`` for a name that is not among the known classes.
    """
    known = names if known is None else known
    index = {name: number for number, name in enumerate(known)}
    strangers = [name for name in names if name not in index]
    if strangers:
        raise UserError(f"{path} has {len(strangers)} classes that are missing in training, such as {strangers[0]}")
    return known, {name: index[name] for name in names}


class ImageFolder(NamedImages, torchvision.datasets.ImageFolder):
    """torchvision's ImageFolder, but its errors name the file, and it can use the class numbers of another folder."""

    def __init__(self, root: str, transform: Callable, known_classes: list[str] | None = None) -> None:
        self._known_classes, self._sieve = known_classes, Sieve(os.path.expanduser(root))
        try:
            torchvision.datasets.ImageFolder.__init__(self, root, transform, is_valid_file=self._is_ours)
        except OSError as error:
            raise UserError(
                f"{root} is not a folder of class folders with images: {error.strerror or error}"
            ) from error
        self._sieve.print_notes(root)
        self.oddities = Oddities(len(self))

    def _is_ours(self, path: str) -> bool:
        return self._sieve.is_image(path) and self._sieve.is_visible(path)

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Class names in order, and their indices. torchvision calls this method."""
        names = self.class_names(directory)
        for hidden in glob.glob(os.path.join(glob.escape(directory), ".*", "**"), recursive=True):
            self._is_ours(hidden)  # records it for the note
        if not names:
            raise FileNotFoundError("it has no class folder")
        return _number_classes(names, self._known_classes, directory)

    def name(self, i: int) -> str:
        """The path of image i."""
        return self.samples[i][0]

    source = name

    def target(self, i: int) -> int:
        """The class of image i."""
        return self.samples[i][1]

    @staticmethod
    def class_names(root: str) -> list[str]:
        """Sorted names of the class folders, including empty ones, as in torchvision, but without hidden ones."""
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


class ImageTar(NamedImages):
    """An uncompressed tar file that contains class folders or, as ImageNet is distributed, one tar file per class.

    The class folders are siblings, at the top or in a folder that contains all members (``train/``, an absolute path).
    Each class folder has at least one image directly in it; images in its subfolders belong to the same class. If there
    is only one class, it must not have subfolders.

    The items are those of ``ImageFolder`` for the unpacked files, in the same order. Raises ``UserError`` for a tar
    file that is missing, truncated, compressed or laid out differently, or has symbolic links.
    """

    def __init__(self, path: str, transform: Callable, known_classes: list[str] | None = None) -> None:
        self.path, self.transform = path, transform
        self.index = _tar_index(path)
        self.classes, self.class_to_idx = _number_classes(self.index.classes, known_classes, path)
        self.numbers = np.array([self.class_to_idx[name] for name in self.index.classes])
        self.oddities = Oddities(len(self))

    def __len__(self) -> int:
        return len(self.index.offsets)

    def name(self, i: int) -> str:
        """The name of image i in messages."""
        return f"{self.index.names[i].decode(errors='replace')} in {self.path}"

    def source(self, i: int) -> BinaryIO:
        """The content of image i as an open file."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.index.offsets[i])
            return io.BytesIO(file.read(self.index.sizes[i]))

    def target(self, i: int) -> int:
        """The class of image i."""
        return int(self.numbers[self.index.targets[i]])

    @staticmethod
    def class_names(path: str) -> list[str]:
        """Sorted names of the class folders in the tar."""
        return _tar_index(path).classes


@dataclass(frozen=True)
class TarIndex:
    """The images of a tar file: sorted class names, and for each image its name, position, size and class."""

    classes: list[str]
    names: np.ndarray  # (N,) bytes
    offsets: np.ndarray  # (N,) int64
    sizes: np.ndarray  # (N,) int64
    targets: np.ndarray  # (N,) int64


def _tar_index(path: str) -> TarIndex:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    return _scan_tar(path, status.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _scan_tar(path: str, _mtime: int) -> TarIndex:
    sieve, names, offsets, sizes = Sieve(), [], [], []
    with open(path, "rb", buffering=0) as file:
        for name, offset, size in _images(file, path, sieve):
            names.append(name)
            offsets.append(offset)
            sizes.append(size)
    # Folders that contain all images, such as those of an absolute path, may be hidden.
    sieve.top = posixpath.commonpath({posixpath.dirname(name) for name in names}) if names else ""
    visible = [sieve.is_visible(name) for name in names]
    names, offsets, sizes = (list(itertools.compress(column, visible)) for column in (names, offsets, sizes))
    sieve.print_notes(path)
    if not names:
        raise UserError(f"{path} holds no images ({', '.join(IMG_EXTENSIONS)})")
    classes, targets = np.unique(_classes_of(names, path), return_inverse=True)
    folders, files = zip(*(posixpath.split(name) for name in names), strict=True)
    order = np.lexsort((_bytes(files), _bytes(folders), targets))  # torchvision's: by class, then folder, then file
    return TarIndex(
        [str(name) for name in classes],
        _bytes(names)[order],
        np.array(offsets, np.int64)[order],
        np.array(sizes, np.int64)[order],
        targets[order],
    )


def _classes_of(names: list[str], path: str) -> list[str]:
    """Class folder of each member; ``UserError`` if the tar does not have the layout that ``ImageTar`` describes."""
    layout = "a tar must hold CLASS/IMAGE for every class, or ANY/FOLDER/CLASS/IMAGE with one ANY/FOLDER for all"
    inner = _without_common_folders(names)
    for name, rest in zip(names, inner, strict=True):
        if "/" not in rest:
            raise UserError(f"{name} in {path} is in no class folder: {layout}")
    classes = [_first_folder(rest) for rest in inner]
    class_folders = {_first_folder(rest) for rest in inner if rest.count("/") == 1}
    for name, class_name in zip(names, classes, strict=True):
        if class_name not in class_folders:
            raise UserError(f"{name} in {path} is too deep, because folder {class_name} holds no image: {layout}")
    in_subfolders = [name for name, rest in zip(names, inner, strict=True) if rest.count("/") > 1]
    if len(class_folders) == 1 and in_subfolders:
        raise UserError(
            f"all images in {path} are in one class folder, {classes[0]}, some of them in subfolders, such as "
            f"{in_subfolders[0]}: {layout}"
        )
    return classes


def _without_common_folders(names: list[str]) -> list[str]:
    """The paths without the folders that hold everything, such as train/, as long as folders remain below them."""
    while len({_first_folder(name) for name in names}) == 1 and all(name.count("/") > 1 for name in names):
        names = [name.partition("/")[2] for name in names]
    return names


def _first_folder(path: str) -> str:
    return path.partition("/")[0]


def _bytes(names: list[str]) -> np.ndarray:
    return np.array([name.encode(errors="surrogateescape") for name in names])


def _images(file: BinaryIO, path: str, sieve: Sieve) -> Iterator[tuple[str, int, int]]:
    """(name, position in the file, size) of every image. A tar file inside the tar file counts as a folder."""
    for name, offset, size in _members(file, 0, os.fstat(file.fileno()).st_size, path):
        if name.endswith(".tar"):
            folder = name[:-4]
            for inner, inner_offset, inner_size in _members(file, offset, size, f"{name} in {path}"):
                if sieve.is_image(inner):
                    inner = inner.removeprefix(posixpath.basename(folder) + "/")  # cat.tar may contain cat/
                    yield f"{folder}/{inner}", inner_offset, inner_size
        elif sieve.is_image(name):
            yield name, offset, size


def _members(file: BinaryIO, start: int, size: int, label: str) -> Iterator[tuple[str, int, int]]:
    """(name, position, size) of every file in a tar file: first the regular files, then the hard links."""
    target_of_link = {}
    for member in _headers(file, start, size, label):
        if member.issym() or member.issparse():
            raise UserError(
                f"{member.name} in tar {label} is a {'symbolic link' if member.issym() else 'sparse file'}, which "
                "cannot be read: create the tar again with --dereference and without --sparse"
            )
        if member.isreg():
            yield _clean(member.name), member.offset_data, member.size
        elif member.islnk():
            target_of_link[_clean(member.name)] = _clean(member.linkname)
    if target_of_link:
        yield from _hard_links(file, start, size, label, target_of_link)


def _hard_links(
    file: BinaryIO, start: int, size: int, label: str, target_of_link: dict[str, str]
) -> Iterator[tuple[str, int, int]]:
    """(name, position, size) of every hard link, where position and size are those of the regular file it links to.

    A second pass over the headers finds these files, so that the first pass need not remember a million files.
    """
    targets = set(target_of_link.values())
    data_of_target = {}
    for member in _headers(file, start, size, label):
        name = _clean(member.name)
        if member.isreg() and name in targets:
            data_of_target[name] = (member.offset_data, member.size)
    for link, target in target_of_link.items():
        if target not in data_of_target:
            raise UserError(
                f"{link} in tar {label} is a hard link to {target}, which is not in the tar: create the tar again"
            )
        offset, length = data_of_target[target]
        yield link, offset, length


def _clean(name: str) -> str:
    return posixpath.normpath(name).lstrip("/")


def _headers(file: BinaryIO, start: int, size: int, label: str) -> Iterator[tarfile.TarInfo]:
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                yield member
                tar.members.clear()  # otherwise tarfile would keep a million TarInfo objects, a gigabyte
            file.seek(tar.offset)
    except tarfile.ReadError as error:
        raise UserError(f"tar {label} is truncated, compressed or not a tar file: {error}") from error
    # tarfile treats a damaged header as the end of the file, and reads past the end of a tar file inside another one.
    if tar.offset >= start + size or file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"tar {label} is truncated or damaged at byte {tar.offset - start}")


# CIFAR and iNaturalist


class CIFAR100(torchvision.datasets.CIFAR100):
    """torchvision's CIFAR-100; its errors name the image by its number."""

    def __getitem__(self, i: int) -> tuple[Any, int]:
        with naming(self.name(i), "transformed"):
            return super().__getitem__(i)

    def name(self, i: int) -> str:
        """The name of image i in messages. An index past the end raises IndexError, which ends a loop over the set."""
        return f"{range(len(self))[i]} of CIFAR-100's {'training' if self.train else 'test'} set"


def _build_cifar(root: str, is_train: bool, transform: Callable) -> Dataset:
    try:
        return CIFAR100(root, is_train, transform)
    except RuntimeError as error:
        raise UserError(
            f"CIFAR-100 is missing or damaged in {os.path.join(root, CIFAR100.base_folder)}: download "
            f"{CIFAR100.url} and unpack it in {root}"
        ) from error


class INaturalist(NamedImages):
    """iNaturalist 2018 or 2019: the images of ``{train|val}{year}.json``, with classes from ``categories.json``.

    Args:
        root: folder of the two JSON files; the paths of the images in them are relative to it.
        year: 2018 or 2019.
        level: key of the categories, from "kingdom" to "name"; its sorted values are the classes.
    """

    def __init__(self, root: str, is_train: bool, year: int, level: str, transform: Callable) -> None:
        path = os.path.join(root, f"{'train' if is_train else 'val'}{year}.json")
        listing = _read_json(path)
        self.root, self.transform = root, transform
        try:
            categories = {
                category.get("id", number): category[level]
                for number, category in enumerate(_read_json(os.path.join(root, "categories.json")))
            }
            self.classes = sorted(set(categories.values()))
            files = {image["id"]: os.fspath(image["file_name"]) for image in listing["images"]}
            index = {name: number for number, name in enumerate(self.classes)}
            self.samples = [
                (files[entry["image_id"]], index[categories[entry["category_id"]]]) for entry in listing["annotations"]
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} and categories.json beside it do not match or lack --inat-category {level!r}: {error!r}"
            ) from error
        self.oddities = Oddities(len(self))

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, i: int) -> str:
        """The path of image i."""
        return os.path.join(self.root, self.samples[i][0])

    source = name

    def target(self, i: int) -> int:
        """The class of image i."""
        return self.samples[i][1]


def _read_json(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
