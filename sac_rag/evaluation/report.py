"""Report: one HTML page of everything that was measured on the same questions.

It is made from the files that `quality.evaluate` leaves, so that it can be made again at any time,
and holds its plots inside: one file to send to a colleague. Times of `sac-rag bench speed --out` in
the same folder are shown too.
"""

from __future__ import annotations

import io
import json
import os
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if find_spec("matplotlib") is None:
    raise ImportError("a report needs the 'eval' extra: pip install 'sac-rag[eval]'")

import matplotlib
from jinja2 import Environment
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from sac_rag.evaluation.scores import interval, paired_interval, raw_exact_match, rouge1
from sac_rag.whole_file import whole_file

TEMPLATE = "report.html.j2"
SPEED, SPEED_PLOT = "speed.json", "speed.png"
_EXAMPLES = 12  # questions whose answers are shown
_OWN = "anchors"
_SYSTEMS = ("full-text", "truncated", "closed-book", "compressed")
# Settings that say how a measurement was made, and those that must be the same for a comparison.
_SHOWN = ("dtype", "seed", "n", "max_new_tokens")
_ALIKE = ("seed", "n", "dtype", "model", "max_new_tokens", "stop", "prompt")


@dataclass(frozen=True)
class Measured:
    """The answers of one system.

    Attributes:
        settings: First line of its file.
        rows: The scored answers by question number, in the order of the numbers.
    """

    settings: Mapping[str, Any]
    rows: Mapping[int, Mapping[str, Any]]

    @property
    def name(self) -> str:
        """What the model attends to, in words."""
        system, ratio = self.settings["system"], self.settings["ratio"]
        if system == "compressed":
            equal = ", equal heads" if self.settings["budget"] == "uniform" and ratio > 1 else ""
            return "anchors, every token" if ratio == 1 else f"anchors, {ratio}x{equal}"
        if system == "truncated":
            return f"text cut to 1 in {ratio}"
        if system in ("full-text", "closed-book"):
            return "text" if system == "full-text" else "nothing (closed-book)"
        return f"{self.kind}, {ratio}x"

    @property
    def kind(self) -> str:
        """What a line of a plot has in common: its name without the ratio."""
        if self.settings["system"] == "compressed":
            return _OWN + (", equal heads" if "equal heads" in self.name else "")
        if self.settings["system"] == "truncated":
            return "text, cut"
        if self.settings["system"] in _SYSTEMS:
            return self.name
        return str(self.settings["labels"].get("title", self.settings["system"]))

    @property
    def order(self) -> tuple[Any, ...]:
        """Position in a table: text first, then anchors from low to high ratios, then peers."""
        system = self.settings["system"]
        place = _SYSTEMS.index(system) if system in _SYSTEMS else len(_SYSTEMS)
        return place, system, self.settings["budget"] or "", self.settings["ratio"] or 0

    def scores(self, name: str) -> list[float]:
        """One score of all questions, in order; empty if it was not recorded."""
        if any(name not in row for row in self.rows.values()):
            return []
        return [float(row[name]) for row in self.rows.values()]

    def scored(self, score: Callable[[str, Sequence[str]], float]) -> list[float]:
        """A score of all answers that their file does not have."""
        return [score(row["prediction"], row["golds"]) for row in self.rows.values()]


def read_measured(folder: str | os.PathLike[str]) -> list[Measured]:
    """The measurements in a folder, in the order of a table.

    Raises:
        ValueError: if it has none, or a file of it is something else.
    """
    measured = [_read(path) for path in sorted(Path(folder).glob("*.jsonl"))]
    measured = [one for one in measured if one.rows]
    if not measured:
        raise ValueError(
            f"{os.fspath(folder)} must hold answers (.jsonl) of `sac-rag bench quality`, has none"
        )
    return sorted(measured, key=lambda one: (one.settings["k"], one.order))


