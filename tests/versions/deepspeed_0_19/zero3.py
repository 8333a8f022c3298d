"""DeepSpeed's ZeRO-3 on two processes over gloo, every parameter partitioned: the trainers of TRL with our loss, and the
module of examples/fsdp2_loop.py, end in the parameters that they have without it."""

import copy
import os
import socket
from pathlib import Path
from unittest import mock

import torch

CONFIG = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": 4,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def whole(module):
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def trainers(folder):
    """TRL's own trainer under DDP; FusedKTOTrainer and the patched trainer under ZeRO-3."""
    import trl
    from accelerate.state import DistributedType, PartialState

    from kto_kernels.integrations.trl import FusedKTOTrainer, patch_trl
    from tests.integrations.test_trl_processes import beta_of, run
    from tests.support import trl_harness

    expected = run(trl.KTOTrainer, "kto", folder, ddp_backend="gloo")
    # accelerate asks for a GPU before it lets DeepSpeed act.
    with (
        mock.patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_CPU)),
        mock.patch.object(trl_harness, "whole_parameters", whole),
    ):
        found = [run(FusedKTOTrainer, "kto", folder, use_cpu=False, deepspeed=CONFIG)]
        with patch_trl():
            found.append(run(trl.KTOTrainer, "kto", folder, use_cpu=False, deepspeed=CONFIG))
    for training in found:
        trl_harness.assert_same_training(expected, training, beta=beta_of("kto"))


def own_loop(folder):
    """The head's weight is empty when the loss asks for it: nobody calls the head's forward."""
    import deepspeed
    import torch.distributed as dist

    from tests.parallel.test_training import batches, part_of, tiny, trained, with_loss
    from tests.support.shard_harness import assert_near

    model = tiny(tied=False)
    data = list(batches(model))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    single = copy.deepcopy(model)
    trained(with_loss(single, None), data)

    config = CONFIG | {"optimizer": {"type": "SGD", "params": {"lr": 0.05}}, "gradient_clipping": 0.0}  # not by default
    module = with_loss(model, dist.group.WORLD)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    assert model.lm_head.weight.numel() == 0
    for batch in data:
        loss, _ = engine(*part_of(batch, dist.get_rank()))
        engine.backward(loss)
        engine.step()
    found, expected = whole(model), dict(single.named_parameters())
    for name, parameter in found.items():
        assert (parameter - start[name]).abs().max() > 1e-3 * start[name].abs().max()
        assert_near(name, parameter, expected[name].detach())


def process(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    for test in (trainers, own_loop):
        test(folder)
        (folder / f"{test.__name__} {rank}").touch()
    torch.distributed.barrier()
    os._exit(0)  # DeepSpeed's threads outlive it


def test_zero3(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, tmp_path), nprocs=2)
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {
        f"{test.__name__} {rank}" for test in (trainers, own_loop) for rank in (0, 1)
    }
