"""The pictures show the figures of results files, all of them, each where it belongs, and every word can be read."""

import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("matplotlib")
from benchmarks import plots, report, step
from benchmarks.logits import FORWARD, FRESH, INPLACE

ROOT = Path(__file__).parents[2]

HEAD = {
    "device kind": "cuda",
    "device": "a device of a long name, 80 GB",
    "threads": 2,
    "versions": {"python": "3.11.7", "torch": "2.13.0", "kto_kernels": "0.1.0", "absent": None},
    "commit": "0918d101c6c1+changes",
    "date": "2026-11-22",
    "ceilings": {"copy bytes/s": 3.0e12, "read bytes/s": 3.1e12, "gemm flop/s": {"bf16": 7e14}},
}
OURS = ["linear_kto_loss, triton", "linear_kto_loss, cuda"]
PEERS = [
    "naive PyTorch",
    "naive PyTorch, scored rows only",
    "torch.compile of naive",
    "TRL ChunkedLogProbFunction",
    "Liger LigerFusedLinearKTOLoss, compiled",
    "Liger LigerFusedLinearScaledCrossEntropyFunction",
    "CCE linear_cross_entropy",
    "F.linear_cross_entropy in chunks",
    "quack linear_cross_entropy_func, in place",
    "quack chunked_linear_cross_entropy, a call a sequence",
]
VARIANTS = [*OURS, *PEERS]
# The peers that are missing from the memory and long-context results:
ABSENT = {
    "TRL ChunkedLogProbFunction": "absent: no module of that name",
    "F.linear_cross_entropy in chunks": "not run: not among the default peers",
}
NEVER = {"CCE linear_cross_entropy": "KeyError: 1"}  # fails at every size
DRAWN = [name for name in VARIANTS if name not in ABSENT | NEVER]
OF_LOGITS = [
    "kto_loss, triton",
    "kto_loss, cuda",
    "naive PyTorch",
    "torch.compile of naive",
    "TRL selective_log_softmax",
]
PASSES = {FORWARD: 1, FRESH: 3, INPLACE: 3}


def around(median: float) -> dict:
    return {"low": 0.9 * median, "median": median, "high": 1.2 * median}


def logits_result(sizes=(8, 64, 1024, 8192)) -> dict:
    cases = []
    for dtype, n in itertools.product(("fp32", "bf16"), sizes):
        modes = [(name, mode) for name in OF_LOGITS for mode in PASSES if mode != INPLACE or name.startswith("kto")]
        seconds = {f"{name}, {mode}": around(n * (1e-7 + 1e-9 * i)) for i, (name, mode) in enumerate(modes)}
        cases.append({"dtype": dtype, "N": n, "V": 128256, "seconds": seconds | {"copy": around(1e-7 * n)}})
    cases.append(cases[0] | {"V": 1000})
    return HEAD | {"benchmark": "logits", "cases": cases}


MODELS = [("Llama-3-8B", 4096, 128256), ("Mistral-7B, Mixtral-8x7B, GritLM", 4096, 32000), (None, 3584, 256000)]


def linear_result() -> dict:
    cases = []
    for head, (model, h, v) in itertools.product(("trained", "frozen"), MODELS):
        seconds = {"bare GEMMs, 4G": around(0.04)}
        seconds |= {name: around(0.05 + 0.03 * i) for i, name in enumerate(VARIANTS) if model or i % 3}
        absent = {} if model else {VARIANTS[3]: "fails: out of memory", VARIANTS[6]: "absent: needs another device"}
        cases.append({"dtype": "bf16", "N": 8192, "H": h, "V": v, "model": model, "head": head})
        cases[-1] |= {"seconds": seconds, "absent": absent}
    return HEAD | {"benchmark": "linear", "cases": cases}


