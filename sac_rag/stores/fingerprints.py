"""What fingerprints are made of, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from sac_rag.stores.entry import is_key

Fields: TypeAlias = dict[str, str]

_SHOWN = 24  # characters of a value: enough of a digest to tell two apart


def require_fields(fingerprint: str, fields: Mapping[str, str]) -> None:
    """Refuses what is no fingerprint with its fields.

    Raises:
        ValueError: if the fingerprint is not a hex digest.
        TypeError: if a field is not a str.
    """
    if not is_key(fingerprint):
        raise ValueError(
            f"a fingerprint must be a lower-case hex digest, was: {fingerprint!r:.100}"
        )
    for name, value in fields.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise TypeError(f"a fingerprint's fields must be str, {name!r} was: {value!r:.100}")


def fields_to_json(fields: Mapping[str, str]) -> bytes:
    """The fields as they are stored."""
    return json.dumps(dict(fields), indent=1, sort_keys=True).encode()


def fields_from_json(data: bytes) -> Fields | None:
    """The fields that were stored; None if these bytes are none."""
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
        return None
    return fields


def nearest(olds: Sequence[str], new: str, fields_of: Callable[[str], Fields | None]) -> str:
    """How a fingerprint differs from the most similar of others, as "name was …, is …"."""
    after = fields_of(new)
    known: list[list[str]] = [
        difference
        for old in olds
        if after is not None
        and (before := fields_of(old)) is not None
        and (difference := _difference(before, after))
    ]
    if not known:
        return f"was {olds[0]:.12}, is {new:.12}"
    fewest = min(len(difference) for difference in known)
    return "; ".join(next(difference for difference in known if len(difference) == fewest))


def _difference(before: Fields, after: Fields) -> list[str]:
    return [
        f"{name} was {_shown(name, before)}, is {_shown(name, after)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _shown(name: str, fields: Fields) -> str:
    value = fields.get(name)
    if value is None:
        # A compressor's fingerprint covers only those config fields that are not at their default.
        return "its default" if name.startswith("config.") else "not there"
    return value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…"
