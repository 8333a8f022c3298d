"""Several copies of the package in one process (a copy from a hub beside an installed one, two revisions, a second
import): each has operators of its own, and all work."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import gc, importlib, importlib.util, pathlib, pickle, shutil, sys
import torch
from torch.utils.flop_counter import FlopCounterMode

import kto_kernels

place = pathlib.Path(sys.argv[1])
source = pathlib.Path(kto_kernels.__file__).parent
shutil.copytree(source, place / "kto_copy")
shutil.copytree(source, place / "elsewhere" / "kto_kernels")
labels, desirable = torch.randint(33, (2, 5)), torch.tensor([True, False])
hidden, weight = torch.randn(2, 5, 8), torch.randn(33, 8)


def load(name, folder):
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def forget(name):
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


def results(package, compiled):
    def loss(h, w):
        both = package.kto_loss(h @ w.t(), labels, desirable, kl=0.3).loss
        both = both + package.linear_kto_loss(h, w, labels, desirable, kl=0.3).loss
        return both + package.linear_token_logps(h, w, labels).sum()

    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    if compiled:
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    else:
        with FlopCounterMode(display=False) as flops:
            value = loss(*leaves)
        # linear_kto_loss 3G, the logits 1G, and linear_token_logps 1G up to here.
        assert flops.get_total_flops() == 5 * 2 * 10 * 8 * 33
    value.backward()
    return [value.item(), *(leaf.grad for leaf in leaves)]


def same(package, compiled):
    pairs = zip(results(package, compiled), expected)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


def check(*packages, newly):
    # Compiled too are those that may have changed since the last check.
    torch.compiler.reset()
    assert all(same(package, False) for package in packages) and all(same(package, True) for package in newly)


expected = results(kto_kernels, False)
copy = load("kto_copy", place / "kto_copy")
check(kto_kernels, copy, newly=[kto_kernels, copy])
assert (kto_kernels.ops.schema.NAMESPACE, copy.ops.schema.NAMESPACE) == ("kto_kernels", "kto_kernels_2")
for backend in ("triton", "cuda"):  # where there is no GPU, interpreted and emulated: the launchers are the same
    if copy.available_backends()[backend] is None:
        logps = [k.token_logps(hidden[:, :2], labels[:, :2] % 8, backend=backend) for k in (copy, kto_kernels, copy)]
        assert torch.equal(logps[0], logps[1]) and torch.equal(logps[0], logps[2])
assert pickle.loads(pickle.dumps(copy.KTOLoss(beta=0.2))).options["beta"] == 0.2

first = kto_kernels
forget("kto_kernels")
again = importlib.import_module("kto_kernels")
assert again is not first
check(first, copy, again, newly=[again])

forget("kto_kernels")
sys.path.insert(0, str(place / "elsewhere"))
revision = importlib.import_module("kto_kernels")
assert pathlib.Path(revision.__file__).is_relative_to(place)
del first, again, kto_kernels
torch.compiler.reset()
gc.collect()
check(copy, revision, newly=[copy, revision])

forget("kto_copy")
del copy
torch.compiler.reset()
gc.collect()
check(revision, newly=[revision])
print("all of them work")
"""


@pytest.mark.fault(8)
def test_copies_of_the_package_work_beside_each_other(tmp_path):
    ran = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0 and "all of them work" in ran.stdout, ran.stderr[-3000:]