def memory_case(sweep: str, n=1024, h=4096, v=128256, budget=None, model=None) -> dict:
    peaks = {name: n * v + i * (h * v + 2 * n * h) // 9 for i, name in enumerate(VARIANTS)}
    failed = ABSENT | NEVER
    if n * v > 2**30:
        failed |= {"naive PyTorch": "out of memory", "torch.compile of naive": "not run: 99 s, over the cap of 60 s"}
    peaks |= dict.fromkeys(peaks.keys() & failed.keys())
    return {"sweep": sweep, "model": model, "dtype": "bf16", "N": n, "H": h, "V": v, "head": "trained"} | {
        "max_logits_bytes": budget,
        "peak extra bytes": peaks,
        "failed": failed,
        "plan": {"peak bytes": n * v + 2**20},
    }


def memory_result() -> dict:
    cases = [memory_case("N", n=n) for n in (16384, 256, 4096, 1024)]
    cases += [memory_case("V", v=v) for v in (32000, 256000)] + [memory_case("H", h=h) for h in (1024, 8192)]
    cases += [memory_case("budget", budget=budget) for budget in (2**24, 2**30)]
    cases += [memory_case("model", h=h, v=v, model=model or "Another-1B") for model, h, v in MODELS]
    return HEAD | {"benchmark": "memory", "cases": cases}


def longcontext_result() -> dict:
    cases = []
    for tokens in (1024, 4096, 16384, 2**20):
        case = memory_case("N", n=tokens)
        failed = {name: case["failed"].get(name) for name in VARIANTS}
        variants = {
            name: {
                "seconds": None if failed[name] else tokens * 1e-4 * (i + 1),
                "peak extra bytes": case["peak extra bytes"][name],
                "failed": failed[name],
            }
            for i, name in enumerate(VARIANTS)
        }
        cases.append({"tokens": tokens, "N": 2 * tokens // 3, "dtype": "bf16", "H": 4096, "V": 128256})
        plan = {"peak bytes": tokens * 2000, "gemm units": 4.0, "seconds": tokens * 0.9e-4}
        cases[-1] |= {"head": "trained", "variants": variants, "plan": plan}
    return HEAD | {"benchmark": "longcontext", "cases": cases}


def step_result(parts: bool = True) -> dict:
    cases = []
    for head, (whole, loss) in zip(("trained", "LoRA"), (((4.0, 3.2), (1.2, 0.4)), ((3.5, 2.9), (1.2, 0.3)))):
        names = (step.TRL, step.OURS)
        seconds = {step.STEP: dict(zip(names, map(around, whole))), step.LOSS: dict(zip(names, map(around, loss)))}
        cases.append({"head": head, "dtype": "fp32", "repeats": 5, "seconds": seconds, "peak extra bytes": {}})
        if parts:
            cases[-1]["parts"] = {
                name: {
                    "policy, backbone forward": around(0.25 * (w - x)),
                    f"{step.LOSS}, forward": around(0.6 * x),
                    "reference and KL, backbone forward": around(0.3 * (w - x)),
                    f"{step.LOSS}, backward": around(0.4 * x),
                    "policy, backbone backward": around(0.4 * (w - x)),
                }
                for name, w, x in zip(names, whole, loss)
            }
    return HEAD | {"benchmark": "step", "cases": cases}


RESULTS = [
    logits_result(),
    linear_result(),
    memory_result(),
    longcontext_result(),
    step_result(),
    step_result(parts=False),
]


def lines_of(axes) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data())) for line in axes.lines if line.get_label()[0] != "_"}


def close(*texts: str) -> list[str]:
    """Without spaces: lines break anywhere."""
    return [re.sub(r"\s", "", text) for text in texts]


def names_of(axes) -> list[str]:
    return close(*(text.get_text() for text in axes.texts if isinstance(text, plots.EndName)))


def test_the_picture_of_bandwidth_shows_every_figure():
    result = logits_result()
    ((name, figure),) = plots.figures(result).items()
    assert name == "logits-cuda.svg" and len(figure.axes) == 4
    for axes, (forward, dtype, size) in zip(
        figure.axes, ((False, "fp32", 4), (False, "bf16", 2), (True, "fp32", 4), (True, "bf16", 2))
    ):
        lines = lines_of(axes)
        (((_, y), *_),) = [lines.pop(name) for name in list(lines) if "ceiling" in name]
        assert y == (3100 if forward else 3000)
        assert len(lines) == len(names_of(axes)) == (5 if forward else 7)
        for variant, points in lines.items():
            mode = variant.rsplit(", ", 1)[-1]
            assert (mode == FORWARD) == forward
            for n, rate in points:
                (case,) = [c for c in result["cases"] if (c["dtype"], c["N"], c["V"]) == (dtype, n, 128256)]
                moved = PASSES[mode] * n * 128256 * size
                assert rate == pytest.approx(moved / case["seconds"][variant]["median"] / 1e9)
            assert [n for n, _ in points] == [8, 64, 1024, 8192]
        assert axes.get_ylim()[0] == 0 and dtype in axes.get_title()


