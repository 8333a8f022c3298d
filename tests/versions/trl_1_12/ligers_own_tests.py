"""Liger's own tests of its KTO loss, out of its source distribution, with `patch_liger()` in place."""

import os
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

# The patch in front of the first test module, as -p imports it.
PLUGIN = "from kto_kernels.integrations.liger import patch_liger\nprint(patch_liger())\n"


def test_ligers_own_tests(tmp_path):
    release = version("liger-kernel")
    archives = Path(sys.prefix) / "sdist"  # kept with the environment
    if not list(archives.glob(f"liger_kernel-{release}.tar.gz")):
        download = ["download", "--quiet", "--no-deps", "--no-binary", "liger-kernel", f"liger-kernel=={release}"]
        subprocess.run([sys.executable, "-m", "pip", *download, "--dest", str(archives)], check=True)
    with tarfile.open(archives / f"liger_kernel-{release}.tar.gz") as archive:
        members = [m for m in archive.getmembers() if m.name.split("/")[1:2] == ["test"]]
        archive.extractall(tmp_path, members=members, filter="data")
    (tmp_path / "patched.py").write_text(PLUGIN)
    package = Path(__file__).parents[3]
    paths = os.pathsep.join([str(tmp_path), str(tmp_path / f"liger_kernel-{release}"), str(package)])
    tests = tmp_path / f"liger_kernel-{release}/test/chunked_loss/test_kto_loss.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "patched", "--rootdir", str(tests.parent), str(tests)],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    summary = done.stdout[-2000:] + done.stderr[-2000:]
    assert done.returncode == 0 and re.search(r"\b54 passed", done.stdout), summary
    assert "liger_kernel.chunked_loss.functional.liger_fused_linear_kto" in done.stdout, summary
