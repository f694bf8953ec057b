"""How a student is made ready for its strategy, in one process; several are in test_ddp.py."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from pathokd.distill.strategy import FullyShardedStrategy, check_strategy, compile_student
from pathokd.errors import TrainingError
from pathokd.models import StudentSpec
from pathokd.models.ema import Ema
from pathokd.models.encoder import Encoder
from pathokd.models.student import build_student

ARGS = {"embed_dim": 16, "num_heads": 2, "patch_size": 8, "depth": 10}


@pytest.fixture
def alone(cpu_shards: None, tmp_path: Path) -> Iterator[DeviceMesh]:
    """A process group of one, and torch's compiler as it is by itself."""
    torch._dynamo.reset()
    called = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # torch 2.6
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with torch._dynamo.config.patch({called: 8, f"accumulated_{called}": 256}):
        yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
    torch._dynamo.reset()


def gradients(encoder: Encoder) -> list[torch.Tensor]:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    encoder.train()(images).cls.square().sum().backward()
    found: list[Any] = [parameter.grad for parameter in encoder.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in found]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch, as it traces
@pytest.mark.filterwarnings("ignore:.*FSDP2-wrapped module .* returned a view tensor")
@pytest.mark.parametrize(("drop_path_rate", "graphs"), [(0.0, 1), (0.2, 10)])
def test_every_block_of_a_sharded_student_is_compiled(alone: DeviceMesh, drop_path_rate: float, graphs: int) -> None:
    """Blocks alike share one graph; ten rates of stochastic depth are more variants than torch compiles by itself."""
    spec = StudentSpec("vit_tiny_patch16_224", {**ARGS, "drop_path_rate": drop_path_rate}, image_px=32)
    plain, encoder, counter = build_student(spec), build_student(spec), torch._dynamo.testing.CompileCounter()
    compile_student(encoder, SimpleNamespace(strategy=FullyShardedStrategy()), backend=counter)  # type: ignore[arg-type]
    for block in encoder.model.blocks:
        fully_shard(block, mesh=alone)
    fully_shard(encoder, mesh=alone)
    found = gradients(encoder)
    assert counter.frame_count == graphs
    if drop_path_rate == 0:
        for mine, wanted in zip(found, gradients(plain), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)


def test_a_sharded_average_goes_on_after_a_validation_that_saved_nothing(alone: DeviceMesh) -> None:
    """A forward without a backward leaves its parameters put together; only a new best checkpoint used to part them."""
    net = torch.nn.Linear(4, 3)
    ema = Ema(net, 0.5)
    fully_shard(net, mesh=alone)
    fully_shard(ema.model, mesh=alone)
    with torch.no_grad():
        ema.model(torch.ones(2, 4))
        before = ema.model.weight.detach().clone()
    net(torch.ones(2, 4)).sum().backward()
    with torch.no_grad():
        net.weight.add_(1.0)
    ema.update(net)
    torch.testing.assert_close(ema.model.weight.full_tensor(), before + 0.5)  # type: ignore[operator]


def test_a_device_without_fp64_is_refused() -> None:
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("mps", 0)))
    with pytest.raises(TrainingError, match=r"set trainer\.accelerator to cpu"):
        check_strategy(trainer)  # type: ignore[arg-type]


def test_fsdp2_on_a_cpu_is_refused_where_torch_has_it_for_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.6 went down in the first forward pass, by an attribute that its streams lack."""
    monkeypatch.delattr(torch.cpu.Stream, "record_event", raising=False)
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy="fsdp2", logger=False)
    with pytest.raises(TrainingError, match=r"shards over GPUs only: set trainer\.strategy to ddp"):
        check_strategy(trainer)
