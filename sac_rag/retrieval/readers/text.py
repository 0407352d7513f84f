"""txt and md: a document per file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from sac_rag.chunk import Chunk
from sac_rag.retrieval.readers.content import not_utf8
from sac_rag.retrieval.readers.records import IdOf, checked, place_as_id

_HEADING = re.compile(r"\s*#{1,6}[ \t]+(?P<title>[^\n]+)")


def read_text(
    content: bytes,
    name: str,
    stem: str | None,
    has_heading: bool,
    on_bad: Callable[[str, str], None],
    id_of: IdOf = place_as_id,
) -> Iterator[Chunk]:
    """The document of a file, if it can be read.

    Args:
        content: UTF-8, with or without a byte-order mark, any line ends.
        name: The path.
        stem: The title of a text without heading.
        has_heading: Whether a Markdown heading at the start is the title.
        on_bad: As for `read_documents`.
        id_of: Makes the id, of path and text.
    """
    try:
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line_number = content.count(b"\n", 0, error.start) + 1
        on_bad(f"{name}:{line_number}", f"a text {not_utf8(content, error)}")
        return
    title = stem
    if has_heading and (heading := _HEADING.match(text)):
        # "## Title ##" is a heading closed on the right.
        title = re.sub(r"\s#+$", "", heading["title"].rstrip()).strip() or stem
    try:
        document = checked(Chunk(text, id=id_of(name, text), title=title))
    except ValueError as error:
        on_bad(name, str(error))
    else:
        yield document
