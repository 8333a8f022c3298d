"""Draws results files, and nothing else: every coordinate is a figure that a run wrote down.

SVG on a white card of its own, so that print, light and dark pages show the same; its metadata holds a digest of the
results that it shows. Ours is blue, thick and bold. Each peer has one colour, marker and dash in every picture, and its
name stands where its line ends.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullLocator
from matplotlib.transforms import Bbox

from . import step
from .environment import RESULTS, provenance
from .logits import FORWARD, FRESH, INPLACE, PASSES
from .measure import DTYPES

INK, MUTED, FAINT = "#1c1c1c", "#5f5f5f", "#dedede"
STYLE = {
    "figure.dpi": 72,  # one pixel is one point
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",  # matplotlib brings it along
    "font.size": 8,
    "text.color": INK,
    "text.hinting": "none",  # widths as in the SVG
    "axes.linewidth": 0.6,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.titlesize": 8.5,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "svg.fonttype": "path",  # the same picture whatever fonts the reader has
    "svg.hashsalt": "kto_kernels",  # the same results, the same bytes
}
WIDTH = 9.0  # inches
SMALL = 7.2  # points: 9 pixels where a page of 830 pixels shows the picture
CUT = 8  # times the floor: longer bars would leave no room for the others
CROSS = 10.0  # points, where a line ends too early


# Who looks how ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Look:
    color: str
    marker: str
    dashes: str | tuple
    ours: bool = False

    @property
    def line(self) -> dict:
        weight = {"linewidth": 2.2, "zorder": 4} if self.ours else {"linewidth": 1.2, "zorder": 3}
        return {"color": self.color, "marker": self.marker, "linestyle": self.dashes, "markeredgewidth": 1.0, **weight}

    @property
    def text(self) -> dict:
        return {"color": self.color, "fontweight": "bold" if self.ours else "normal"}


SOLID, DASH, DOT, LONG = "-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (7, 2))
BLUE, ORANGE, GREEN, PURPLE, ROSE, OLIVE = "#004fb4", "#a84c00", "#117733", "#8a3f94", "#a63a50", "#6b6400"
# The first whose words are all in the name. In grey print marker and dash tell apart what the colours do not.
LOOKS = {
    ("FusedKTOTrainer",): Look(BLUE, "o", SOLID, ours=True),
    ("kto_loss", "cuda", FRESH): Look(BLUE, "s", DASH, ours=True),
    ("kto_loss", FRESH): Look(BLUE, "o", DASH, ours=True),
    ("kto_loss", "cuda"): Look(BLUE, "s", SOLID, ours=True),
    ("kto_loss", "torch"): Look(BLUE, "d", DOT, ours=True),
    ("kto_loss",): Look(BLUE, "o", SOLID, ours=True),
    ("preference_loss", "cuda"): Look(BLUE, "s", SOLID, ours=True),
    ("preference_loss",): Look(BLUE, "o", SOLID, ours=True),
    ("compile", "naive"): Look(MUTED, "X", LONG),
    ("naive", "scored"): Look(MUTED, "+", SOLID),
    ("naive",): Look(MUTED, "x", DOT),
    ("TRL", "entropy"): Look(ORANGE, "v", DOT),
    ("TRL", "selective"): Look(ORANGE, "v", DASH),
    ("TRL",): Look(ORANGE, "v", SOLID),
    ("trl",): Look(ORANGE, "v", SOLID),
    ("Liger", "KTO"): Look(GREEN, "^", SOLID),
    ("Liger", "DPO"): Look(GREEN, "^", SOLID),
    ("Liger",): Look(GREEN, "^", DASH),
    ("F.linear_cross_entropy",): Look(PURPLE, "D", SOLID),
    ("quack", "chunked"): Look(OLIVE, "P", DASH),
    ("quack",): Look(OLIVE, "P", SOLID),
    ("CCE",): Look(ROSE, "*", SOLID),
}
OTHER = Look(INK, "h", LONG)
GUIDE = {"color": INK, "linewidth": 0.8, "linestyle": DASH, "zorder": 5}  # what is not a variant: a ceiling, a plan
LOSS_SHADES = (BLUE, "#8fb4e3")  # the parts of a step: of the loss, and grey for the others
SHADES = ("#bdbdbd", "#dedede", "#cacaca", "#8f8f8f", "#ebebeb", "#a6a6a6")


def look(name: str) -> Look:
    found = (look for words, look in LOOKS.items() if all(word in name for word in words))
    return next(found, OTHER)


# Text and scales ──────────────────────────────────────────────────────────────────────────────────────────────────────


def size(n: float, _=None) -> str:
    exponent, unit = next(((e, u) for e, u in ((40, "TiB"), (30, "GiB"), (20, "MiB")) if n >= 2**e), (10, "KiB"))
    return f"{n / 2**exponent:.3g} {unit}" if n else "0"


def duration(s: float, _=None) -> str:
    return f"{s:.3g} s" if s >= 1 or not s else f"{1e3 * s:.3g} ms"


def count(n: float, _=None) -> str:
    n = round(n)
    factor, unit = next(((f, u) for f, u in ((2**20, "M"), (2**10, "k")) if n >= f and n % f == 0), (1, ""))
    return f"{n // factor:,}{unit}"


def plain(n: float, _=None) -> str:
    return f"{n:,.0f}" if n >= 100 else f"{n:.3g}"


def times(ratio: float, _=None) -> str:
    return f"{ratio:g}×"


def wrapped(name: str, width: int) -> str:
    """Broken after spaces and underscores, and inside of words only where these are too long."""
    lines = [""]
    for word in re.findall(r"[^ _]+[ _]?", name):
        for piece in [word] if len(word.rstrip()) <= width else re.findall(r"[A-Z]?[^A-Z]+|[A-Z]", word):
            if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
                lines.append("")
            lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def reason(why: str) -> str:
    """Why something failed, in a few words: of an error the name."""
    known = re.search("out of memory|over the cap.*", why)
    return known[0] if known else textwrap.shorten(re.split(r"[:;(\n]", why)[0], 30, placeholder="…")


def has_failed(why: str | None) -> bool:
    """A peer that is not installed, knows no such case or was not chosen has not failed at a size: the tables name it."""
    return why is not None and not re.match("absent|not run: not among", why)


def shape_of(case: dict, *but: str) -> str:
    sizes = [f"{name}={case[name]:,}" for name in ("N", "H", "V") if name in case and name not in but]
    first = [case["model"]] if case.get("model") and not but else sizes
    lines = [[*first, case["dtype"]], sizes if first is not sizes else []]
    return "\n".join(" · ".join(line) for line in lines if line)


def measured_ticks(axes: Axes, xs: Iterable[float], text: Callable, letters: int = 18) -> None:
    """A logarithmic x-axis with ticks at points that were measured, from the last on as many as have room where so many
    letters, well apart, fill the axis."""
    xs = sorted(set(xs))
    room = math.log(xs[-1] / xs[0]) / letters * max(len(text(x)) for x in xs)
    kept = [xs[-1]]
    for x in reversed(xs[:-1]):
        if math.log(kept[-1] / x) >= room:
            kept.append(x)
    axes.set_xscale("log", base=2)
    axes.xaxis.set(major_locator=FixedLocator(kept), minor_locator=NullLocator(), major_formatter=FuncFormatter(text))


def round_ticks(axes: Axes, text: Callable) -> None:
    """For a logarithmic y-axis: bytes at powers of two, seconds at powers of ten."""
    low, high = axes.get_ylim()
    if high / low < 4:  # so that two powers of two are in sight, and a small difference looks small
        low, high = axes.set_ylim(low / 2, high * 2)
    if text is size:
        locator = LogLocator(next((base for base in (2, 4, 16) if high / low < base**6), 64))
    else:
        locator = LogLocator(10, subs=(1,) if high / low > 300 else (1, 3) if high / low > 10 else (1, 2, 5))
    axes.yaxis.set(major_locator=locator, minor_locator=NullLocator(), major_formatter=FuncFormatter(text))
    axes.grid(axis="y")


# A picture and its parts ──────────────────────────────────────────────────────────────────────────────────────────────


class Picture:
    """Panels under a title and over where their figures are from. Its sizes, in inches, follow from what is in it."""

    def __init__(
        self,
        title: str,
        subtitle: str,
        result: dict,
        panels: int,
        columns: int = 1,
        heights: float | Sequence[float] = 2.2,  # of every panel, or of each
    ):
        self.figure = Figure(figsize=(WIDTH, WIDTH))
        FigureCanvasAgg(self.figure)
        self.title, self.subtitle, self.source = title, subtitle, provenance(result)
        self.columns = min(columns, panels)
        self.heights = [heights] * panels if isinstance(heights, float) else list(heights)
        # For now as narrow as a panel may become: what stands beside it is measured first.
        self.panels = [self.figure.add_axes((0.2, 0.2, 0.2, 0.2), label=str(i)) for i in range(panels)]

    def finish(self, gap: float = 0.62, first_gap: float = 0.34) -> Figure:
        """Room above the panels: `first_gap` for those at the top, `gap` for the others."""
        renderer = self.figure.canvas.get_renderer()
        names = {axes: [text for text in axes.texts if isinstance(text, EndName)] for axes in self.panels}
        heights = {name: box_of(name, renderer).height + 1.5 for column in names.values() for name in column}
        left = right = 0.0
        for axes in self.panels:
            frame = axes.get_window_extent(renderer)
            labels = [label.get_window_extent(renderer).x0 for label in axes.get_yticklabels()]
            left = max([left, *(frame.x0 - x for x in labels)])
            right = max([right, *(box_of(text, renderer).x1 - frame.x1 for text in axes.texts)])
        left, right = left / 72 + 0.2, right / 72 + 0.16
        least = max(sum(heights[name] for name in column) / 72 for column in names.values())
        panel_heights = [max(height, least) for height in self.heights]
        rows = [max(panel_heights[i : i + self.columns]) for i in range(0, len(panel_heights), self.columns)]

        head, foot = textwrap.wrap(self.subtitle, 148), textwrap.wrap(self.source + ".", 165, break_on_hyphens=False)
        title_lines = max(axes.get_title().count("\n") for axes in self.panels)
        gap, first_gap = gap + 0.15 * title_lines, first_gap + 0.15 * title_lines
        above, below = 0.38 + 0.16 * len(head), 0.6 + 0.12 * len(foot)
        total = above + first_gap + sum(rows) + (len(rows) - 1) * (gap + 0.1) + below
        self.figure.set_size_inches(WIDTH, total)
        column_width = WIDTH / self.columns
        width = column_width - left - right
        for i, (axes, height) in enumerate(zip(self.panels, panel_heights)):
            row, column = divmod(i, self.columns)
            bottom = total - above - first_gap - sum(rows[:row]) - row * (gap + 0.1) - height
            x = column * column_width + left
            axes.set_position((x / WIDTH, bottom / total, width / WIDTH, height / total))
            axes.title.set(x=(0.16 - left) / width, ha="left")
            place(names[axes], heights, 72 * (x + width), 72 * bottom, 72 * (bottom + height))
        edge = 0.16 / WIDTH
        write = self.figure.text
        write(edge, 1 - 0.14 / total, self.title, va="top", fontsize=11, fontweight="bold")
        write(edge, 1 - 0.37 / total, "\n".join(head), va="top", color=MUTED)
        write(edge, 0.1 / total, "\n".join(foot), va="bottom", fontsize=SMALL, color=MUTED)
        return self.figure


class EndName(Annotation):
    """The name of a line, to stand right of the panel at the height where the line ends; a hairline leads there if that
    is not beside it."""

    def __init__(self, axes: Axes, point: tuple[float, float] | None, text: str, **style) -> None:
        self.hangs = point is None  # of a line that is not there: at the top
        super().__init__(
            text,
            point or (1, 1),
            (1, 0),
            xycoords="axes fraction" if self.hangs else "data",
            textcoords="axes fraction",
            va="center",
            linespacing=1.05,
            annotation_clip=False,
            clip_on=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": style["color"], "shrinkA": 1, "shrinkB": 4}
            | {"relpos": (0, 0.5), "alpha": 0.7},
            **style,
        )
        axes.add_artist(self)


def box_of(text: Text, renderer) -> Bbox:
    if isinstance(text, Annotation):
        text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)  # without the hairline


def place(names: list[EndName], heights: dict[EndName, float], right: float, low: float, high: float) -> None:
    """Puts the names of one panel beside it, all in points."""
    ends = [name._get_xy(None, name.xy, name.xycoords) for name in names]
    centres = spread([y for _, y in ends], [heights[name] for name in names], low - 4, high + 4)
    for name, (x, y), centre in zip(names, ends, centres):
        name.set(anncoords="figure points", position=(right + 8, centre))
        name.arrow_patch.set_visible(not name.hangs and (abs(centre - y) > 3 or right - x > 16))


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Centres nearest to the wanted ones, in their order, at which boxes of these heights do not overlap.

    Less what the boxes below it take, a centre may be anything not below its predecessor's: isotonic regression, by
    pooling neighbours that are out of order.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    below = list(itertools.accumulate((heights[i] for i in order), initial=0.0))
    offsets = [below[k] + heights[i] / 2 for k, i in enumerate(order)]
    pools: list[tuple[float, int]] = []  # mean, how many
    for i, offset in zip(order, offsets):
        mean, many = wanted[i] - offset, 1
        while pools and pools[-1][0] > mean:
            before, number = pools.pop()
            mean, many = (before * number + mean * many) / (number + many), number + many
        pools.append((mean, many))
    means = [mean for mean, many in pools for _ in range(many)]
    centres = [0.0] * len(wanted)
    for i, mean, offset in zip(order, means, offsets):
        centres[i] = max(low, min(mean, high - below[-1])) + offset
    return centres


def curve(axes: Axes, points: Sequence[tuple[float, float]], name: str, label: str) -> Line2D:
    (line,) = axes.plot(*zip(*points), label=name, **look(name).line)
    EndName(axes, points[-1], label, **look(name).text)
    return line


def bars(axes: Axes, values: dict[str, tuple[float, str]], end: float) -> BarContainer:
    """For each name a horizontal bar, of (length, what stands at its end); one longer than the axis stops there and says
    so."""
    looks = {name: look(name) for name in values}
    lengths = [min(length, end) for length, _ in values.values()]
    drawn = axes.barh(range(len(values)), lengths, height=0.68, color=[looks[name].color for name in values])
    for row, (bar, (name, (length, text))) in enumerate(zip(drawn, values.items())):
        bar.set_alpha(1.0 if looks[name].ours else 0.45)
        bar_text(axes, lengths[row], row, f"» {text}" if length > end else text, name)
    axes.set(ylim=(len(values) - 0.4, -0.6), xlim=(0, end))
    axes.set_yticks(range(len(values)), [wrapped(name, 32) for name in values], linespacing=0.95)
    for tick, name in zip(axes.get_yticklabels(), values):
        tick.set(**looks[name].text)
    return drawn


def bar_text(axes: Axes, x: float, y: float, text: str, name: str) -> None:
    card = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    offset = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (x, y), **offset, bbox=card, zorder=6, **look(name).text)


def bar_picture(title: str, subtitle: str, result: dict, cases: list[dict], values: list[dict]) -> Picture:
    """A picture with a panel for each case, of its variants alone, in one order; the subtitle says who is not in all."""
    everyone = list(dict.fromkeys(name for variants in values for name in variants))
    for variants in values:
        for name in everyone:  # each is taken out and put at the end
            if name in variants:
                variants[name] = variants.pop(name)
    subtitle = " ".join([subtitle, *not_run(everyone, cases, values)])
    picture = Picture(title, subtitle, result, len(cases), columns=2, heights=[0.29 * len(shown) for shown in values])
    for axes, case in zip(picture.panels, cases):
        axes.set_title("\n".join(wrapped(line, 48) for line in shape_of(case).split("\n")))
    return picture


def not_run(everyone: Iterable[str], cases: list[dict], values: list[dict]) -> list[str]:
    """A sentence for each set of shapes that some of these were not run on."""
    missing: dict[tuple[str, ...], list[str]] = {}
    for name in everyone:
        where = dict.fromkeys(shape_of(case).split("\n")[0] for case, shown in zip(cases, values) if name not in shown)
        missing.setdefault(tuple(where), []).append(name)
    return [f"Not run on {'; '.join(where)}: {'; '.join(names)}." for where, names in missing.items() if where]


# One function for each kind of results: what a file's name ends in → picture ──────────────────────────────────────────


def logits_pictures(result: dict) -> dict[str, Figure]:
    """Bandwidth against N: bytes that the loss must move at least, over the time it took. The vocabulary is the
    one with the most N; none where that is a single N: a curve through one point says less than the table."""
    by_vocab: dict[int, list[dict]] = {}
    for case in result["cases"]:
        by_vocab.setdefault(case["V"], []).append(case)
    vocab, cases = max(by_vocab.items(), key=lambda item: len({case["N"] for case in item[1]}))
    if len({case["N"] for case in cases}) < 2:
        return {}
    panels: dict[tuple[bool, str], dict[str, list[tuple[int, float]]]] = {}
    for forward, dtype in itertools.product((False, True), dict.fromkeys(case["dtype"] for case in cases)):
        lines = panels.setdefault((forward, dtype), {})
        for case in sorted((case for case in cases if case["dtype"] == dtype), key=lambda case: case["N"]):
            for variant, seconds in case["seconds"].items():
                mode = variant.rsplit(", ", 1)[-1]
                if mode in PASSES and (mode == FORWARD) == forward:
                    moved = PASSES[mode] * case["N"] * vocab * DTYPES[dtype].itemsize
                    lines.setdefault(variant, []).append((case["N"], moved / seconds["median"] / 1e9))
    panels = {panel: lines for panel, lines in panels.items() if lines}
    picture = Picture(
        f"Memory bandwidth that the loss from logits reaches, V={vocab:,}",
        "The bytes that must be moved at least (forward: each logit read once; backward: read and written once more) over the "
        "median time. Dashed: the ceiling of this device, measured in the same run.",
        result,
        len(panels),
        columns=len({dtype for _, dtype in panels}),
    )
    for axes, ((forward, dtype), lines) in zip(picture.panels, panels.items()):
        axes.set(title=f"{'forward alone' if forward else 'forward + backward'}, {dtype}, GB/s", xlabel="tokens N")
        measured_ticks(axes, [case["N"] for case in cases], count)
        for variant, points in lines.items():
            name, mode = variant.rsplit(", ", 1)
            curve(axes, points, variant, wrapped(name, 20) + ("\nin place" if mode == INPLACE else ""))
        kind = "read" if forward else "copy"
        ceiling = result.get("ceilings", {}).get(f"{kind} bytes/s", 0) / 1e9
        top = 1.12 * max(ceiling, axes.dataLim.y1)
        if ceiling:
            axes.axhline(ceiling, label=f"{kind} ceiling", **GUIDE)
            why = why_above(lines, ceiling)
            words = [f"{kind}, {plain(ceiling)} GB/s" + ("; above it:" if why else ""), *why]
            where = {"va": "bottom", "transform": axes.get_yaxis_transform(), "linespacing": 1.1}
            axes.text(0.01, ceiling, "\n".join(words), fontstyle="italic", **where)
            top = max(top, ceiling / (1 - 0.07 * len(words)))  # room for these words
        axes.set_ylim(0, top)
        axes.yaxis.set(
            major_locator=MaxNLocator(6, steps=(1, 2, 2.5, 5, 10)),
            major_formatter=FuncFormatter(lambda y, _: f"{y:,g}"),
        )
        axes.grid(axis="y")
    return {"": picture.finish()}


ABOVE = {  # why a pass may take less time than its bytes at the ceiling
    FORWARD: "this kernel reads faster than the read that is the ceiling",
    FRESH: "it writes one byte in three, a copy one in two",
    INPLACE: "in place, written lines are still in the cache",
}


def why_above(variants: dict[str, list[tuple[int, float]]], ceiling: float) -> list[str]:
    """Lines of text: for each way to call that is above the ceiling somewhere, the reason."""
    above = [name for name, points in variants.items() if max(rate for _, rate in points) > ceiling]
    reasons = dict.fromkeys(ABOVE[name.rsplit(", ", 1)[-1]] for name in above)
    return [line for why in reasons for line in textwrap.wrap(why, 30)]


LOSS = {"linear": "the loss", "linear-dpo": "the DPO loss"}


def linear_pictures(result: dict) -> dict[str, Figure]:
    """For each kind of head, the time of every variant over that of the floor, which is the first of a case."""
    return {suffix: linear_picture(result, head, cases) for head, suffix, cases in by_head(result)}


def by_head(result: dict) -> list[tuple[str, str, list[dict]]]:
    """Head, what the name of its picture ends in (nothing, for the first), its cases."""
    heads = list(dict.fromkeys(case["head"] for case in result["cases"]))
    return [
        (head, f"-{head}" if i else "", [case for case in result["cases"] if case["head"] == head])
        for i, head in enumerate(heads)
    ]


def linear_picture(result: dict, head: str, cases: list[dict]) -> Figure:
    values = []
    for case in cases:
        floor, *names = case["seconds"]
        medians = {name: case["seconds"][name]["median"] for name in (floor, *names)}
        ratios = {name: medians[name] / medians[floor] for name in names}
        values.append({name: (ratio, f"{ratio:.2f}×  {duration(medians[name])}") for name, ratio in ratios.items()})
        values[-1] |= {name: (0.0, reason(why)) for name, why in case["absent"].items() if has_failed(why)}
    end = min(CUT, max((length for variants in values for length, _ in variants.values()), default=1.0))
    picture = bar_picture(
        f"Time of {LOSS[result['benchmark']]} from hidden states, {head} head, in units of its bare matrix products",
        "Policy and reference, forward and backward, medians. Dashed: the matrix products alone, unchunked, into buffers "
        "that are there." + (f" A bar that ends in » is longer than {CUT}×." if end == CUT else ""),
        result,
        cases,
        values,
    )
    for axes, variants in zip(picture.panels, values):
        bars(axes, variants, end)
        axes.axvline(1, label="bare GEMMs", **GUIDE)
        ticks = range(1, int(end) + 1, 1 if end < 5 else 2)
        axes.xaxis.set(major_locator=FixedLocator(ticks), major_formatter=FuncFormatter(times))
    return picture.finish()


Point = tuple[int, float | None, str | None]  # x, what was measured there, why it failed


def sweep(
    axes: Axes, series: dict[str, list[Point]], plan: list[tuple[int, float]], xtext, ytext, narrow: bool
) -> None:
    """Lines on two logarithmic axes, in the order of x. A cross ends the line of what failed further on, and its name
    says why; the name of what never worked stands alone."""
    width, letters = (25, 18) if narrow else (32, 50)  # of a name; as `measured_ticks` has it
    measured_ticks(axes, [x for x, _ in plan], xtext, letters)
    axes.set_yscale("log")
    for name, points in series.items():
        done = [(x, y) for x, y, _ in points if y]  # none of 0 bytes: they have no place on a logarithmic axis
        failed = next(((x, why) for x, y, why in points if not y and has_failed(why)), None)
        label = wrapped(name, width) + (f"\n× {reason(failed[1])} at {xtext(failed[0])}" if failed else "")
        if done:
            line = curve(axes, done, name, label)
            if failed:
                axes.plot(
                    *done[-1], marker="x", markersize=CROSS, markeredgewidth=1.4, color=line.get_color(), zorder=5
                )
        elif failed:
            EndName(axes, None, label, **look(name).text)
    axes.plot(*zip(*plan), label="plan", **GUIDE)
    EndName(axes, plan[-1], "plan", color=INK, fontstyle="italic")
    round_ticks(axes, ytext)


SWEEPS = {  # what the x of a sweep is: key of the case, label, text
    "N": ("N", "tokens N", count),
    "V": ("V", "vocabulary V", plain),
    "H": ("H", "hidden size H", plain),
    "budget": ("max_logits_bytes", "max_logits_bytes", size),
}
ENDS = "×: the last size that worked, and why the next did not. Dashed: what the plan says of ours"


def memory_pictures(result: dict) -> dict[str, Figure]:
    """For each kind of head, peak memory along every sweep, and side by side for the heads of real models."""
    found = {}
    for head, suffix, cases in by_head(result):
        sweeps = sweeps_of(cases)
        models = [case for case in cases if case["sweep"] == "model"]
        if sweeps:
            found[suffix] = memory_sweeps(result, head, sweeps)
        if models:
            found[f"-models{suffix}"] = memory_of_models(result, head, models)
    return found


def sweeps_of(cases: list[dict]) -> list[tuple[str, list[dict]]]:
    """The name of the size that is varied, and all cases that differ in nothing else, for whichever purpose they were measured."""
    found: dict[tuple, tuple[str, list[dict]]] = {}
    for case in cases:
        if case["sweep"] in SWEEPS:
            key, *_ = SWEEPS[case["sweep"]]
            fixed = [name for name in ("dtype", "N", "H", "V", "max_logits_bytes") if name != key]
            alike = {other[key]: other for other in cases if all(other.get(name) == case.get(name) for name in fixed)}
            alike.pop(None, None)  # a budget that the plan chose has no place on its axis
            group = (key, *(case.get(name) for name in fixed))
            found[group] = (case["sweep"], [alike[x] for x in sorted(alike)])
    return [sweep for sweep in found.values() if len(sweep[1]) > 1]


def memory_sweeps(result: dict, head: str, sweeps: list[tuple[str, list[dict]]]) -> Figure:
    picture = Picture(
        f"Peak memory of the loss from hidden states, {head} head",
        f"Above the inputs, forward and backward. {ENDS}.",
        result,
        len(sweeps),
        columns=2,
    )
    for axes, (name, cases) in zip(picture.panels, sweeps):
        key, label, text = SWEEPS[name]
        variants = dict.fromkeys(name for case in cases for name in (*case["peak extra bytes"], *case["failed"]))
        series = {
            name: [(case[key], case["peak extra bytes"].get(name), case["failed"].get(name)) for case in cases]
            for name in variants
        }
        axes.set(title=f"against {name} · {shape_of(cases[0], key)}", xlabel=label)
        sweep(axes, series, [(case[key], case["plan"]["peak bytes"]) for case in cases], text, size, narrow=True)
    return picture.finish()


def memory_of_models(result: dict, head: str, cases: list[dict]) -> Figure:
    values = [
        {name: (peak, size(peak)) for name, peak in case["peak extra bytes"].items() if peak is not None}
        | {name: (0, reason(why)) for name, why in case["failed"].items() if has_failed(why)}
        for case in cases
    ]
    picture = bar_picture(
        f"Peak memory of the loss from hidden states, {head} head, by shape",
        "Above the inputs, forward and backward. Dashed: what the plan says of ours.",
        result,
        cases,
        values,
    )
    for axes, case, variants in zip(picture.panels, cases, values):
        longest = max(case["plan"]["peak bytes"], *(length for length, _ in variants.values()))
        bars(axes, variants, longest)
        axes.axvline(case["plan"]["peak bytes"], label="plan", **GUIDE)
        tick = 2 ** math.floor(math.log2(longest / 1.5))
        axes.xaxis.set(major_locator=MultipleLocator(tick), major_formatter=FuncFormatter(size))
    return picture.finish()


def longcontext_pictures(result: dict) -> dict[str, Figure]:
    """For each kind of head, memory and time against the tokens of one sequence."""
    return {suffix: longcontext_picture(result, head, cases) for head, suffix, cases in by_head(result)}


def longcontext_picture(result: dict, head: str, cases: list[dict]) -> Figure:
    groups: dict[str, list[dict]] = {}
    for case in sorted(cases, key=lambda case: case["tokens"]):
        groups.setdefault(shape_of(case, "N"), []).append(case)
    measures = (
        ("peak memory above the inputs", "peak extra bytes", "peak bytes", size),
        ("time", "seconds", "seconds", duration),
    )
    picture = Picture(
        f"The loss of one sequence from hidden states, {head} head, from short to long",
        f"Forward and backward. {ENDS}; its time is that of its matrix products at the rate measured in the same run.",
        result,
        len(measures) * len(groups),
        heights=2.5,
    )
    panels = itertools.product(groups.items(), measures)
    for axes, ((shape, cases), (what, key, planned, text)) in zip(picture.panels, panels):
        series = {
            name: [
                (case["tokens"], case["variants"][name][key], case["variants"][name]["failed"])
                for case in cases
                if name in case["variants"]
            ]
            for name in dict.fromkeys(name for case in cases for name in case["variants"])
        }
        axes.set(title=f"{what} · {shape}", xlabel="tokens")
        sweep(axes, series, [(case["tokens"], case["plan"][planned]) for case in cases], count, text, narrow=False)
    return picture.finish()


REST = "rest"


def parts_of(case: dict, variant: str) -> dict[str, float]:
    """Medians of the parts of one step: those of the loss, the others, and what both leave of the step."""
    whole = case["seconds"][step.STEP][variant]["median"]
    timed = case.get("parts", {}).get(variant) or {step.LOSS: case["seconds"][step.LOSS][variant]}
    medians = {name: quartiles["median"] for name, quartiles in timed.items()}
    parts = {name: medians[name] for name in sorted(medians, key=lambda name: not name.startswith(step.LOSS))}
    rest = whole - sum(parts.values())
    return parts | ({REST: rest} if rest > 0.01 * whole else {})


TUNING = {step.TRAINED: "full fine-tuning", step.LORA: "LoRA"}


def step_pictures(result: dict) -> dict[str, Figure]:
    cases = result["cases"]
    stacks = [{name: parts_of(case, name) for name in case["seconds"][step.STEP]} for case in cases]
    parts = list(dict.fromkeys(part for stack in stacks for timed in stack.values() for part in timed))
    parts.sort(key=lambda part: (not part.startswith(step.LOSS), part == REST))
    of_loss = [part for part in parts if part.startswith(step.LOSS)]
    shades = dict(zip(of_loss, itertools.cycle(LOSS_SHADES)))
    shades |= dict(zip((part for part in parts if part not in of_loss), itertools.cycle(SHADES)))
    models = dict.fromkeys(case["model"] for case in cases if case.get("model"))
    picture = Picture(
        "Where the time of a training step goes",
        f"One optimizer step of {', '.join(models) or 'a model'}: medians in seconds, in the bars of each part, at their "
        "ends of the whole step; one scale for each dtype. Blue: the loss part (head, loss and metrics of policy, reference "
        f"and KL), whose gradients {step.OURS} forms in the forward. Grey: what this package does not touch.",
        result,
        len(cases),
        heights=[0.31 * len(stack) for stack in stacks],
    )
    longest: dict[str, float] = {}
    for case, stack in zip(cases, stacks):
        longest[case["dtype"]] = max(longest.get(case["dtype"], 0), *(sum(timed.values()) for timed in stack.values()))
    for axes, case, stack in zip(picture.panels, cases, stacks):
        title = f"{TUNING.get(case['head'], case['head'])}, {case['dtype']}"
        axes.set(title=title, ylim=(len(stack) - 0.5, -0.5), xlim=(0, longest[case["dtype"]]))
        axes.set_yticks(range(len(stack)), list(stack))
        axes.xaxis.set_visible(False)  # the seconds are written out
        axes.spines.bottom.set_visible(False)
        for row, (variant, timed) in enumerate(stack.items()):
            axes.get_yticklabels()[row].set(**look(variant).text)
            begin = 0.0
            for part, seconds in timed.items():
                axes.barh(row, seconds, left=begin, height=0.7, color=shades[part], edgecolor="white", label=part)
                begin += seconds
            bar_text(axes, begin, row, whole_step(case["seconds"][step.STEP], variant), variant)
    swatches = [Patch(color=shades[part], label=part) for part in parts]
    columns = min(4, -(-len(parts) // 2))
    room = 0.42 + 0.18 * -(-len(parts) // columns)  # the names of the parts
    figure = picture.finish(gap=0.3, first_gap=room)
    for axes in picture.panels:
        for bar in axes.containers:
            write_inside(axes, bar, "white" if shades[bar.get_label()] == BLUE else INK)
    above = picture.panels[0].get_position().y1 + (room + 0.02) / figure.get_figheight()
    corner = {"loc": "upper left", "bbox_to_anchor": (0.08 / WIDTH, above)}
    figure.legend(handles=swatches, ncols=columns, handlelength=1, handleheight=1, **corner)
    return {"": figure}


def whole_step(seconds: dict[str, dict], variant: str) -> str:
    """The time of a step, and of ours how much that is less than TRL's."""
    mine = seconds[variant]["median"]
    if variant != step.OURS or step.TRL not in seconds:
        return f"{mine:.2f} s"
    less = 1 - mine / seconds[step.TRL]["median"]
    return f"{mine:.2f} s, {abs(less):.0%} {'less' if less > 0 else 'more'}"


