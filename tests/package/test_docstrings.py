"""The docstrings as an editor and the documentation read them: griffe parses each one, every parameter has an entry of
its own, and the examples run."""

import ast
import doctest
import functools
import logging
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import kto_kernels

if sys.version_info < (3, 11):
    pytest.skip("griffe needs Python 3.11", allow_module_level=True)
import griffe

OPTIONAL = ("kto_kernels.integrations.", "kto_kernels.reference.")  # modules that are public without being in `__all__`
SHAPE = re.compile(r"\((|\.\.\.|[^()]*,[^()]*)\)")  # (), (...), (B,), (B, T, V)
DTYPE = re.compile(r"\b(bf16|fp16|fp32|fp64|int32|int64|bool|floating|dtype)\b")
WITH_EXAMPLES = [
    "kto_loss",
    "linear_kto_loss",
    "preference_loss",
    "linear_preference_loss",
    "KTOLoss",
    "LinearKTOLoss",
    "token_logps",
    "linear_token_logps",
    "sequence_logps",
    "kl_reference_point",
    "kto_loss_from_logps",
    "LinearPlan.of",
]


@functools.cache
def package() -> griffe.Module:
    """The package as griffe reads it, without an import of its modules: TRL and Liger need not be installed."""
    return griffe.load("kto_kernels", search_paths=[Path(kto_kernels.__file__).parents[1]], docstring_parser="google")


def below(owner: griffe.Object) -> Iterator[griffe.Object]:
    """An object and all that is defined in it, the private included."""
    yield owner
    for member in owner.members.values():
        if not member.is_alias:
            yield from below(member)


def final(x: griffe.Object | griffe.Alias) -> griffe.Object:
    """The object that a name stands for, wherever it was imported from."""
    return x.final_target if x.is_alias else x


def exported() -> list[griffe.Object]:
    """The functions and classes in `kto_kernels.__all__`."""
    return [final(package()[name]) for name in kto_kernels.__all__ if name != "__version__"]


@functools.cache
def public() -> list[griffe.Object]:
    """Every public function, class and method."""
    everywhere = [x for x in below(package()) if x.path.startswith(OPTIONAL)]
    found = {x.path: x for owner in (*exported(), *everywhere) for x in below(owner)}
    private = re.compile(r"\._")
    return [
        x for x in found.values() if (x.is_function or x.is_class) and not private.search(x.path) and not inherits(x)
    ]


def inherits(x: griffe.Object) -> bool:
    """Whether a method has the docstring of the method that it overrides."""
    if x.docstring or not x.is_function or not x.parent.is_class:
        return False
    return any(x.name in base.members and base.members[x.name].docstring for base in x.parent.mro())


def is_dataclass(x: griffe.Object) -> bool:
    return x.is_class and "dataclass" in x.labels


def parameters(x: griffe.Object) -> dict[str, griffe.Parameter]:
    """The parameters that a docstring must have entries for, with their stars: a class has those of its constructor."""
    if x.is_class and (is_dataclass(x) or "__init__" not in x.members):
        return {}
    bound = x.is_class or (x.parent.is_class and "staticmethod" not in x.labels)
    found = list(x.parameters)[1 if bound and x.is_function else 0 :]
    stars = {"variadic positional": "*", "variadic keyword": "**"}
    return {stars.get(p.kind.value, "") + p.name: p for p in found if p.name != "self" or not bound}


def sections(x: griffe.Object, kind: str) -> list:
    """The entries of the sections of one kind in a docstring."""
    parsed = x.docstring.parse("google") if x.docstring else []
    return [entry for section in parsed if section.kind.value == kind for entry in section.value]


def test_griffe_reads_every_docstring_without_a_warning():
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger = logging.getLogger("griffe")
    logger.addHandler(handler)
    try:
        read = [x.docstring.parse("google") for x in below(package()) if x.docstring]
    finally:
        logger.removeHandler(handler)
    assert len(read) > 300
    assert not heard, "\n".join(heard)