def write_report(
    folder: str | os.PathLike[str], path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Writes the report of a folder of answers.

    Args:
        folder: Files of `quality.evaluate`.
        path: The page, .html.
        title: Default: one that names the number of questions.

    Raises:
        ValueError: as `read_measured` does, and for a speed.json that is something else.
        OSError: if it cannot be written.
    """
    measured = read_measured(folder)
    first = measured[0].settings
    by_k: dict[int, list[Measured]] = {}
    for one in measured:
        by_k.setdefault(one.settings["k"], []).append(one)
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    )
    html = page.render(
        title=title or f"{first['n']} questions, answered from text and from anchors",
        about=", ".join([str(first["labels"].get("model", "")), first["dtype"], *_data(first)]),
        warnings=_warnings(measured),
        groups=[_group(k, of_k) for k, of_k in by_k.items()],
        speed=_speed(Path(folder)),
        examples=_examples(next(iter(by_k.values()))),
        sources=_sources(measured),
        prompt=json.dumps(first.get("prompt"), indent=2, ensure_ascii=False),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as draft:
        draft.write_text(html, encoding="utf-8")
    return path


def _read(path: Path) -> Measured:
    try:
        settings, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        by_number = {row["number"]: row for row in rows}
        settings["system"], settings["k"], settings["labels"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} must hold the answers of an evaluation, but: {error!r}; take it out of the "
            "folder"
        ) from error
    return Measured(settings, dict(sorted(by_number.items())))


def _data(settings: Mapping[str, Any]) -> list[str]:
    """Names of the data files."""
    return list(map(str, settings["labels"].get("data") or []))


def _warnings(measured: Sequence[Measured]) -> list[str]:
    """Why measurements of the folder may not be comparable."""
    warnings = []
    for name in _ALIKE:
        values = {json.dumps(one.settings.get(name), sort_keys=True) for one in measured}
        if len(values) > 1:
            shown = f": {', '.join(sorted(values))}" if max(map(len, values)) < 20 else ""
            warnings.append(f"not all were measured with the same {name}{shown}")
    for one in measured:
        if len(one.rows) < one.settings["n"]:
            asked = f"{len(one.rows)} of {one.settings['n']} questions"
            warnings.append(f"{one.name}, k={one.settings['k']}: {asked} answered")
    return warnings


def _sources(measured: Sequence[Measured]) -> list[tuple[str, str]]:
    """What was measured and by which code, once each, by name."""
    sources: dict[str, dict[str, None]] = {}
    for one in measured:
        labels = one.settings["labels"]
        data = labels.get("data") or {}
        values: dict[str, Any] = {name: one.settings.get(name) for name in _SHOWN}
        values |= {name: labels.get(name) for name in ("model", "commit", "date")}
        values["model weights"] = one.settings.get("model")
        for name in data:
            digest = data[name] if isinstance(data, Mapping) else None
            sources.setdefault("data", {})[f"{name} {digest or ''}".strip()] = None
        if "package" in labels:
            values["packages"] = labels["package"]
        for name, value in values.items():
            if value not in (None, ""):
                sources.setdefault(name, {})[str(value)] = None
    return [(name, "\n".join(values)) for name, values in sources.items()]


def _group(k: int, measured: Sequence[Measured]) -> dict[str, Any]:
    """All systems with one number of chunks: headlines, a table, plots."""
    reference = next((one for one in measured if one.name == "anchors, every token"), None)
    return {
        "name": f"{k} passage{'s' if k > 1 else ''} per question",
        "reference": reference.name if reference else None,
        "headlines": _headlines(measured, reference),
        "rows": [_row(one, reference) for one in measured],
        "plots": [_plot(measured, *axis) for axis in _axes(measured)],
    }


def _headlines(
    measured: Sequence[Measured], reference: Measured | None
) -> list[dict[str, str | list[str]]]:
    """F1 of anchors at each ratio, beside keeping every token and reading the text."""
    text = next((one for one in measured if one.settings["system"] == "full-text"), None)
    headlines: list[dict[str, str | list[str]]] = []
    for one in measured:
        if one.kind != _OWN or one.settings["ratio"] == 1:
            continue
        f1, notes = _mean(one.scores("f1")), []
        if reference and _mean(reference.scores("f1")):
            notes.append(f"{f1 / _mean(reference.scores('f1')):.0%} of every token kept")
        if text:
            notes.append(f"reading the text: {_mean(text.scores('f1')):.3f}")
            ours, theirs = one.scores("first_token_s"), text.scores("first_token_s")
            if ours and theirs and _mean(ours):
                notes.append(f"first token {_mean(theirs) / _mean(ours):.1f}x as fast as from text")
        headlines.append({"f1": f"{f1:.3f}", "name": one.name, "notes": notes})
    return headlines


def _row(one: Measured, reference: Measured | None) -> dict[str, Any]:
    scores = one.scores("f1")
    low, high = interval(scores)
    seconds, kv_bytes = one.scores("first_token_s"), one.scores("kv_bytes")
    return {
        "name": one.name,
        "is_own": one.settings["system"] == "compressed",
        "f1": f"{_mean(scores):.3f}",
        "percent": f"{100 * _mean(scores):.1f}",
        "interval": f"({low:.3f} to {high:.3f})",
        "difference": _difference(one, reference) if reference and one is not reference else "",
        **{name: _share(one.scores(name)) for name in ("em", "contains", "ended")},
        "rouge1": _share(one.scored(rouge1)),
        "raw_em": _share(one.scored(raw_exact_match)),
        "positions": f"{_mean(positions):,.0f}" if (positions := one.scores("positions")) else "",
        "kv": f"{_mean(kv_bytes) / 2**20:,.1f}" if kv_bytes else "",
        "first_token": f"{_mean(seconds):.2f} s" if seconds else "",
    }


def _difference(one: Measured, reference: Measured) -> tuple[str, str]:
    """Mean F1 that is lost against a reference, of the questions that both have answered."""
    common = one.rows.keys() & reference.rows.keys()
    pairs = [(reference.rows[n]["f1"], one.rows[n]["f1"]) for n in sorted(common)]
    if not pairs:
        return "", ""
    more, less = zip(*pairs, strict=True)
    low, high = paired_interval(more, less)
    return f"{_mean(more) - _mean(less):+.3f}", f"({low:+.3f} to {high:+.3f})"


def _examples(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    numbers = set.intersection(*(set(one.rows) for one in measured))
    examples = []
    for number in sorted(numbers)[:_EXAMPLES]:
        rows = [(one.name, one.rows[number]) for one in measured]
        examples.append(
            {
                "question": rows[0][1]["question"],
                "gold": " · ".join(rows[0][1]["golds"]),
                "answers": [
                    {"name": name, "text": row["prediction"], "is_right": bool(row["contains"])}
                    for name, row in rows
                ],
            }
        )
    return examples


def _axes(measured: Sequence[Measured]) -> Iterable[tuple[str, Callable[[Measured], float]]]:
    """The horizontal axes for which there are values, each with a measurement's place on it."""
    yield "source tokens per KV entry or token read", _ratio
    for label, name, unit in (
        ("MiB of KV attended to", "kv_bytes", 2**20),
        ("seconds to the first token", "first_token_s", 1),
    ):
        if all(one.scores(name) for one in measured):
            yield label, lambda one, name=name, unit=unit: _mean(one.scores(name)) / unit  # type: ignore[misc]


def _ratio(one: Measured) -> float:
    return float(one.settings["ratio"] or 0)


def _plot(measured: Sequence[Measured], label: str, place: Callable[[Measured], float]) -> str:
    """F1 with its interval over something, as SVG: a line for each kind of system."""
    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    lines: dict[str, list[Measured]] = {}
    for one in measured:
        lines.setdefault(one.kind, []).append(one)
    others = [name for name in lines if name != _OWN]
    for name, points in lines.items():
        points = sorted(points, key=place)
        is_own = name == _OWN
        color = "C0" if is_own else f"C{1 + others.index(name) % 9}"
        means = [_mean(one.scores("f1")) for one in points]
        if place is _ratio and points[0].settings["system"] in ("full-text", "closed-book"):
            # Neither has a ratio to choose.
            axes.axhline(means[0], color=color, linestyle="--", linewidth=1, label=name)
            continue
        bounds = [interval(one.scores("f1")) for one in points]
        below = [mean - low for mean, (low, _) in zip(means, bounds, strict=True)]
        above = [high - mean for mean, (_, high) in zip(means, bounds, strict=True)]
        axes.errorbar(
            [place(one) for one in points], means, yerr=[below, above],
            fmt="o-" if len(points) > 1 else "s", color=color, label=name, capsize=2,
            markersize=6 if is_own else 4, linewidth=2.5 if is_own else 1.2, elinewidth=0.8,
        )  # fmt: skip
    axes.set(xlabel=label, ylabel="F1", xscale="log", ylim=(0, None))
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    drawn = io.StringIO()
    # A fixed salt gives equal figures equal names, and no date makes equal files equal.
    salt = f"{label} {measured[0].settings['k']}"
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]