@pytest.mark.parametrize("mode", PASSES)
def test_above_the_ceiling_the_picture_says_why(mode):
    result = logits_result()
    for case in result["cases"]:
        case["seconds"] = {name: around(1e-3 * case["N"]) for name in case["seconds"]}  # far below
    above = result["cases"][3]["seconds"]
    above[f"{OF_LOGITS[0]}, {mode}"] = around(PASSES[mode] * 8192 * 128256 * 4 / 4e12)
    for axes in plots.figures(result)["logits-cuda.svg"].axes:
        (words,) = [text.get_text() for text in axes.texts if "GB/s" in text.get_text()]
        mine = "fp32" in axes.get_title() and ("alone" in axes.get_title()) == (mode == FORWARD)
        assert (plots.ABOVE[mode] in words.replace("\n", " ")) == mine == ("above it" in words)
        if mine:
            assert axes.dataLim.y1 == pytest.approx(4000) and axes.get_ylim()[1] > 4000


def test_one_size_makes_no_curve():
    assert plots.figures(logits_result(sizes=(1024,))) == {}


def test_the_picture_of_time_over_the_floor_shows_every_figure():
    result = linear_result()
    figures = plots.figures(result)
    assert list(figures) == ["linear-cuda.svg", "linear-cuda-frozen.svg"]
    for figure, head in zip(figures.values(), ("trained", "frozen")):
        cases = [case for case in result["cases"] if case["head"] == head]
        assert len(figure.axes) == len(cases) and head in figure.texts[0].get_text()
        for axes, case in zip(figure.axes, cases):
            drawn = [
                name for name in VARIANTS if name in case["seconds"] or (name in case["absent"] and name != VARIANTS[6])
            ]
            assert close(*(label.get_text() for label in axes.get_yticklabels())) == close(*drawn)
            (bars,) = axes.containers
            at = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in bars}
            ends = {round(text.xy[1]): text.get_text() for text in axes.texts}
            assert at.keys() == ends.keys() == set(range(len(drawn)))
            for row, name in enumerate(drawn):
                if name in case["seconds"]:
                    ratio = case["seconds"][name]["median"] / 0.04
                    assert at[row] == pytest.approx(min(ratio, plots.CUT))
                    assert f"{ratio:.2f}×" in ends[row] and ("»" in ends[row]) == (ratio > plots.CUT)
                else:
                    assert name == VARIANTS[3] and at[row] == 0 and ends[row] == "out of memory"
            assert lines_of(axes)["bare GEMMs"][0][0] == 1
        said = " ".join(figure.texts[1].get_text().split())
        missing = [name for i, name in enumerate(VARIANTS) if i % 3 == 0 and i != 3]
        assert said.endswith(f"Not run on N=8,192 · H=3,584 · V=256,000 · bf16: {'; '.join(missing)}.")


def crosses(axes) -> list[tuple[float, float]]:
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_markersize() == plots.CROSS]


