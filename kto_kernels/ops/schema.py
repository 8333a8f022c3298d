"""How a function of records becomes an operator of PyTorch: one declaration gives schema, fake, gradient and FLOPs.

    @Operator
    def double(call: Call) -> Result: ...

    double.fake(lambda call: Result(torch.empty_like(call.x)))
    result = double(Call(x, options))

A call is a frozen dataclass, whose fields may be such records again. In the schema each tensor is an argument under the
name of its field, and everything else travels packed: floats in one list, integers, flags and choices in another, and
strings joined to one. A result is a dataclass of tensors.

Where nothing looks at operators (no compiler, no dispatch mode, no fake tensors, no profiler), a call goes straight to
the function, through one `torch.autograd.Function`: PyTorch's dispatch of an operator written in Python takes as long
as a small loss.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.library import CustomOpDef, custom_op
from torch.utils.flop_counter import register_flop_formula

from .. import checks, scalars
from ..records import Named

# Namespace ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _free_namespace() -> str:
    """`kto_kernels`, unless another copy of the package in this process has this namespace (another revision, or the
    same one imported again): then the first free one of kto_kernels_2, kto_kernels_3, and so on. In a shared namespace
    PyTorch would destroy the operators of the other copy, which goes on calling them."""
    names = itertools.chain(["kto_kernels"], (f"kto_kernels_{number}" for number in itertools.count(2)))
    return next(name for name in names if not hasattr(getattr(torch.ops, name), "token_logps"))


NAMESPACE = _free_namespace()

# The tags of operators that read values on the host: the number of scored rows, or numbers that are data (see
# `kto_kernels.scalars`). A CUDA graph would repeat the values that were read at its capture, and a capture cannot wait
# for the device.
READS_ON_THE_HOST = (torch.Tag.cudagraph_unsafe,)
# With KTO_KERNELS_DEBUG=1 at import every operator counts as reading, because it checks labels and offsets.
_DEBUGGING = os.environ.get("KTO_KERNELS_DEBUG") == "1"

# Records and schemas ──────────────────────────────────────────────────────────────────────────────────────────────────

# Kinds of the values in a record whose class is known only at the call. A bool is an int too, and comes first.
_KINDS = (type(None), bool, int, str, tuple, float, Named)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class _Subset:
    choices: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Field:
    name: str
    kind: Any  # Tensor, float, int, bool, str, torch.dtype, a tuple of choices, a _Subset of choices, list[bool], Named
    optional: bool
    record: type | None = None  # the field's type where it is a record again
    fields: tuple[_Field, ...] = ()  # the fields of that record


def _fields_of(record: type) -> tuple[_Field, ...]:
    hints = typing.get_type_hints(record)
    return tuple(_field(field.name, hints[field.name]) for field in dataclasses.fields(record))


def _field(name: str, hint: Any) -> _Field:
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if isinstance(hint, type) and issubclass(hint, Named):
        return _Field(name, Named, optional)
    if dataclasses.is_dataclass(hint):
        return _Field(name, None, optional, hint, _fields_of(hint))
    if typing.get_origin(hint) is Literal:
        return _Field(name, typing.get_args(hint), optional)
    if typing.get_origin(hint) is tuple:
        return _Field(name, _Subset(typing.get_args(typing.get_args(hint)[0])), optional)
    return _Field(name, hint, optional)


@dataclasses.dataclass
class _Packed:
    """The values of a record by kind, each kind in the order of the record's fields. An optional value that is no
    tensor comes behind a flag."""

    tensors: list[Tensor | None]
    floats: list[float | Tensor]
    ints: list[int]
    names: list[str]

    def add(self, record: Any, fields: tuple[_Field, ...]) -> None:
        for field in fields:
            value, kind = getattr(record, field.name), field.kind
            if kind is Tensor:
                self.tensors.append(value)
                continue
            if field.optional:
                self.ints.append(0 if value is None else 1)
                if value is None:
                    continue
            if field.record is not None:
                self.add(value, field.fields)
            elif kind is float:
                self.floats.append(value)
            elif kind is int:
                self.ints.append(value)
            elif kind is bool:
                self.ints.append(1 if value else 0)
            elif kind is str:
                self.names.append(value)
            elif kind is torch.dtype:
                self.ints.append(_DTYPES.index(value))
            elif isinstance(kind, tuple):
                self.ints.append(kind.index(value))
            elif kind is Named:
                self.add_any(value)
            elif isinstance(kind, _Subset):
                self.ints.extend([1 if choice in value else 0 for choice in kind.choices])
            else:
                self.ints.append(len(value))
                self.ints.extend([1 if flag else 0 for flag in value])

    def add_any(self, value: Any) -> None:
        """A value whose kind no annotation tells, behind the number of its kind in `_KINDS`."""
        if isinstance(value, Named):
            kind, parts = Named, [getattr(value, field.name) for field in dataclasses.fields(value)]
        else:
            kind = next((kind for kind in _KINDS if isinstance(value, kind)), float)
            parts = value if kind is tuple else ()
            if kind is float and not isinstance(value, (float, torch.SymFloat, Tensor)):
                raise TypeError(
                    f"objective: a record's fields are numbers, flags, strings, tuples or records, got {value!r}"
                )
        self.ints.append(_KINDS.index(kind))
        if kind is Named:
            self.names.append(value.class_name)
        elif kind is str:
            self.names.append(value)
        elif kind is float:
            self.floats.append(value)
        elif kind is not type(None):
            self.ints.append(len(value) if kind is tuple else int(value))
        for part in parts:
            self.add_any(part)


@dataclasses.dataclass
class _Unpacked:
    """The values of a `_Packed`, as iterators from which its record is made again."""

    tensors: Iterator[Tensor | None]
    floats: Iterator[float]
    ints: Iterator[int]
    names: Iterator[str]
    read: bool  # whether the floats are the call's, and not stand-ins in a trace, which a record's checks could refuse

    def make(self, record: type, fields: tuple[_Field, ...]) -> Any:
        return record(*[self.value(field) for field in fields])

    def value(self, field: _Field) -> Any:
        kind = field.kind
        if kind is Tensor:
            return next(self.tensors)
        if field.optional and not next(self.ints):
            return None
        if field.record is not None:
            return self.make(field.record, field.fields)
        if kind is float:
            return next(self.floats)
        if kind is str:
            return next(self.names)
        if kind is Named:
            return self.any()
        if isinstance(kind, _Subset):
            return tuple([choice for choice in kind.choices if next(self.ints)])
        number = next(self.ints)
        if kind is int:
            return number
        if kind is bool:
            return bool(number)
        if kind is torch.dtype:
            return _DTYPES[number]
        if isinstance(kind, tuple):
            return kind[number]
        return [bool(next(self.ints)) for _ in range(number)]

    def any(self) -> Any:
        kind = _KINDS[next(self.ints)]
        if kind is Named:
            record = Named.classes[next(self.names)]
            values = {field.name: self.any() for field in dataclasses.fields(record)}
            if self.read:
                return record(**values)
            made = object.__new__(record)
            for name, value in values.items():
                object.__setattr__(made, name, value)
            return made
        if kind is tuple:
            return tuple([self.any() for _ in range(next(self.ints))])
        if kind is type(None):
            return None
        return next(self.names) if kind is str else next(self.floats) if kind is float else kind(next(self.ints))


def _flat(fields: tuple[_Field, ...], prefix: str = "") -> Iterator[tuple[str, _Field]]:
    """Every field that is no record, after the field's path from the call."""
    for field in fields:
        if field.record is None:
            yield prefix + field.name, field
        else:
            yield from _flat(field.fields, f"{prefix}{field.name}.")


