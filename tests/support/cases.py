"""Random inputs for the property tests: what hypothesis draws is small and printable, and tensors are made of it from a
seed. A drawn case is a recipe, so that a failing one can be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.harness import Problem
from tests.support.linear_harness import LinearProblem, linear_problem

INF = torch.inf

# How many of 100 cases a place gets, and how many logits one of its cases may have: a row takes Triton's interpreter
# some milliseconds.
_SHARE = {"torch": 0.3, "cpu": 1.0, "cuda": 0.4, "triton": 0.08}
_DRAWS = 20
_SMALLEST = torch.finfo(torch.float32).tiny
_ELEMENTS = {"torch": 1 << 15, "cpu": 1 << 17, "cuda": 1 << 13, "triton": 1 << 10}


def explore(place: tuple[str, str], strategy: st.SearchStrategy, check: Callable, part: float = 1.0) -> None:
    """Calls `check` with the place's share of the profile's number of cases, or a part of it."""
    share = _SHARE["cpu" if place[1] == "cuda" else place[0]]
    count = max(1, round(settings.default.max_examples * share * part))
    settings(max_examples=count)(given(strategy)(check))()


def elements(place: tuple[str, str]) -> int:
    """How many logits a case may have there."""
    return _ELEMENTS["cpu" if place[1] == "cuda" else place[0]]


def as_promised(measure: Callable) -> Callable:
    """The check that the promise holds for a case:

        error ≤ 1.5 · (that of plain PyTorch) + unit

    `measure(case)` gives, for each result by its name, both errors in such units, of each row or sequence. Plain
    PyTorch may be exact by luck in a single row: where a case is over the bound, plain PyTorch's error is the
    largest over more draws of the same recipe. Ours is still that of the case."""

    def check(case):
        errors = measure(case)
        for seed in range(_DRAWS):
            over = {name: e for name, e in errors.items() if (e[0] > 1.5 * e[1] + 1).any()}
            if not over:
                return
            if any(mine.isinf().any() for mine, _ in over.values()):
                break  # an infinity or NaN in the wrong place
            again = measure(case.drawn_again(seed))
            errors = {name: (mine, plain.maximum(again[name][1])) for name, (mine, plain) in errors.items()}
        raise AssertionError("; ".join(f"{name}: error {mine}, plain {plain}" for name, (mine, plain) in over.items()))

    return check


def in_units(mine: Tensor, plain: Tensor, exact: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Errors of both, in units, for each element. Infinities must be where they belong, and NaN nowhere."""
    assert mine.shape == exact.shape
    mine, plain, exact, unit = (x.double().cpu() for x in (mine, plain, exact, unit))
    wrong = mine.isnan() | ((mine != exact) & ~(mine.isfinite() & exact.isfinite()))
    error, plain_error = (torch.where(x == exact, 0.0, (x - exact).abs() / unit) for x in (mine, plain))
    return error.masked_fill(wrong, INF), plain_error.nan_to_num(0.0, 0.0, 0.0)


def unit_of(dtype: torch.dtype) -> float:
    """In fp64 there is nothing more exact to compare with: some units in the last place instead of one."""
    return torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 1)


def gradient_errors(mine: Tensor, plain: Tensor, exact: Tensor, slack: float | Tensor = 0.0) -> tuple[Tensor, Tensor]:
    """The error of each row, in units in the last place of its largest entry; `slack` of it is allowed besides. Below fp32's
    smallest normal number (1e-38) there are no digits to promise: hardware may flush it to zero."""
    info = torch.finfo(mine.dtype)
    exact = exact.double()
    largest = exact.abs().amax(-1, keepdim=True) if exact.numel() else exact.abs()
    slack = (
        slack.to(exact).view(*slack.shape, *(1,) * (exact.dim() - slack.dim())) if isinstance(slack, Tensor) else slack
    )
    unit = (unit_of(mine.dtype) + slack) * largest + info.smallest_normal * info.eps + _SMALLEST
    # A number that fp16 cannot hold is ±inf: the largest one of fp16 stands here.
    errors = in_units(*(g.double().clamp(-info.max, info.max) for g in (mine, plain, exact)), unit.expand_as(exact))
    return tuple(e.amax(-1) if e.numel() else e.sum(-1) for e in errors)


