"""Ctrl-C at every line: runs an action again and again, each time interrupted one line later.

    for line in interruptions(lambda: store.put(key, kv), inside=[database, Index.put]):
        assert store.check() == [], line

`inside` names modules, functions, methods or classes of the package; only lines of theirs are
counted, in this thread. At the n-th of them KeyboardInterrupt is raised in place of the line. The
loop's body runs after each interrupted action and checks what must hold then; it may repair or
reset what the next run starts from. The loop ends with the first run that is shorter than n lines,
which is not interrupted.

Lines are many. Give functions in place of modules, or a `stride`, a prime number: every 7th line
is another line of a loop's body in each of its rounds.

An action that ends normally although it was interrupted has swallowed the Ctrl-C: AssertionError.
`swallows=True` permits it, for what is cleaned up in finalizers, where Python drops exceptions.

Python delivers signals behind calls and jumps back only. So the exit of a `with` block is no line
of its own, nor is a `try:` in a block that cleans up, which Python 3.11 leaves out of its range.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any


def interruptions(
    action: Callable[[], Any],
    inside: Sequence[Any],
    *,
    stride: int = 1,
    start: int = 0,
    swallows: bool = False,
) -> Iterator[int]:
    """Runs an action once per line of what is inside; see the module.

    Args:
        action: Repeated as often as it has lines: it must do the same each time.
        inside: Modules, classes, functions and methods.
        stride: Step from one interrupted line to the next.
        start: The first line.
        swallows: Whether the action may end normally when it is interrupted.

    Yields:
        The number of the line, after each interrupted run.
    """
    line = start
    while interrupted(action, inside, at=line, swallows=swallows):
        yield line
        line += stride
    assert line > start, f"no line of {inside} was executed"


def interrupted(
    action: Callable[[], Any], inside: Sequence[Any], *, at: int, swallows: bool = False
) -> bool:
    """Runs an action with KeyboardInterrupt at one line.

    Returns:
        Whether it was interrupted; False if it ended before it came to this line.
    """
    tracer = _Tracer(inside, at)
    before = sys.gettrace()
    sys.settrace(tracer.enter)
    try:
        action()
    except KeyboardInterrupt:
        assert tracer.place, "Ctrl-C from elsewhere"
        return True
    finally:
        sys.settrace(before)
    assert swallows or not tracer.place, f"Ctrl-C at {tracer.place} was swallowed"
    return bool(tracer.place)


class _Tracer:
    """Counts lines, and raises at one of them.

    Attributes:
        place: File and line that were interrupted; "" before.
    """

    def __init__(self, inside: Sequence[Any], at: int) -> None:
        self.place = ""
        self._left = at
        self._files = {thing.__file__ for thing in inside if isinstance(thing, ModuleType)}
        self._codes = {
            code for thing in inside if not isinstance(thing, ModuleType) for code in _codes(thing)
        }

    def enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if self.place or (code.co_filename not in self._files and code not in self._codes):
            return None
        if frame.f_trace is not None:  # a generator that is resumed
            return frame.f_trace
        (withs, tries), entered = _no_lines(code.co_filename), set[int]()

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            if event != "line" or self.place or frame.f_lineno in tries | entered:
                return step
            if frame.f_lineno in withs:
                entered.add(frame.f_lineno)
            if self._left == 0:
                self.place = f"{code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
            self._left -= 1
            return step

        return step


def _codes(thing: Any) -> Iterator[CodeType]:
    """Code of a function, or of all of a class, with that of the functions inside."""
    if isinstance(thing, type):
        for member in vars(thing).values():
            if isinstance(member, property | staticmethod | classmethod) or callable(member):
                yield from _codes(member)
        return
    if isinstance(thing, property):
        thing = thing.fget
    code = getattr(inspect.unwrap(getattr(thing, "__func__", thing)), "__code__", None)
    stack = [] if code is None else [code]
    while stack:
        code = stack.pop()
        yield code
        stack += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


@cache
def _no_lines(file: str) -> tuple[frozenset[int], frozenset[int]]:
    """Lines of the contexts of `with` statements, and of each `try:` in a block that cleans up."""
    withs, tries = set[int](), set[int]()
    for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.With | ast.AsyncWith):
            withs.add(node.lineno)
            for context in (item.context_expr for item in node.items):
                withs.update(range(context.lineno, (context.end_lineno or 0) + 1))
        if isinstance(node, ast.With | ast.AsyncWith | ast.Try):
            inside = (inner for inner in ast.walk(node) if inner is not node)
            tries.update(inner.lineno for inner in inside if isinstance(inner, ast.Try))
    return frozenset(withs), frozenset(tries)