def _getter(paths: Iterable[str]) -> Callable[[Any], tuple[Any, ...]]:
    """A function of a call that returns the values at these paths."""
    first, *others = paths
    get = attrgetter(first, *others)
    return get if others else lambda call: (get(call),)


def _values(result: Any) -> tuple[Tensor, ...]:
    return () if result is None else tuple(vars(result).values())


# Operators ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def observed() -> bool:
    """Whether something looks at operators as they are called."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0  # such as that of torch.set_default_device
        or functorch.peek_interpreter_stack() is not None
        or torch.autograd.profiler._is_profiler_enabled
        or torch._C._get_tracing_state() is not None
    )


class Operator:
    """A function of a call's record, as two operators. NAME takes the call's floats (such as a temperature) as
    constants, and a CUDA graph may capture it. NAME_host takes floats that are data, as one tensor which it reads on
    the host.

    Args:
        function: takes a call and returns a result; the annotations of `function` name both records.
        mutates: the name of the one tensor that the function overwrites.
        reads_on_the_host: whether NAME too reads values on the host.
    """

    def __init__(self, function: Callable, mutates: str | None = None, reads_on_the_host: bool = False) -> None:
        hints = typing.get_type_hints(function)
        self.result: type = hints.pop("return")
        (call,) = hints.values()
        self.call: type = call
        self.function: Callable[[Any], Any] = function
        self.name: str = function.__name__
        self.mutates: str | None = mutates
        self.fields: tuple[_Field, ...] = _fields_of(call)
        flat = dict(_flat(self.fields))
        tensors = [field for field in flat.values() if field.kind is Tensor]
        self._paths = {field.name: path for path, field in flat.items() if field.kind is Tensor}
        self._tensors = _getter(self._paths.values())
        kinds = [field.kind for field in flat.values() if field.kind is not Tensor]
        self._packed = {
            "floats": float in kinds or Named in kinds,
            "ints": len(kinds) > kinds.count(float) + kinds.count(str),
            "names": str in kinds or Named in kinds,
        }
        self.arguments: list[str] = [*self._paths, *(name for name, there in self._packed.items() if there)]
        self.results: list[str] = (
            [] if self.result is type(None) else [field.name for field in dataclasses.fields(self.result)]
        )
        self.of: tuple[str, ...] = (tensors[0].name,)
        self.differentiable: bool = False
        written = [
            f"Tensor{'(a!)' if field.name == mutates else '?' if field.optional else ''} {field.name}"
            for field in tensors
        ]
        returned = ", ".join("Tensor" for _ in self.results)

        def define(suffix: str, floats: str, tags: tuple) -> CustomOpDef:
            packed = {"floats": f"{floats} floats", "ints": "SymInt[] ints", "names": "str names"}
            schema = ", ".join(written + [said for name, said in packed.items() if self._packed[name]])
            return custom_op(
                f"{NAMESPACE}::{self.name}{suffix}",
                self._run,
                mutates_args=() if mutates is None else (mutates,),
                schema=f"({schema}) -> ({returned})",
                tags=tags,
            )

        self.constant: CustomOpDef = define("", "float[]", READS_ON_THE_HOST if reads_on_the_host or _DEBUGGING else ())
        self.host: CustomOpDef | None = define("_host", "Tensor", READS_ON_THE_HOST) if self._packed["floats"] else None
        self.operators: list[CustomOpDef] = [
            operator for operator in (self.constant, self.host) if operator is not None
        ]

    # From a record and back ───────────────────────────────────────────────────────────────────────────────────────────

    def pack(self, call: Any, numbers: Tensor | None = None) -> tuple[tuple[Any, ...], Tensor | None]:
        """The operator's arguments, and the floats as one tensor where they are data: `numbers`, if given."""
        packed = _Packed([], [], [], [])
        packed.add(call, self.fields)
        if numbers is None and packed.floats:
            numbers = scalars.as_tensor(packed.floats)
        floats = [float(number) for number in packed.floats] if numbers is None else numbers
        lists = {"floats": floats, "ints": packed.ints, "names": "\n".join(packed.names)}
        tensors = packed.tensors
        if not torch.compiler.is_compiling():
            tensors = [x if name == self.mutates else _filled(x) for name, x in zip(self._paths, tensors)]
        return (*tensors, *[values for name, values in lists.items() if self._packed[name]]), numbers

    def unpack(self, arguments: tuple[Any, ...], read: bool = False) -> Any:
        """The call's record. Without `read`, floats that are data are 1, because a trace cannot look at them."""
        given = dict(zip(self.arguments, arguments))
        floats = given.get("floats", [])
        if isinstance(floats, Tensor):
            floats = floats.tolist() if read else itertools.repeat(1.0)
        tensors = [given[name] for name in self._paths]
        names = given.get("names", "").split("\n")
        ints = iter(given.get("ints", []))
        return _Unpacked(iter(tensors), iter(floats), ints, iter(names), read).make(self.call, self.fields)

    # Calls ────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _run(self, *arguments: Any) -> Any:
        values = _values(self.function(self.unpack(arguments, read=True)))
        return values[0] if len(values) == 1 else values or None

    def __call__(self, call: Any, numbers: Tensor | None = None) -> Any:
        """Calls the operator, or the function directly. `numbers` begins with the call's floats where these are known
        to be data: a backward passes the numbers of its forward."""
        if numbers is None and not observed() and all(map(checks.plain, self._tensors(call))):
            return self._directly(call)
        arguments, numbers = self.pack(call, numbers)
        values = (self.constant if numbers is None else self.host)(*arguments)
        return None if values is None else self.result(*(values if isinstance(values, (tuple, list)) else (values,)))

    def _directly(self, call: Any) -> Any:
        if self.differentiable and torch.is_grad_enabled():
            tensors = self._differentiable(call)
            if any(x is not None and x.requires_grad for x in tensors):
                found: list[Any] = []
                _Direct.apply(self, call, found, *tensors)
                return found[0]
        with torch.no_grad():
            result = self.function(call)
        if self.mutates is not None:  # PyTorch does not see what a kernel writes
            torch.autograd.graph.increment_version(getattr(call, self.mutates))
        return result

    # Fake, FLOPs and gradient ─────────────────────────────────────────────────────────────────────────────────────────

    def fake(self, function: Callable) -> Callable:
        """Declares the result's shapes, dtypes and devices, from a call whose tensors have no values."""

        def fake(*arguments):
            values = _values(function(self.unpack(arguments)))
            return values[0] if len(values) == 1 else values or None

        for operator in self.operators:
            operator.register_fake(fake)
        return function

    def flops(self, function: Callable) -> Callable:
        """Declares what `FlopCounterMode` counts for a call."""

        def flops(*arguments, out_val=None):
            return function(self.unpack(arguments))

        for operator in self.operators:
            name = operator._qualname.split("::")[1]
            register_flop_formula(getattr(getattr(torch.ops, NAMESPACE), name), get_raw=True)(flops)
        return function

    def autograd(self, *, of: tuple[str, ...], through: Callable, save: Callable, backward: Callable) -> None:
        """Declares the gradient.

        Args:
            of: names of the call's tensors that may have a gradient.
            through: call → names of the differentiable results.
            save: (call, result) → the values that the backward needs, by name.
            backward: (`Backward`, the gradients of the differentiable results by name, None where a result has none) →
                the gradients of the call's tensors by name.
        """
        self.of, self._save, self._gradients = of, save, backward
        self._differentiable = _getter([self._paths[name] for name in of])
        self.through: Callable[[Any], tuple[str, ...]] = through
        self.differentiable = True

        def setup(ctx, inputs, output):
            call, result = self.unpack(inputs), self.result(*output)
            through = self.through(call)
            ctx.mark_non_differentiable(*[getattr(result, name) for name in self.results if name not in through])
            floats = dict(zip(self.arguments, inputs)).get("floats")
            with torch.enable_grad():
                anchor = _Anchor.apply(*self._differentiable(call))
            self.keep(ctx, call, result, floats if isinstance(floats, Tensor) else None, anchor)

        def gradients(ctx, *grads):
            needs = dict(zip(self.arguments, ctx.needs_input_grad))
            found = self.differentiate(ctx, dict(zip(self.results, grads)), needs)
            return tuple([found.get(name) for name in self.arguments])

        for operator in self.operators:
            operator.register_autograd(gradients, setup_context=setup)

    def keep(self, ctx: Any, call: Any, result: Any, numbers: Tensor | None, anchor: Tensor) -> None:
        """Saves what the backward needs. The graph of `anchor` leads to the call's differentiable tensors."""
        saved = self._save(call, result) | {"numbers": numbers, "anchor": anchor}
        tensors = {name: value for name, value in saved.items() if isinstance(value, Tensor)}
        ctx.kept = {name: value for name, value in saved.items() if name not in tensors}
        ctx.names, ctx.through, ctx.spent = tuple(tensors), self.through(call), []
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors.values())

    def differentiate(
        self, ctx: Any, grads: dict[str, Tensor | None], needs: dict[str, bool]
    ) -> dict[str, Tensor | None]:
        grads = {name: grads[name] for name in ctx.through}
        if all(grad is None for grad in grads.values()):
            return {}
        backward = Backward(ctx, needs)
        with torch.no_grad():
            found = self._gradients(backward, grads)
        if not torch.is_grad_enabled():
            return found
        sources = (backward.anchor, *grads.values())
        return {name: None if grad is None else _NotTwice.apply(grad, *sources) for name, grad in found.items()}