# Logits ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

# The looks of a row of logits, around its label y.
KINDS = (
    "random",
    "near-certain",  # y above all others by the gap
    "near-impossible",  # y below them
    "tied",  # half of the row is its maximum, y or not
    "constant",
    "masked",  # some others are −inf
    "one left",  # all others are −inf
    "label masked",  # y is −inf
    "nothing left",  # everything is
    "ignored",  # not scored
)


@dataclass(frozen=True)
class Values:
    kinds: tuple[str, ...]  # of the rows, in turn
    scale: float
    base: float  # added to all
    gap: float  # of "near-certain" and "near-impossible"
    seed: int

    def make(self, rows: int, vocab: int, ignore_index: int) -> tuple[Tensor, Tensor]:
        """fp64 logits (rows, vocab) and labels (rows,)."""
        g = torch.Generator().manual_seed(self.seed)
        x = self.scale * torch.randn(rows, vocab, generator=g, dtype=torch.float64).clamp(-6, 6)
        labels = torch.randint(vocab, (rows,), generator=g)
        chosen = torch.rand(rows, vocab, generator=g) < 0.5
        for n in range(rows):
            kind, y, others = self.kinds[n % len(self.kinds)], labels[n], torch.arange(vocab) != labels[n]
            if kind == "near-certain":
                x[n, y] = x[n].max() + self.gap
            elif kind == "near-impossible":
                x[n, y] = x[n].min() - self.gap
            elif kind == "tied":
                x[n, chosen[n]] = x[n].max()
            elif kind == "constant":
                x[n] = x[n, 0].clone()
            elif kind == "masked":
                x[n, chosen[n] & others] = -INF
            elif kind == "one left":
                x[n, others] = -INF
            elif kind == "label masked":
                x[n, y] = -INF
            elif kind == "nothing left":
                x[n] = -INF
            elif kind == "ignored":
                labels[n] = ignore_index
        return x + self.base, labels


def magnitudes(low: float, high: float):
    """Log-uniform, with the ends."""
    exponent = st.floats(torch.tensor(low).log10().item(), torch.tensor(high).log10().item())
    return st.one_of(st.sampled_from([low, 1.0, high]), exponent.map(lambda e: float(f"{10**e:.3g}")))


values = st.builds(
    Values,
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6).map(tuple),
    scale=st.one_of(st.just(3.0), magnitudes(1e-30, 1e4)),
    base=st.sampled_from([0.0, 0.0, 1.0, -100.0, 1e4, -1e4]),
    gap=st.one_of(st.integers(0, 20).map(float), st.floats(0, 100).map(lambda gap: round(gap, 2))),
    seed=st.integers(0, 1 << 16),
)

# Mostly narrow; the edges of vectors, blocks and tiles; real models' (300,001: the widest, and odd).
vocabularies = st.one_of(
    st.integers(1, 40),
    st.sampled_from([63, 64, 65, 127, 255, 256, 257, 1003, 2048, 2049, 4099, 8192, 8193]),
    st.sampled_from([32000, 49152, 128256, 300001]),
)


@dataclass(frozen=True)
class Layout:
    """Where logits lie in a wider buffer."""

    start: int = 0  # elements in front
    pad: int = 0  # behind each row
    step: int = 1  # every so many-th token
    swap: bool = False  # batch and tokens

    def place(self, x: Tensor, requires_grad: bool = False) -> tuple[Tensor, Callable[[], Tensor]]:
        """`x` (B, T, V) or (N, V) as a view of a buffer of 99s, and what gives the rest of it."""
        *lead, vocab = x.shape
        lead[-1] *= self.step
        swap = self.swap and len(lead) == 2
        shape = (*(lead[::-1] if swap else lead), vocab + self.pad)
        size = self.start + torch.Size(shape).numel()
        buffer = torch.full((size,), 99.0, dtype=x.dtype, device=x.device, requires_grad=requires_grad) * 1
        view = buffer[self.start :].view(shape)
        view = (view.transpose(0, 1) if swap else view)[..., :: self.step, :vocab]
        with torch.no_grad():
            view.copy_(x)
        elsewhere = torch.ones_like(buffer, dtype=torch.bool)
        elsewhere.as_strided(view.shape, view.stride(), view.storage_offset())[:] = False
        return view, lambda: buffer.detach()[elsewhere]

    def place_labels(self, labels: Tensor) -> Tensor:
        wide = torch.zeros(*labels.shape[:-1], labels.shape[-1] * self.step + self.start, dtype=labels.dtype)
        wide = wide.to(labels.device)[..., self.start :]
        wide[..., :: self.step] = labels
        return wide[..., :: self.step]


