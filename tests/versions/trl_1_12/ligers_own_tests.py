"""Liger's own tests of the losses that `patch_liger()` replaces, out of its source distribution, with the patch in place."""

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

# The patch in front of the first test module, as -p imports it.
PLUGIN = "from kto_kernels.integrations.liger import patch_liger\nprint(patch_liger())\n"
# Left out of the paired losses: a shape whose 360 cases take hours on a CPU.
LARGE = "not 1024-4096"
# Left out of DPO: two tests of the words of errors, of which ours have others; and 16 cases that compare Liger's function
# with Liger's class, which is the same code twice, to less than the fp32 rounding of gradients of 400. (Ours are nearer to
# fp64: `test_sppo_is_as_accurate_as_liger` in tests/integrations/test_liger_pairs.py.)
WORDS = "not test_invalid_loss_type and not test_label_smoothing_validation"
ROUNDING = "not (test_correctness_functional_apo_loss_types and sppo_hard and 3-47-31-123)"
# Loss → how many tests pass, and which are chosen.
SUITES = {
    "kto": (54, "test"),
    "dpo": (473, f"{LARGE} and {WORDS} and {ROUNDING}"),
    "cpo": (26, LARGE),
    "orpo": (18, LARGE),
    "simpo": (26, LARGE),
}


def source(folder):
    """Liger's tests, unpacked in a folder."""
    release = version("liger-kernel")
    archives = Path(sys.prefix) / "sdist"  # kept with the environment
    if not list(archives.glob(f"liger_kernel-{release}.tar.gz")):
        download = ["download", "--quiet", "--no-deps", "--no-binary", "liger-kernel", f"liger-kernel=={release}"]
        subprocess.run([sys.executable, "-m", "pip", *download, "--dest", str(archives)], check=True)
    with tarfile.open(archives / f"liger_kernel-{release}.tar.gz") as archive:
        members = [m for m in archive.getmembers() if m.name.split("/")[1:2] == ["test"]]
        archive.extractall(folder, members=members, filter="data")
    return folder / f"liger_kernel-{release}"


@pytest.mark.parametrize("loss", SUITES)
def test_ligers_own_tests(loss, tmp_path):
    passing, chosen = SUITES[loss]
    (tmp_path / "patched.py").write_text(PLUGIN)
    unpacked = source(tmp_path)
    paths = os.pathsep.join(map(str, [tmp_path, unpacked, Path(__file__).parents[3]]))
    tests = unpacked / f"test/chunked_loss/test_{loss}_loss.py"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "patched",
            "-k",
            chosen,
            "--rootdir",
            str(tests.parent),
            str(tests),
        ],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    summary = done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0 and re.search(rf"\b{passing} passed", done.stdout), summary
    assert f"liger_kernel.chunked_loss.functional.liger_fused_linear_{loss}" in done.stdout, summary