def _filled(x: Tensor | None) -> Tensor | None:
    """`x`, a lazy zero with memory: PyTorch would give it to an operator with other strides than it has had."""
    return x.clone() if x is not None and x._is_zerotensor() else x


class _Direct(torch.autograd.Function):
    """A call without the operator."""

    @staticmethod
    def forward(ctx, operator, call, found, *tensors):
        result = operator.function(call)
        found.append(result)
        anchor = torch.empty(0)  # as an output it leads to the tensors, and costs less than an _Anchor
        operator.keep(ctx, call, result, None, anchor)
        ctx.operator = operator
        return *[getattr(result, name) for name in ctx.through], anchor

    @staticmethod
    def backward(ctx, *grads):
        operator = ctx.operator
        needs = dict(zip(("operator", "call", "found", *operator.of), ctx.needs_input_grad))
        found = operator.differentiate(ctx, dict(zip(ctx.through, grads)), needs)
        return tuple([found.get(name) for name in needs])


class Backward:
    """A call as its backward sees it.

    Attributes:
        needs: name of a tensor → whether the tensor's gradient is needed.
        kept: the saved values that are no tensors, by name.
        anchor: see `Operator.keep`; there once the saved values have been asked for.
    """

    def __init__(self, ctx: Any, needs: dict[str, bool]) -> None:
        self._ctx = ctx
        self.needs: dict[str, bool] = needs
        self.kept: dict[str, Any] = ctx.kept
        self.anchor: Tensor | None = None

    def saved(self) -> tuple[dict[str, Any], Tensor | None]:
        """The values that `save` returned, and the call's floats where they are data.

        Raises:
            RuntimeError: PyTorch has noticed that a saved tensor was overwritten.
        """
        saved = self._ctx.kept | dict(zip(self._ctx.names, self._ctx.saved_tensors))
        self.anchor = saved.pop("anchor")
        return saved, saved.pop("numbers")

    def unspent(self, message: str) -> None:
        """Raises a RuntimeError where an earlier backward of this call has overwritten the saved tensors.

        Such a backward has called `spend`, which notes it in a list: compiled autograd's stand-in for the context
        shares this list. Version counters would not tell under saved-tensor hooks, such as `save_on_cpu` or a
        profiler's."""
        if self._ctx.spent:
            raise RuntimeError(message)

    def spend(self, upstream: Tensor) -> None:
        """Notes that this backward overwrites a saved tensor, which only one upstream gradient may do.

        Raises:
            NotImplementedError: PyTorch's `vmap` runs the backward for many upstream gradients at once.
        """
        if not torch.compiler.is_compiling() and (
            functorch.is_legacy_batchedtensor(upstream) or functorch.is_batchedtensor(upstream)
        ):
            raise NotImplementedError(
                "kto_kernels: this backward overwrites a tensor that was saved for it, so that it takes one upstream "
                "gradient; many at once (is_grads_batched=True, vectorize=True) are not supported"
            )
        self._ctx.spent.append(True)


class _Anchor(torch.autograd.Function):
    """An empty tensor whose graph leads to these tensors. It keeps none of their memory."""

    @staticmethod
    def forward(ctx, *tensors):
        return torch.empty(0)


class _NotTwice(torch.autograd.Function):
    """The identity on a gradient that depends on `sources`: the anchor of the call's differentiable tensors, and the
    upstream gradients. Differentiating through it raises an error, where zeros would come otherwise."""

    @staticmethod
    def forward(ctx, gradient, *sources):
        return gradient.detach()  # not a view as autograd sees it, so that it can be changed in place

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            "kto_kernels: differentiating twice is not supported; the stages of kto_kernels.reference are plain "
            "PyTorch and allow it"
        )