layouts = st.one_of(
    st.just(Layout()),
    st.builds(Layout, st.sampled_from([0, 1, 3, 8]), st.sampled_from([0, 1, 5]), st.integers(1, 2), st.booleans()),
)


# Cases ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class TokenCase:
    """`token_logps`."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # (B, T) or (N,)
    vocab: int
    values: Values
    layout: Layout
    label_dtype: torch.dtype
    shift: bool
    ignore_index: int
    temperature: float
    inplace: bool
    upstream: float  # its largest gradient; 0: ones

    @property
    def options(self) -> dict:
        return {"shift": self.shift, "ignore_index": self.ignore_index, "temperature": self.temperature}

    def drawn_again(self, seed: int) -> TokenCase:
        return replace(self, values=replace(self.values, seed=seed))

    def make(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, labels and the upstream gradient."""
        rows = torch.Size(self.shape).numel()
        logits, labels = self.values.make(rows, self.vocab, self.ignore_index)
        labels = labels.view(self.shape)
        if self.shift:
            labels = labels.roll(1, -1)  # so that each row has its own label
        grad = torch.ones(rows)
        if self.upstream:
            grad = self.upstream * torch.randn(rows, generator=torch.Generator().manual_seed(self.values.seed))
            grad[::3] = 0
        logits = in_range(logits, self.dtype).view(*self.shape, self.vocab)
        return logits.to(device), labels.to(device, self.label_dtype), grad.view(self.shape).to(device)


