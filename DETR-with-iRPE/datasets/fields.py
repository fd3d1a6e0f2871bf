"""What the fields of a JSON file may hold: checked column by column, since COCO has 860,000 annotations."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from util.runtime import UserError

LARGEST_ID = 2**63  # the first that int64 does not hold
LARGEST = 1e18  # number of pixels that anything can be; JSON's NaN and Infinity are beyond it


@dataclass(frozen=True)
class Kind:
    """What a field may hold.

    Attributes:
        words: the same for messages, after "it must be".
        all_right: whether every value of a list is right as it is; it is fast, and may say no where `read` says yes.
        read: a value as the program uses it; raises ValueError for a wrong one.
    """

    words: str
    all_right: Callable[[list], bool]
    read: Callable[[Any], Any]


def read_column(entries: list[dict], field: str, kind: Kind, name: Callable[[int], str]) -> list:
    """The values of a field in all entries, which are set to what `kind.read` makes of them.

    Args:
        name: of an entry by its place in the list, for messages.
    Raises: UserError that names the entry and the field of the first wrong value.
    """
    values = [entry.get(field) for entry in entries]
    if kind.all_right(values):
        return values
    for number, entry in enumerate(entries):
        try:
            values[number] = entry[field] = kind.read(values[number])
        except ValueError as error:
            raise UserError(f"{name(number)}: {field} is {_shown(values[number])}; it must be {kind.words}") from error
    return values


def check_entries(entries: Any, path: Any, part: str) -> None:
    """Raise UserError unless a part of a file is a list of JSON objects."""
    if not isinstance(entries, list):
        raise UserError(f"annotations {path} have no list of {part}: this is not COCO's format")
    for number, entry in enumerate(entries):
        if type(entry) is not dict:
            raise UserError(
                f"annotations {path}: {part}: entry {number} is {_shown(entry)}; it must be an object with fields"
            )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def optional(kind: Kind, default: Any = None) -> Kind:
    """A kind whose field may also be missing or null, which both mean ``default``."""
    return Kind(f"{kind.words}, or null", kind.all_right, lambda value: default if value is None else kind.read(value))


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; true and false are none."""
    return type(value) in (int, float) and -LARGEST < value < LARGEST


def _is_whole(value: Any) -> bool:
    return is_number(value) and value == int(value)


def _whole_from(least: int) -> Kind:
    def all_right(values: list) -> bool:
        return set(map(type, values)) <= {int} and (not values or least <= min(values) <= max(values) < LARGEST_ID)

    def read(value: Any) -> int:
        if not (_is_whole(value) and least <= value < LARGEST_ID):
            raise ValueError
        return int(value)

    return Kind(f"a whole number, at least {least}", all_right, read)


def _read_flag(value: Any) -> int:
    if not (type(value) in (int, bool, float) and value in (0, 1)):
        raise ValueError
    return int(value)


def _is_box(value: Any) -> bool:
    return type(value) is list and len(value) == 4 and all(map(is_number, value))


def _are_boxes(values: list) -> bool:
    if not (set(map(type, values)) <= {list} and set(map(len, values)) <= {4}):
        return False
    numbers = list(chain.from_iterable(values))
    return set(map(type, numbers)) <= {int, float} and all(-LARGEST < number < LARGEST for number in numbers)


def _checked(check: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if not check(value):
            raise ValueError
        return value

    return read


def _of_type(words: str, *types: type) -> Kind:
    return Kind(
        words, lambda values: set(map(type, values)) <= set(types), _checked(lambda value: type(value) in types)
    )


ID = _whole_from(0)  # 7.0 is 7, as programs write it that keep ids in a column of floats
SIDE = _whole_from(1)
FLAG = Kind(
    "0 or 1, true or false", lambda values: set(map(type, values)) <= {int} and set(values) <= {0, 1}, _read_flag
)
AREA = Kind(
    "a number, at least 0",
    lambda values: set(map(type, values)) <= {int, float} and all(0 <= value < LARGEST for value in values),
    _checked(lambda value: is_number(value) and value >= 0),
)
BOX = Kind("four finite numbers: x, y, width, height", _are_boxes, _checked(_is_box))
TEXT = _of_type("a text", str)
FILE_NAME = Kind(
    "the name of a file",
    lambda values: set(map(type, values)) <= {str} and all(values),
    _checked(lambda value: type(value) is str and value),
)
LIST = _of_type("a list", list)
SEGMENTATION = _of_type("a list of polygons, or RLE", list, dict)