def test_the_picture_of_memory_shows_every_sweep():
    result = memory_result()
    figure = plots.figures(result)["memory-cuda.svg"]
    swept = [("N", [256, 1024, 4096, 16384]), ("V", [32000, 128256, 256000]), ("H", [1024, 4096, 8192])]
    swept += [("max_logits_bytes", [2**24, 2**30])]
    assert len(figure.axes) == len(swept)
    for axes, (key, xs) in zip(figure.axes, swept):
        base = {"N": 1024, "H": 4096, "V": 128256, "max_logits_bytes": None}
        cases = [next(c for c in result["cases"] if {k: c[k] for k in base} == base | {key: x}) for x in xs]
        lines = lines_of(axes)
        assert lines.pop("plan") == [(x, case["plan"]["peak bytes"]) for x, case in zip(xs, cases)]
        assert list(lines) == DRAWN
        for name in DRAWN:
            peaks = [(x, case["peak extra bytes"][name]) for x, case in zip(xs, cases)]
            assert lines[name] == [(x, peak) for x, peak in peaks if peak is not None]
        names = names_of(axes)
        assert sorted(name.split("×")[0] for name in names) == sorted(close(*DRAWN, *NEVER, "plan"))
        assert any(name.startswith("CCElinear_cross_entropy×KeyErrorat") for name in names)
        assert axes.get_xscale() == axes.get_yscale() == "log"
        if key == "N":
            last = [lines[name][-1] for name in ("naive PyTorch", "torch.compile of naive")]
            assert crosses(axes) == last and {x for x, _ in last} == {4096}
            said = ("naive PyTorch × out of memory at 16k", "torch.compile of naive × over the cap of 60 s at 16k")
            assert {*close(*said)} <= {*names}


def test_a_peak_of_nothing_has_no_place_on_a_logarithmic_axis():
    result = memory_result()
    result["cases"][1]["peak extra bytes"][OURS[0]] = 0  # N = 256
    axes = plots.figures(result)["memory-cuda.svg"].axes[0]
    assert [x for x, _ in lines_of(axes)[OURS[0]]] == [1024, 4096, 16384] and len(crosses(axes)) == 2


def test_the_picture_of_memory_shows_every_model():
    result = memory_result()
    figure = plots.figures(result)["memory-cuda-models.svg"]
    cases = [case for case in result["cases"] if case["sweep"] == "model"]
    assert len(figure.axes) == len(cases)
    for axes, case in zip(figure.axes, cases):
        assert axes.get_title().replace("\n", " ").startswith(case["model"])
        widths = [bar.get_width() for bar in axes.containers[0]]
        peaks = [case["peak extra bytes"][name] for name in VARIANTS if name not in ABSENT]
        assert sorted(widths) == sorted(peak or 0 for peak in peaks)
        assert lines_of(axes)["plan"][0][0] == case["plan"]["peak bytes"]


def test_the_picture_of_long_contexts_shows_memory_and_time():
    result = longcontext_result()
    ((_, figure),) = plots.figures(result).items()
    memory, time = figure.axes
    for axes, key, planned in ((memory, "peak extra bytes", "peak bytes"), (time, "seconds", "seconds")):
        lines = lines_of(axes)
        assert lines.pop("plan") == [(case["tokens"], case["plan"][planned]) for case in result["cases"]]
        for name, points in lines.items():
            values = [(case["tokens"], case["variants"][name][key]) for case in result["cases"]]
            assert points == [(x, y) for x, y in values if y is not None]
        assert list(lines) == DRAWN
        assert len(crosses(axes)) == 2 and close("naive PyTorch × out of memory at 16k")[0] in names_of(axes)
        assert axes.get_xscale() == axes.get_yscale() == "log"


@pytest.mark.parametrize("parts", [True, False])
def test_the_picture_of_a_step_shows_all_of_its_parts(parts):
    result = step_result(parts)
    ((_, figure),) = plots.figures(result).items()
    assert len(figure.axes) == 2
    for axes, case in zip(figure.axes, result["cases"]):
        for row, variant in enumerate((step.TRL, step.OURS)):
            whole = case["seconds"][step.STEP][variant]["median"]
            loss = case["seconds"][step.LOSS][variant]["median"]
            bars = {c.get_label(): c[0] for c in axes.containers if round(c[0].get_y() + 0.35) == row}
            given = case["parts"][variant] if parts else {step.LOSS: {"median": loss}}
            for name, times in given.items():
                assert bars[name].get_width() == pytest.approx(times["median"])
            rest = whole - sum(times["median"] for times in given.values())
            assert bars.keys() == given.keys() | {"rest"} and bars["rest"].get_width() == pytest.approx(rest)
            # The loss comes first, and nothing lies on anything else.
            assert [name.startswith(step.LOSS) for name in bars] == [True] * (2 if parts else 1) + [False] * (
                4 if parts else 1
            )
            ends = list(itertools.accumulate(bar.get_width() for bar in bars.values()))
            assert [bar.get_x() for bar in bars.values()] == pytest.approx([0, *ends[:-1]])
            # In colour is the loss, and that alone.
            for name, bar in bars.items():
                red, green, blue, _ = bar.get_facecolor()
                assert (max(red, green, blue) - min(red, green, blue) > 0.1) == name.startswith(step.LOSS), name
            ((said,),) = [[t.get_text() for t in axes.texts if t.get_text().startswith(f"{whole:.2f} s")]]
            assert said == f"{whole:.2f} s" + (", 20% less" if case["head"] == "trained" else ", 17% less") * row
            widths = {f"{bar.get_width():.2f}" for name, bar in bars.items() if bar.get_width() > 0.2}
            assert widths <= {text.get_text() for text in axes.texts}  # seconds, written out
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == bars.keys()