def in_range(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`; what fp16 cannot hold becomes its largest number, −inf stays."""
    largest = torch.finfo(dtype).max
    return logits.clamp(max=largest).where(logits == -INF, logits.clamp(-largest, largest)).to(dtype)


def dtypes_of(backend: str):
    return st.sampled_from([torch.float32, torch.bfloat16, torch.float16] + [torch.float64] * (backend == "torch"))


temperatures = st.one_of(st.just(1.0), st.sampled_from([0.5, 0.7, 3.0]), magnitudes(1e-2, 1e3))
ignore_indices = st.sampled_from([-100, -100, -1, 0, 1 << 30])


@st.composite
def token_cases(draw, place: tuple[str, str]):
    vocab = draw(vocabularies.filter(lambda v: v <= max(elements(place), 300_001)))
    most = max(1, elements(place) // vocab)
    if draw(st.booleans()):
        batch = draw(st.integers(0, min(5, most)))
        shape = (batch, draw(st.integers(0, min(20, most // max(1, batch)))))
    else:
        shape = (draw(st.integers(0, min(60, most))),)
    return TokenCase(
        dtype=draw(dtypes_of(place[0])),
        shape=shape,
        vocab=vocab,
        values=draw(values),
        layout=draw(layouts),
        label_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        shift=draw(st.booleans()),
        ignore_index=draw(ignore_indices),
        temperature=draw(temperatures),
        inplace=draw(st.booleans()),
        upstream=draw(st.sampled_from([0.0, 1.0, 1e-6, 1e4])),
    )


@dataclass(frozen=True)
class LossCase:
    """`kto_loss`: the recipe of a `harness.Problem`."""

    dtype: torch.dtype
    packed: bool
    lengths: tuple[int, ...]  # of each sequence; padded ones are as long as the longest
    kl_lengths: tuple[int, ...]
    vocab: int
    values: Values
    kl_values: Values
    ref: str | None  # "logits", "logps"
    ref_noise: float  # of reference logits around the policy's
    kl: str | None  # "logits", "logps", "number", "tensor"
    ref_kl: str | None  # "logits", "logps"
    given_dtype: torch.dtype  # of log-probabilities that are given
    layout: Layout
    label_dtype: torch.dtype
    offset_dtype: torch.dtype
    desirable: tuple[bool, ...]
    options: dict
    inplace: bool

    def drawn_again(self, seed: int) -> LossCase:
        other = {name: replace(getattr(self, name), seed=seed + i) for i, name in enumerate(("values", "kl_values"))}
        return replace(self, **other)

    def make(self, device: str) -> Problem:
        """Contiguous, in the case's dtype."""
        g = torch.Generator().manual_seed(self.values.seed + 1)
        ignore_index = self.options.get("ignore_index", -100)

        def side(values: Values, lengths: tuple[int, ...]):
            rows = sum(lengths) if self.packed else len(lengths) * max(lengths, default=0)
            logits, labels = values.make(rows, self.vocab, ignore_index)
            logits = in_range(logits, self.dtype)
            offsets = torch.tensor([0, *lengths]).cumsum(0).to(self.offset_dtype)
            if not self.packed:
                logits = logits.view(len(lengths), -1 if rows else 0, self.vocab)
                labels = labels.view(logits.shape[:-1])
                for i, length in enumerate(lengths):
                    labels[i, length:] = ignore_index
            return logits, labels.to(self.label_dtype), offsets if self.packed else None

        def near(logits: Tensor) -> Tensor:
            noise = self.ref_noise * torch.randn(logits.shape, generator=g, dtype=torch.float64)
            return in_range(logits.double() + noise, self.dtype)

        def given_logps(count: int) -> Tensor:
            return (-50 * torch.rand(count, generator=g)).to(self.given_dtype)

        logits, labels, offsets = side(self.values, self.lengths)
        tensors = {} if offsets is None else {"cu_seqlens": offsets}
        if self.ref == "logits":
            tensors["ref_logits"] = near(logits)
        elif self.ref == "logps":
            tensors["ref_logps"] = given_logps(len(self.lengths))
        if "logits" in (self.kl, self.ref_kl):
            kl_logits, tensors["kl_labels"], kl_offsets = side(self.kl_values, self.kl_lengths)
            if kl_offsets is not None:
                tensors["kl_cu_seqlens"] = kl_offsets
            if self.kl == "logits":
                tensors["kl_logits"] = kl_logits
            if self.ref_kl == "logits":
                tensors["ref_kl_logits"] = near(kl_logits)
        for name, form in (("kl_logps", self.kl), ("ref_kl_logps", self.ref_kl)):
            if form == "logps":
                tensors[name] = given_logps(len(self.kl_lengths))
        options = dict(self.options)
        if self.kl == "number":
            options["kl"] = 0.4
        elif self.kl == "tensor":
            tensors["kl"] = torch.tensor(0.4)
        desirable = torch.tensor(self.desirable, dtype=torch.bool)
        problem = Problem(logits, labels, desirable, tensors, options)
        return problem.to(self.dtype, device)


def loss_options():
    weights = st.sampled_from([0.0, 1.0, 1.7, 1e-3, 1e4])
    return st.fixed_dictionaries(
        {"beta": st.one_of(st.just(0.1), magnitudes(1e-30, 1e2))},
        optional={
            "desirable_weight": weights,
            "undesirable_weight": weights,
            "average_log_prob": st.booleans(),
            "reduction": st.sampled_from(["mean", "sum", "none"]),
            "ignore_index": ignore_indices,
            "shift": st.booleans(),
            "temperature": temperatures,
        },
    )


def lengths_within(rows: int):
    """The lengths of up to six sequences, that take up to so many padded rows."""
    return st.integers(0, min(6, rows)).flatmap(
        lambda count: st.lists(st.integers(0, min(12, rows // max(1, count))), min_size=count, max_size=count).map(
            tuple
        )
    )


@st.composite
def loss_cases(draw, place: tuple[str, str]):
    vocab = draw(vocabularies.filter(lambda v: v <= max(elements(place), 8193)))
    rows = max(1, elements(place) // vocab // 4)
    lengths = draw(lengths_within(rows))
    ref = draw(st.sampled_from([None, "logits", "logps"]))
    kl = draw(st.sampled_from([None, "logits", "logps", "number", "tensor"]))
    options = draw(loss_options())
    if kl is None:
        options["loss_type"] = "apo_zero_unpaired"
    return LossCase(
        dtype=draw(dtypes_of(place[0])),
        packed=draw(st.booleans()),
        lengths=lengths,
        kl_lengths=draw(lengths_within(rows)),
        vocab=vocab,
        values=draw(values),
        kl_values=draw(values),
        ref=ref,
        ref_noise=draw(st.sampled_from([0.0, 0.1, 3.0])),
        kl=kl,
        ref_kl=draw(st.sampled_from(["logits", "logps"])) if kl in ("logits", "logps") and ref else None,
        given_dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        layout=draw(layouts),
        label_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        offset_dtype=draw(st.sampled_from([torch.int64, torch.int32])),
        desirable=draw(st.tuples(*[st.booleans()] * len(lengths))),
        options=options,
        inplace=draw(st.booleans()),
    )


@dataclass(frozen=True)
class LinearCase:
    """`linear_kto_loss`: arguments of `linear_harness.linear_problem`."""

    seed: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    arguments: dict
    options: dict
    chunk_rows: int
    scale: float  # of the hidden states
    trained: tuple[str, ...]

    def make(self) -> LinearProblem:
        torch.manual_seed(self.seed)
        p = linear_problem(self.lengths, **self.arguments, **self.options)
        for name, tensor in p.tensors.items():
            if name.endswith("hidden"):
                tensor *= self.scale
        p.hidden *= self.scale
        p.options["max_logits_bytes"] = self.chunk_rows * self.arguments["vocab"] * self.dtype.itemsize
        return p


@st.composite
def linear_cases(draw, place: tuple[str, str]):
    vocab = draw(vocabularies.filter(lambda v: v <= elements(place)))
    most = max(1, min(40, elements(place) // vocab))
    width = draw(st.integers(1, 40))
    ref = draw(st.sampled_from([None, "hidden", "logps"]))
    kl = draw(st.sampled_from([None, "hidden", "logps", "number", "tensor"]))
    options = draw(loss_options()) | {"beta": draw(magnitudes(1e-30, 1.0))}
    options |= draw(
        st.fixed_dictionaries(
            {},
            optional={
                "logit_scale": st.sampled_from([0.1, 0.5, 2.0]),
                "softcap": st.sampled_from([1.0, 30.0]),
                "temperature": st.sampled_from([0.6, 1.7]),
                "long_sequences": st.sampled_from(["auto", "defer", "recompute"]),
                "outputs": st.sampled_from([("entropy",), ("is_top1", "mean_logits")]),
                "ignore_index": st.sampled_from([-1, 1 << 30]),
            },
        )
    )
    if kl is None:
        options["loss_type"] = "apo_zero_unpaired"
    return LinearCase(
        seed=draw(st.integers(0, 1 << 16)),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        lengths=draw(st.lists(st.integers(0, most), min_size=1, max_size=6).map(tuple)),
        arguments={
            "packed": draw(st.booleans()),
            "bias": draw(st.booleans()),
            "ref": ref,
            "kl": kl,
            "prompt": draw(st.integers(0, 3)),
            "vocab": vocab,
            "width": width,
            "ref_width": width + draw(st.sampled_from([0, 1, 8])),
            "offset_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
        },
        options=options,
        chunk_rows=draw(st.integers(1, 100)),
        scale=draw(st.sampled_from([1.0, 1e-3, 3.0])),
        trained=draw(st.sampled_from([("hidden",), ("weight",), ("hidden", "weight"), ("hidden", "weight", "bias")])),
    )
