"""Checks of the fields of COCO's JSON files.

COCO has 860,000 annotations. To keep the checks fast, `read_column` checks a field in all entries at once, and looks at
individual entries only if that fails.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from util.runtime import UserError

ID_LIMIT = 2**63  # ids must be less, to fit into int64
NUMBER_LIMIT = 1e18  # the absolute values of numbers must be less, which NaN and Infinity are not


@dataclass(frozen=True)
class Kind:
    """The kind of values that a field may have.

    Attributes:
        words: a description that follows "it must be" in messages.
        all_right: a fast check that all values of a list are valid and need no conversion. It may return False for
            values that `read` accepts.
        read: converts a value to the type that the program uses. Raises ValueError for an invalid value.
    """

    words: str
    all_right: Callable[[list], bool]
    read: Callable[[Any], Any]


def read_column(entries: list[dict], field: str, kind: Kind, name: Callable[[int], str]) -> list:
    """Read a field of all entries, and replace its values in the entries by the results of `kind.read`.

    Args:
        entries: JSON objects.
        field: name of the field.
        kind: kind of its values.
        name: takes the index of an entry, and returns the name of the entry in messages.
    Returns: the values.
    Raises: UserError that names the entry and the field of the first invalid value.
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
    """Raise UserError unless a part of the annotations in the file `path` is a list of JSON objects."""
    if not isinstance(entries, list):
        raise UserError(f"annotations {path} have no list of {part}: this is not COCO's format")
    for number, entry in enumerate(entries):
        if type(entry) is not dict:
            raise UserError(
                f"annotations {path}: {part}: entry {number} is {_shown(entry)}; it must be an object with fields"
            )


def _shown(value: Any) -> str:
    """A value for messages, shortened if it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def optional(kind: Kind, default: Any = None) -> Kind:
    """A kind for fields that may also be missing or null, in which case their value is ``default``."""
    return Kind(f"{kind.words}, or null", kind.all_right, lambda value: default if value is None else kind.read(value))


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; true and false are not numbers."""
    return type(value) in (int, float) and -NUMBER_LIMIT < value < NUMBER_LIMIT


def _is_whole(value: Any) -> bool:
    return is_number(value) and value == int(value)


def _whole_from(least: int) -> Kind:
    """The kind of whole numbers from ``least``. Floats such as 7.0 are whole numbers."""

    def all_right(values: list) -> bool:
        return set(map(type, values)) <= {int} and (not values or least <= min(values) <= max(values) < ID_LIMIT)

    def read(value: Any) -> int:
        if not (_is_whole(value) and least <= value < ID_LIMIT):
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
    return set(map(type, numbers)) <= {int, float} and all(-NUMBER_LIMIT < number < NUMBER_LIMIT for number in numbers)


def _checked(check: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """A function for `Kind.read` that returns values unchanged if they pass the check."""

    def read(value: Any) -> Any:
        if not check(value):
            raise ValueError
        return value

    return read


def _of_type(words: str, *types: type) -> Kind:
    return Kind(
        words, lambda values: set(map(type, values)) <= set(types), _checked(lambda value: type(value) in types)
    )


ID = _whole_from(0)  # includes 7.0, as written by programs that keep ids in a column of floats
SIDE = _whole_from(1)
FLAG = Kind(
    "0 or 1, true or false", lambda values: set(map(type, values)) <= {int} and set(values) <= {0, 1}, _read_flag
)
AREA = Kind(
    "a number, at least 0",
    lambda values: set(map(type, values)) <= {int, float} and all(0 <= value < NUMBER_LIMIT for value in values),
    _checked(lambda value: is_number(value) and value >= 0),
)
BOX = Kind("four finite numbers: x, y, width, height", _are_boxes, _checked(_is_box))
TEXT = _of_type("a string", str)
FILE_NAME = Kind(
    "the name of a file",
    lambda values: set(map(type, values)) <= {str} and all(values),
    _checked(lambda value: type(value) is str and value),
)
LIST = _of_type("a list", list)
SEGMENTATION = _of_type("a list of polygons, or RLE", list, dict)