def _speed(folder: Path) -> dict[str, Any] | None:
    """Times of the longest answer in all ways, by number of chunks; None if there are none."""
    path = folder / SPEED
    if not path.is_file():
        return None
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        longest = max(row["answer_tokens"] for row in rows)
        groups: dict[int, list[dict[str, str]]] = {}
        for row in rows:
            if row["answer_tokens"] == longest:
                groups.setdefault(row["k"], []).append(_speed_row(row))
        first = rows[0]
        about = f"{first['dtype']}, {first['threads']} threads of {first['device']}"
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} must be what `sac-rag bench speed --out` writes, but: {error!r}; take it out "
            "of the folder"
        ) from error
    plot = folder / SPEED_PLOT
    image = b64encode(plot.read_bytes()).decode() if plot.is_file() else ""
    return {"groups": groups, "tokens": longest, "about": about, "image": image}


def _speed_row(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "name": row["name"],
        "kv": f"{row['kv_bytes'] / 2**20:,.1f}" if row["kv_bytes"] else "",
        "skipped": row["skipped"] or "",
        **{name: _seconds(row[name]) for name in ("first_token", "answer")},
    }


def _seconds(times: Mapping[str, float] | None) -> str:
    if times is None:
        return ""
    return f"{times['median_s']:.2f} s ({times['best_s']:.2f} to {times['worst_s']:.2f})"


def _share(values: Sequence[float]) -> str:
    return f"{_mean(values):.3f}" if values else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