def written(figure) -> list:
    """Every text that is seen."""
    found = list(figure.texts) + [text for legend in figure.legends for text in legend.get_texts()]
    for axes in figure.axes:
        found += [axes.title, *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_visible():
                low, high = sorted(axis.get_view_interval())
                ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels())
                found += [axis.label, *(label for at, label in ticks if low <= at <= high)]
    return [text for text in found if text.get_text() and text.get_visible()]


def ours_alone(result: dict) -> dict:
    """The results without any peer."""

    def keep(name: str) -> bool:
        return "kto_loss" in name or name == step.OURS or not name.startswith((*PEERS, *OF_LOGITS[2:], step.TRL))

    def pruned(node):
        if isinstance(node, dict):
            return {key: pruned(value) for key, value in node.items() if keep(key)}
        return [pruned(item) for item in node] if isinstance(node, list) else node

    return pruned(result)


def ours_failed() -> dict:
    """Long contexts of which ours failed at the larger half."""
    result = longcontext_result()
    for case in result["cases"][2:]:
        case["variants"][OURS[0]] = {"seconds": None, "peak extra bytes": None, "failed": "RuntimeError: no memory"}
    return result


MEASURED = [result for result in report.results() if result["benchmark"] in plots.PICTURES]
FEWER = [*map(ours_alone, (*RESULTS, *MEASURED)), ours_failed()]


def test_a_peer_that_was_not_run_has_no_place():
    for result in MEASURED:
        for figure in plots.figures(ours_alone(result)).values():
            for axes in figure.axes:
                assert all("kto_loss" in name or name == "plan" for name in names_of(axes))
                if axes.containers:
                    assert {label.get_text() for label in axes.get_yticklabels()} <= {"linear_kto_loss, cpu", step.OURS}
        assert plots.figures(result | {"cases": []}) == {}


@pytest.mark.parametrize("result", RESULTS + MEASURED + FEWER, ids=lambda result: result["benchmark"])
def test_every_word_can_be_read(result):
    """None is cut off, lies on another or is smaller than 9 pixels where a page of 830 pixels shows the picture."""
    figures = plots.figures(result)
    for figure in figures.values():
        scale = 830 / (72 * figure.get_figwidth())
        assert all(text.get_fontsize() * scale >= 9 for text in written(figure))
    assert figures
    for name, figure in figures.items():
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        boxes = [(text.get_text(), plots.box_of(text, renderer)) for text in written(figure)]
        width, height = figure.canvas.get_width_height()
        for text, box in boxes:
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, (name, text)
        for (one, a), (other, b) in itertools.combinations(boxes, 2):
            across, along = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert across < 1 or along < 1, (name, one, other)


def test_words_that_overlap_are_seen():
    """The check above, on a picture whose names are not moved apart."""
    figure = plots.figures(memory_result())["memory-cuda.svg"]
    names = [text for text in figure.axes[0].texts if isinstance(text, plots.EndName)]
    names[1].set_position(names[0].get_position())
    renderer = figure.canvas.get_renderer()
    a, b = (plots.box_of(name, renderer) for name in names[:2])
    assert min(a.y1, b.y1) - max(a.y0, b.y0) > 1


