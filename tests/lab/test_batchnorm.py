"""Batch normalisation over two processes is that of the whole batch on one, to its second derivative."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, multiprocessing, nn

from lab.batchnorm import WholeBatchNorm2d, see_whole_batches

PROCESSES = 2


def network() -> nn.Sequential:
    """A convolution and two normalisations, one of them inside another module and without weights."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.ModuleList([nn.BatchNorm2d(4, affine=False, momentum=None)])[0]
    )
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 2)
        net[1].bias.normal_()
    return net


def images() -> Tensor:
    return 5 + torch.randn(6, 2, 7, 7, generator=torch.Generator().manual_seed(1))


def results(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """What a network makes of images in two steps, gradients of a loss that is a mean over rows, and gradients of a slope."""
    for part in (x + 1, x):
        x = part.clone().requires_grad_()
        net.zero_grad()
        out = net(x)
        (slope,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        ((out.pow(3).sum() + slope.square().sum()) / len(x)).backward()
    found = {f"grad {name}": weight.grad for name, weight in net.named_parameters() if weight.grad is not None}
    assert x.grad is not None
    found |= {"out": out.detach(), "slope": slope.detach(), "x": x.grad}
    found |= {name: buffer.clone() for name, buffer in net.named_buffers()}
    found["rested"] = net.eval()(x).detach()
    return {name: value.contiguous() for name, value in found.items()}


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", PROCESSES), rank=rank, world_size=PROCESSES)
    net = network()
    see_whole_batches(net)
    assert sum(isinstance(module, WholeBatchNorm2d) for module in net.modules()) == 2
    save_file(results(net, images().chunk(PROCESSES)[rank]), f"{folder}/{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_thread")
def test_two_processes_normalise_as_one(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path),), nprocs=PROCESSES)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(PROCESSES))
    whole = results(network(), images())
    assert whole.keys() == first.keys()
    for name, value in whole.items():
        if name.startswith("grad "):
            found = (first[name] + second[name]) / PROCESSES  # as data-parallel training takes the mean
        elif name in ("out", "rested", "slope"):
            found = torch.cat([first[name], second[name]])
        elif name == "x":
            found = torch.cat([first[name], second[name]]) / PROCESSES
        else:
            assert torch.equal(first[name], second[name])
            found = first[name]
        assert float((found - value).abs().max()) <= 1e-5 * float(value.abs().max()), name


def test_weights_and_names_stay(tmp_path: Path) -> None:
    net, changed = network(), network()
    see_whole_batches(changed)
    assert list(net.state_dict()) == list(changed.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), changed.state_dict().values()))