def write_inside(axes: Axes, bar: BarContainer, color: str) -> None:
    """Seconds in the middle of a bar that has room for them."""
    (text,) = axes.bar_label(bar, [f"{bar[0].get_width():.2f}"], label_type="center", color=color, fontsize=SMALL)
    renderer = axes.figure.canvas.get_renderer()
    if text.get_window_extent(renderer).width > bar[0].get_window_extent(renderer).width - 2:
        text.remove()


PICTURES = {
    "logits": logits_pictures,
    "linear": linear_pictures,
    "linear-dpo": linear_pictures,
    "memory": memory_pictures,
    "longcontext": longcontext_pictures,
    "step": step_pictures,
}


def figures(result: dict) -> dict[str, Figure]:
    """File name → picture of these results; empty where their kind has none."""
    with matplotlib.rc_context(STYLE):
        made = PICTURES[result["benchmark"]](result) if result["benchmark"] in PICTURES and result["cases"] else {}
    return {f"{result['benchmark']}-{result['device kind']}{suffix}.svg": figure for suffix, figure in made.items()}


def digest(result: dict) -> str:
    """The line in a picture's file that says which results it shows."""
    return "sha256:" + hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def draw(result: dict, folder: Path = RESULTS) -> list[Path]:
    """Writes the pictures of these results into a folder and returns their paths."""
    paths = []
    for name, figure in figures(result).items():
        paths.append(folder / name)
        with matplotlib.rc_context(STYLE):
            figure.savefig(paths[-1], metadata={"Date": None, "Creator": None, "Identifier": digest(result)})
    return paths