@given(
    st.lists(st.tuples(st.floats(-50, 150), st.floats(1, 15)), max_size=6),
    st.floats(0, 10),
)
def test_names_move_apart_and_no_further(boxes, low):
    wanted, heights = [y for y, _ in boxes], [height for _, height in boxes]
    high = low + 100
    centres = plots.spread(wanted, heights, low, high)
    order = sorted(range(len(boxes)), key=lambda i: wanted[i])
    for below, above in itertools.pairwise(order):
        assert centres[above] - centres[below] >= (heights[above] + heights[below]) / 2 - 1e-9
    for centre, height in zip(centres, heights):
        assert low - 1e-9 <= centre - height / 2 and centre + height / 2 <= high + 1e-9
    free = all(wanted[b] - wanted[a] >= (heights[a] + heights[b]) / 2 for a, b in itertools.pairwise(order)) and all(
        low <= y - height / 2 and y + height / 2 <= high for y, height in boxes
    )
    if free:
        assert centres == pytest.approx(wanted)


def test_the_picture_of_pairs_says_so_and_has_a_file_of_its_own():
    result = linear_result() | {"benchmark": "linear-dpo"}
    figures = plots.figures(result)
    assert list(figures) == ["linear-dpo-cuda.svg", "linear-dpo-cuda-frozen.svg"]
    assert all("the DPO loss from hidden states" in figure.texts[0].get_text() for figure in figures.values())
    names = ["linear_preference_loss, cpu", "Liger LigerFusedLinearDPOLoss, compiled"]
    assert [(look.ours, look.marker) for look in map(plots.look, names)] == [(True, "o"), (False, "^")]


def test_overlapping_names_meet_half_way():
    assert plots.spread([10, 12, 50], [6, 6, 6], 0, 100) == pytest.approx([8, 14, 50])


def test_every_method_has_a_look_of_its_own():
    """Distinguishable without colour, readable on white."""
    modes = [f"{name}, {mode}" for name in OF_LOGITS for mode in (FRESH, INPLACE) if mode == FRESH or "kto" in name]
    for names in (VARIANTS, modes):
        looks = [plots.look(name) for name in names]
        assert plots.OTHER not in looks
        assert len({(look.marker, look.dashes) for look in looks}) == len(names)
        assert [look.ours for look in looks] == ["kto_loss" in name for name in names]

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for color in {look.color for look in plots.LOOKS.values()} | {plots.INK, plots.MUTED}:
        assert 1.05 / (luminance(color) + 0.05) >= 4.5, color  # WCAG 2.2, AA


def test_draw_writes_the_same_bytes_again(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    result = step_result()
    (path,) = plots.draw(result, tmp_path)
    first = path.read_bytes()
    assert path == tmp_path / "step-cuda.svg" and plots.digest(result) in path.read_text()
    assert plots.draw(json.loads(json.dumps(result)), tmp_path) == [path] and path.read_bytes() == first
    assert pyplot.get_fignums() == before

    other = step_result()
    other["cases"][0]["seconds"][step.STEP][step.OURS]["median"] *= 1.01
    plots.draw(other, tmp_path)
    assert path.read_bytes() != first and plots.digest(result) not in path.read_text()


def test_other_results_have_no_picture(tmp_path):
    assert plots.draw(HEAD | {"benchmark": "ceilings"}, tmp_path) == []


def test_the_pictures_are_those_of_the_results():
    assert report.stale_pictures() == [], "run: python -m benchmarks report"
    for result in report.results():
        if result["benchmark"] != "step":
            variants = (case.get("peak extra bytes", case.get("variants", {})) for case in result["cases"])
            assert plots.OTHER not in map(plots.look, itertools.chain(*variants))


def test_a_picture_of_other_results_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    (tmp_path / "step-cuda.json").write_text(json.dumps(step_result()))
    assert report.stale_pictures() == ["step-cuda.svg"]
    plots.draw(step_result(), tmp_path)
    assert report.stale_pictures() == []
    (tmp_path / "step-cuda.json").write_text(json.dumps(step_result(parts=False)))
    assert report.stale_pictures() == ["step-cuda.svg"]