def test_every_parameter_has_one_entry_and_no_entry_is_of_another():
    entries = 0
    for x in public():
        assert x.docstring, x.path
        fields = {m.name for m in x.members.values() if "instance-attribute" in m.labels} if is_dataclass(x) else set()
        for kind, expected in (("parameters", parameters(x)), ("attributes", fields)):
            found = Counter(entry.name for entry in sections(x, kind))
            assert found == Counter(list(expected)), (x.path, kind, set(found) ^ set(expected))
            entries += len(found)
    assert entries > 300
    assert "beta" in parameters(final(package()["linear_kto_loss"]))


def test_entries_say_what_a_default_of_none_means():
    for x in public():
        for entry in sections(x, "parameters"):
            if parameters(x)[entry.name].default == "None":
                assert "None" in entry.description, (x.path, entry.name)


def test_entries_of_tensors_name_their_shape_and_in_the_losses_their_dtype():
    tensors = 0
    losses = {y.path for x in exported() for y in below(x)}
    for x in public():
        for kind in ("parameters", "other parameters", "attributes"):
            for entry in sections(x, kind):
                if re.search(r"\bTensor\b", str(entry.annotation)):
                    tensors += 1
                    assert SHAPE.search(entry.description), (x.path, entry.name)
                    assert x.path not in losses or DTYPE.search(entry.description), (x.path, entry.name)
    assert tensors > 150


def test_functions_say_what_they_return():
    for x in public():
        if not x.is_function:
            continue
        entries = sections(x, "returns") + sections(x, "yields")
        if str(x.returns) in ("None", "Iterator[None]"):
            assert not entries, x.path
            continue
        assert x.returns is not None, x.path
        assert len(entries) == 1 or (str(x.returns).startswith("tuple[") and all(e.name for e in entries)), x.path
        assert len(entries) >= 1 and all(entry.description for entry in entries), x.path


def raising() -> set[str]:
    """The functions and classes of the package whose docstring says what they raise, the private included."""
    return {x.path for x in below(package()) if sections(x, "raises")}


def may_raise(x: griffe.Object, documented: set[str]) -> bool:
    """Whether a function's text raises an error, checks an argument, or calls by name a function that does."""
    for node in ast.walk(ast.parse(textwrap.dedent(x.source))):
        if isinstance(node, ast.Raise) or (isinstance(node, ast.Attribute) and node.attr == "failing_together"):
            return True
        if isinstance(node, ast.Name) and node.id == "checks":
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            try:
                called = final(package().modules_collection[x.resolve(node.func.id)])
            except (griffe.NameResolutionError, KeyError):  # a builtin, another library's
                continue
            if called.path in documented:
                return True
    return False


def test_functions_that_raise_say_what():
    documented, checked = raising(), 0
    for x in public():
        function = x.members.get("__init__") if x.is_class else x
        if function is None or is_dataclass(x) or not may_raise(function, documented):
            continue
        checked += 1
        errors = [str(entry.annotation) for entry in sections(x, "raises")]
        assert errors, x.path
        assert all(re.fullmatch(r"\w+(Error|Exception)", error) for error in errors), (x.path, errors)
        assert len(errors) == len(set(errors)), (x.path, errors)
    assert checked > 20


def test_the_examples_run():
    shown = set()
    for x in below(package()):
        text = x.docstring.value if x.docstring else ""
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            exec(compile(block, x.path, "exec"), {})
        assert "+SKIP" not in text, x.path
        if ">>>" not in text:
            continue
        shown.add(x.path)
        test = doctest.DocTestParser().get_doctest(text, {}, x.path, str(x.filepath), x.docstring.lineno)
        heard: list[str] = []
        doctest.DocTestRunner().run(test, out=heard.append)
        assert not heard, "".join(heard)
    for name in WITH_EXAMPLES:
        owner, _, method = name.partition(".")
        target = final(package()[owner])
        assert (target[method] if method else target).path in shown, name
