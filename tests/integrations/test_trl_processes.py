"""`FusedKTOTrainer` and `FusedDPOTrainer` on two processes over gloo. DDP: both end with the same parameters, which are those of TRL's own
trainer on two processes, and of one process that is given both their batches. FSDP2: the same as DDP."""

import contextlib
import gc
import os
import socket
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("trl")
pytest.importorskip("datasets")
pytest.importorskip("transformers")

import accelerate
import trl
from accelerate.state import AcceleratorState, DistributedType

from kto_kernels.integrations.trl import FusedDPOTrainer, FusedKTOTrainer
from tests.support.rank_pool import forking, leave
from tests.support.trl_harness import MODELS, assert_same_training, make_tokenizer, pairs, rows, train

SECONDS = 300  # without a result: the processes wait for each other


def with_an_unused_parameter():
    model = MODELS["llama"]()
    model.unused = torch.nn.Parameter(torch.ones(3))
    return model


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.0)


def pairs_alike(count, labels=None):
    """Rows whose mismatched pairs, completions rotated by one within a batch, are the same in batches of four and of
    eight: what four and eight end with is the same."""
    dataset = rows(count, labels)
    completions = list(dataset["completion"])
    completions[7::8] = completions[3::8]
    return dataset.remove_columns("completion").add_column("completion", completions)


# Per eight rows four go to each process: all desirable to the first, both kinds to the second.
ONE_SIDED = [True] * 4 + [True, False, False, True]
CASES = {
    # Far from σ(0), where the gradient hardly depends on the KL.
    "kto": {"rows": pairs_alike, "beta": 3.0, "learning_rate": 0.02, "steps": 10},
    "apo": {"rows": pairs_alike, "loss_type": "apo_zero_unpaired"},
    "accumulation": {"gradient_accumulation_steps": 2, "steps": 2},
    "adapter": {"ref": False, "peft": lora},
    "unused parameter": {"make": with_an_unused_parameter, "ddp_find_unused_parameters": True},
    "one-sided batches": {"labels": ONE_SIDED * 5},
    # The mean over tokens of "sft" is each process's own.
    "dpo": {"rows": pairs, "make_args": trl.DPOConfig, "loss_type": ["ipo", "sft"], "loss_weights": [0.01, 1.0]},
}
# The case, and which modules accelerate wraps by themselves: with `Linear` the head is one of them, and still sharded
# when the fused head asks for its weight.
FSDP2 = {
    "FSDP2": ("kto", "LlamaDecoderLayer"),
    "FSDP2, head by itself": ("kto", "Linear"),
    "FSDP2, adapter": ("adapter", "LlamaDecoderLayer"),
    "FSDP2, dpo": ("dpo", "LlamaDecoderLayer"),
    "FSDP2, dpo, head by itself": ("dpo", "Linear"),
}


def beta_of(case):
    return CASES[case].get("beta", 1.0)


def trainers(case):
    return (trl.DPOTrainer, FusedDPOTrainer) if case == "dpo" else (trl.KTOTrainer, FusedKTOTrainer)


def run(cls, case, path, **more):
    options = {"make": MODELS["llama"], "steps": 4} | CASES[case] | more
    peft = options.pop("peft", lambda: None)
    return train(cls, options.pop("make"), make_tokenizer(), path, peft=peft(), **options)


@contextlib.contextmanager
def fsdp_on_a_cpu():
    """accelerate turns FSDP on for some kinds of devices; what it does then works on a CPU too."""
    real = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if kwargs.get("fsdp_plugin") is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, kwargs["fsdp_plugin"]

    wraps = accelerate.accelerator.fsdp2_prepare_model
    with (
        mock.patch.object(AcceleratorState, "__init__", init),
        mock.patch.object(accelerate.accelerator, wraps.__name__, side_effect=wraps) as wrapped,
        mock.patch.dict(os.environ),
    ):
        yield
    wrapped.assert_called_once()


def process(rank: int, port: int, folder: Path, cases: list[str], sharded: list[str]):
    """One of the two: trains the cases with either trainer, and leaves each result in a file."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",  # else accelerate takes every core for each
    }
    torch.set_num_threads(1)
    gc.freeze()  # trainers collect garbage, which what was imported is not
    for case in cases:
        for cls in trainers(case):
            result = run(cls, case, folder, ddp_backend="gloo")
            assert torch.distributed.get_world_size() == 2
            torch.save(result, folder / f"{case} {cls.__name__} {rank}")
    for how in sharded:
        case, module = FSDP2[how]
        config = {"version": 2, "transformer_layer_cls_to_wrap": [module]}
        with fsdp_on_a_cpu():
            result = run(trainers(case)[1], case, folder, ddp_backend="gloo", fsdp=True, fsdp_config=config)
        torch.save(result, folder / f"{case} {how} {rank}")
    leave()


def in_two_processes(folder, cases, sharded):
    """The result of a case in a process: (case, trainer, rank) → parameters and history."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        process, (port, folder, cases, sharded), nprocs=2, join=False, start_method=forking(__name__).get_start_method()
    )
    done, since = [], time.monotonic()
    while not context.join(timeout=1):
        if (found := sorted(path.name for path in folder.iterdir() if path.is_file())) != done:
            done, since = found, time.monotonic()
        elif time.monotonic() - since > SECONDS:
            for child in context.processes:
                child.kill()
            pytest.fail(f"nothing new for {SECONDS} s; done: {done}")
    return lambda case, how, rank: torch.load(folder / f"{case} {how} {rank}", weights_only=True)


# The two processes import the trainers before they train, so that many cases cost little more than one.
OTHERS = [case for case in CASES if case != "kto"], [how for how in FSDP2 if how != "FSDP2"]


@pytest.mark.parametrize(
    ("cases", "sharded"),
    [
        pytest.param(["kto"], ["FSDP2"], id="kto"),
        pytest.param(["kto", *OTHERS[0]], OTHERS[1], id="others", marks=pytest.mark.wide),
    ],
)
def test_two_processes_end_as_trls_two_and_as_one_with_both_batches(cases, sharded, tmp_path, subtests):
    trained = in_two_processes(tmp_path, cases, sharded)
    for case in cases:
        with subtests.test(case):
            theirs, ours = (cls.__name__ for cls in trainers(case))
            mine, other = (trained(case, ours, rank) for rank in (0, 1))
            for name, parameter in mine[0].items():
                assert torch.equal(other[0][name], parameter), name
            assert_same_training(trained(case, theirs, 0), mine, beta=beta_of(case))

    for how in sharded:
        case, _ = FSDP2[how]
        with subtests.test(how):
            for rank in (0, 1):
                found = trained(case, how, rank)
                assert_same_training(trained(case, trainers(case)[1].__name__, 0), found, beta=beta_of(case))

    for case in [case for case in ("kto", "apo") if case in cases]:
        with subtests.test(f"{case}, one process with both batches"):
            torch.set_num_threads(1)
            one = run(FusedKTOTrainer, case, tmp_path, per_device_train_batch_size=8, per_device_eval_batch_size=8)
            assert any(entry["kl"] > 0 for entry in one[1] if "kl" in entry) == (case == "kto")
            assert_same_training(one, trained(case, "FusedKTOTrainer", 0), beta=beta_of(case))
