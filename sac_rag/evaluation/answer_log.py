"""Answers, a log of scored answers in a JSON Lines file that an interrupted run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FORMAT = 1


class Answers:
    """Scored answers by question number, in JSON Lines after a line of settings.

    Args:
        path: Read and continued if it exists; None keeps answers in memory only.
        settings: JSON values; must equal those that the file was begun with.
        labels: JSON values, noted beside them in a new file.

    Attributes:
        labels: Those of the file.
        by_number: The answers, those read from the file among them.

    Raises:
        ValueError: if the file was begun with other settings, or holds something else.
        OSError: if it cannot be read or written.
    """

    def __init__(
        self, path: Path | None, settings: Mapping[str, Any], labels: Mapping[str, Any]
    ) -> None:
        self.by_number: dict[int, dict[str, Any]] = {}
        self.labels = dict(labels)
        self._path = path
        if path is None:
            return
        header = _line({"format": FORMAT, **settings, "labels": self.labels})
        content = path.read_bytes() if path.exists() else b""
        fixed = header[: header.rindex(b'"labels"')]  # labels may be others on another day
        is_whole = b"\n" in content
        if not is_whole and (fixed.startswith(content) or content.startswith(fixed)):
            # New, or cut off in the header.
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(header)
            return
        # A last line without its end was cut off in writing.
        whole = content[: content.rfind(b"\n") + 1]
        first, *lines = whole.splitlines() or [b""]
        self.labels = _require_settings(path, first, settings)
        for number, line in enumerate(lines, 2):
            try:
                answer = json.loads(line)
                self.by_number[answer["number"]] = answer
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{path}:{number} must be an answer, but: {error!r}; mend or remove the line"
                ) from error
        os.truncate(path, len(whole))

    def add(self, answers: Sequence[dict[str, Any]]) -> None:
        """Adds answers; they are in the file when it returns."""
        self.by_number |= {answer["number"]: answer for answer in answers}
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(b"".join(map(_line, answers)))


def _require_settings(path: Path, line: bytes, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Labels of a file, once its settings are known to be the ones asked for."""
    try:
        recorded: dict[str, Any] = json.loads(line)
        version = recorded["format"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} holds something else than the answers of an evaluation; give a new file"
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"{path} is of format {version!r}, this version of sac_rag writes format {FORMAT}; "
            "give a new file"
        )
    mismatches = {
        name: (recorded.get(name), value)
        for name, value in settings.items()
        if recorded.get(name) != value
    }
    if mismatches:
        raise ValueError(
            f"{path} was begun with other settings, (recorded, asked for): {mismatches}; "
            "give a new file"
        )
    return dict(recorded.get("labels", {}))


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"
