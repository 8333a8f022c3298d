"""Who takes part: the peers and the backends of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kto_kernels import available_backends

from .shapes import Shape


class Absent(Exception):
    """Why a peer cannot take part."""


@dataclass(frozen=True)
class Setting:
    """Where a variant is to run."""

    device: str
    dtype: torch.dtype
    shape: Shape

    def need(self, condition: bool, what: str) -> None:
        if not condition:
            raise Absent(f"needs {what}")

    def need_gpu(self, *capabilities: tuple[int, int]) -> None:
        self.need(self.device == "cuda", "a GPU")
        if capabilities:
            found = torch.cuda.get_device_capability()
            names = " or ".join(f"{major}.{minor}" for major, minor in capabilities)
            self.need(found in capabilities, f"compute capability {names}, this is {found[0]}.{found[1]}")


@dataclass(frozen=True)
class Peer:
    name: str
    make: Callable[[Setting], Callable]  # raises Absent, ImportError or AttributeError where it is not there
    inplace: bool = False  # its backward writes over the logits


def present(peers: dict[str, Peer], chosen: tuple[str, ...], setting: Setting) -> tuple[dict, dict[str, str]]:
    """Name → how it computes the loss, and name → why it is absent, of those that are chosen."""
    found, absent = {}, {}
    for key in chosen:
        peer = peers[key]
        try:
            found[peer.name] = peer.make(setting)
        except (Absent, ImportError, AttributeError) as error:
            absent[peer.name] = f"absent: {error}"
    return found, absent


def chosen_peers(text: str, known: dict[str, Peer]) -> tuple[str, ...]:
    """The names of peers in a comma list, "all" or "none".

    Raises:
        ValueError: a name is unknown.
    """
    return _chosen(text, tuple(known), tuple(known))


def chosen_backends(text: str, device: str) -> tuple[str, ...]:
    """The names of backends in a comma list, "all" (those worth timing on the device) or "none".

    Raises:
        ValueError: a name is unknown, or cannot run on the device.
    """
    reasons = available_backends(device)
    names = _chosen(text, tuple(reasons), worth_timing(device))
    for name in names:
        if reasons[name] is not None:
            raise ValueError(f"{name!r} is not available: {reasons[name]}")
    return names


def worth_timing(device: str) -> tuple[str, ...]:
    """Backends that run on a device, but plain PyTorch and what only emulates a GPU."""
    slow = {"torch"} | ({"triton", "cuda"} if device == "cpu" else set())
    return tuple(name for name, why in available_backends(device).items() if why is None and name not in slow)


def _chosen(text: str, known: tuple[str, ...], everything: tuple[str, ...]) -> tuple[str, ...]:
    if text in ("all", "none"):
        return everything if text == "all" else ()
    names = tuple(text.split(","))
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is not known; expected all, none, or some of: {', '.join(known)}")
    return names
