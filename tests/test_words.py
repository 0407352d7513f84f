"""The package speaks the field's words: none that its style retires, in prose or in names.

Each retired word stands beside what to write instead.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = sorted(
    path for folder in ("sac_rag", "integrations") for path in (ROOT / folder).rglob("*.py")
)
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])

PROSE = {
    r"fore(tell|tells|told|telling)": "predict",
    r"(every )?so manieth|so many": "every n-th, n",
    r"anew": "again",
    r"go(es)? on|went on|going on": "resume, continue",
    r"(is|are|was|were) to be": "must be, will be",
    r"what is to \w+": "a noun",
    r"but for": "except",
    r"of like length": "of similar length",
    r"likeliest": "most likely",
    r"for want of": "because there was no",
    r"its owner alone": "owner-only",
    r"departed": "tombstones",
    r"tally|tallies": "counters",
    r"upkeep": "maintenance",
    r"set aside": "quarantined",
    r"headroom": "gap to the oracle",
    r"as (it|they) (is|are) told": "as recorded",
    r"(tokens|bytes|MB|questions|nats|steps|seconds) an? (second|token|step|minute|chunk)": "per",
    r"(one|a) \w+ an? (line|row|chunk|file|head|text|document|entry|step|token|worker)": "per",
    r"nought|whither|thence|hence forth|heretofore|thereof|wherein": "plain words",
}
NAMES = {
    "told": "recorded",
    "own": "actual, or a noun",
    "found": "a noun: entry, match, path",
    "done": "finished, or a noun",
    "given": "a noun: documents, values",
    "kept": "kept_indices, or a noun",
    "sees": "attends_to, attention_mask",
    "departed": "tombstones",
    "tally": "counters",
}
# Sentences of what a module does not know stay where they surprise.
MOST_KNOWS_NOTHING = 20


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings and comments, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if (text := ast.get_docstring(node, clean=False)) is not None:
            start = node.body[0].lineno
            yield from ((start + i, line) for i, line in enumerate(text.splitlines()))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def names_of(source: str) -> Iterator[tuple[int, str]]:
    """Names that are assigned, and parameters."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def retired_words(lines: Iterator[tuple[int, str]], path: Path) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}; write: {instead}"
        for number, line in lines
        for words, instead in PROSE.items()
        if (match := re.search(rf"\b({words})\b", line, re.IGNORECASE))
    ]


def test_docstrings_and_comments_have_no_retired_word() -> None:
    lines = [line for path in CODE for line in retired_words(prose_of(path.read_text()), path)]
    assert not lines, "\n".join(lines)


def test_the_documentation_has_no_retired_word() -> None:
    lines = [
        line
        for path in PAGES
        for line in retired_words(enumerate(path.read_text().splitlines(), 1), path)
    ]
    assert not lines, "\n".join(lines)


def test_no_name_is_a_retired_one() -> None:
    lines = [
        f"{path.relative_to(ROOT)}:{number}: {name}; write: {NAMES[name]}"
        for path in CODE
        for number, name in names_of(path.read_text())
        if name in NAMES
    ]
    assert not lines, "\n".join(lines)


def test_few_modules_say_what_they_do_not_know() -> None:
    knowing = [path.name for path in CODE if "Knows no" in path.read_text()]
    assert len(knowing) <= MOST_KNOWS_NOTHING, ", ".join(knowing)
