"""From what YAML or JSON gives (mappings, lists, scalars) to msgspec structs, with errors that name the key.

msgspec's own conversion stops at a JSON path such as `$.features[7]`; who reads the error knows features by name.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from torchrank.features.errors import FeatureError, accepted

S = TypeVar("S", bound=msgspec.Struct)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_EXPECTED = re.compile(r"^Expected (?P<what>.*?)(?:, got .*?)?(?: - at `\$(?P<at>.*)`)?$")


def require_mapping(where: str, value: object, field: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise FeatureError(f"{where}: found {reprlib.repr(value)}; accepted: a mapping of names to values", field)
    return value


def require_name(where: str, name: object, field: str) -> str:
    """Names become names of files, of graph inputs and of `group.feature`: letters, digits, _ and - only."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise FeatureError(f"{where}: found {name!r}; accepted: a name of letters, digits, '_' and '-'", field)
    return name


def read_struct(where: str, value: object, struct: type[S], field: str, also: tuple[str, ...] = ()) -> S:
    """An instance of `struct` from a mapping of its keys; `also` are keys that the caller reads itself.

    `where` starts every message ("feature 'age'"), `field` names the place for programs. Raises FeatureError.
    """
    mapping = require_mapping(where, value, field)
    fields = {item.encode_name: item for item in msgspec.structs.fields(struct)}
    for key in mapping:
        if key not in fields and key not in also:
            hint = accepted(key, [*also, *fields])
            raise FeatureError(f"{where}: unknown key {key!r}{hint}", f"{field}.{key}")
    for key, item in fields.items():
        if item.required and key not in mapping:
            raise FeatureError(f"{where}: key {key!r} is missing", f"{field}.{key}")
    values = {
        item.name: read_value(where, key, mapping[key], item.type, f"{field}.{key}")
        for key, item in fields.items()
        if key in mapping
    }
    return struct(**values)


def read_value(where: str, key: str, value: object, kind: Any, field: str) -> Any:
    """The value of one key as type `kind`, any type that msgspec converts to."""
    try:
        converted = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        found, reason = _explain(value, kind, str(error))
        raise FeatureError(f"{where}: key {key!r}: found {found}{reason}", field) from error
    if not _finite(converted):
        raise FeatureError(f"{where}: key {key!r}: found {reprlib.repr(value)}; accepted: finite numbers", field)
    return converted


def _explain(value: object, kind: Any, message: str) -> tuple[str, str]:
    if get_origin(kind) is Literal:
        return repr(value), accepted(str(value), get_args(kind))
    match = _EXPECTED.match(message)
    if match is None:
        return reprlib.repr(value), f"; {message}"
    at = f" (at {match['at']})" if match["at"] else ""
    return reprlib.repr(value) + at, f"; accepted: {match['what'].replace('`', '').replace('array', 'list')}"


def _finite(value: object) -> bool:
    """JSON, and so the bundle's manifest, has no word for infinity."""
    if isinstance(value, tuple):
        return all(_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)
