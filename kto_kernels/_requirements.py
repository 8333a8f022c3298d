"""The versions that the package runs with, where an installer has not looked: `pip install --no-deps`, a folder on the path."""

import torch

TORCH, TRITON = (2, 8), (3, 4)  # as in pyproject.toml


def older(version: str, least: tuple[int, int]) -> bool:
    """Whether a version such as "2.8.0a0+git1234" comes before `least`; a development version counts as its release."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) < least


if older(torch.__version__, TORCH):
    raise ImportError("kto_kernels needs PyTorch {}.{} or later, found {}".format(*TORCH, torch.__version__))
