"""The averaged weights against an average computed number by number."""

import copy
import json

import pytest
import torch
from torch import nn

from lab.checkpoint import pack, unpack
from lab.ema import EMA

pytestmark = pytest.mark.usefixtures("one_thread")


def network() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    module[2].bias.requires_grad_(False)
    return module


def shake(module: nn.Module, update: int) -> None:
    """Other weights and other statistics, as an update of a training would leave them."""
    numbers = torch.Generator().manual_seed(update)
    with torch.no_grad():
        for weight in module.parameters():
            weight += torch.randn(weight.shape, generator=numbers, dtype=weight.dtype)
    module.train()(torch.randn(8, 3, generator=numbers, dtype=torch.float64))


@pytest.mark.parametrize(("decay", "power"), [(0.9, 0.75), (0.999, 0.75), (0.99, 1.0), (0.0, 0.75)])
def test_the_average_is_the_one_computed_number_by_number(decay, power):
    module = network()
    ema = EMA(module, decay, power)
    slow = [weight.flatten().tolist() for weight in module.parameters()]
    for update in range(40):
        shake(module, update)
        ema.update()
        keep = min(decay, 1 - 1 / (1 + update) ** power)
        for mine, weight in zip(slow, module.parameters(), strict=True):
            for place, value in enumerate(weight.flatten().tolist()):
                mine[place] = keep * mine[place] + (1 - keep) * value
    for mine, weight in zip(slow, ema.module.parameters(), strict=True):
        torch.testing.assert_close(weight.flatten(), torch.tensor(mine, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_decay_warms_up_from_zero_to_its_end_and_stays_there():
    ema = EMA(nn.Linear(1, 1), 0.99)
    decays = [ema.decay_at(update) for update in range(2000)]
    assert decays[0] == 0
    assert decays == sorted(decays)
    assert decays[15] == pytest.approx(1 - 1 / 8)  # 16^0.75 = 8
    reached = next(update for update, decay in enumerate(decays) if decay == 0.99)
    assert reached == pytest.approx(100 ** (1 / 0.75), abs=1.5)


def test_the_first_average_is_the_module_itself():
    module = network()
    ema = EMA(module, 0.999)
    shake(module, 1)
    ema.update()
    for mine, weight in zip(ema.module.parameters(), module.parameters(), strict=True):
        assert mine.equal(weight)


def test_buffers_are_copied_and_not_averaged():
    module = network()
    ema = EMA(module, 0.999)
    for update in range(5):
        shake(module, update)
        ema.update()
    assert ema.module[1].num_batches_tracked == 5
    for mine, theirs in zip(ema.module.buffers(), module.buffers(), strict=True):
        assert mine.equal(theirs)
        assert mine.data_ptr() != theirs.data_ptr()


def test_the_averaged_module_is_a_copy_that_is_never_trained():
    module = network()
    ema = EMA(module, 0.9)
    assert not ema.module.training
    assert module.training
    assert not any(weight.requires_grad for weight in ema.module.parameters())
    assert module[0].weight.requires_grad
    before = copy.deepcopy(ema.module.state_dict())
    shake(module, 0)
    assert all(value.equal(before[name]) for name, value in ema.module.state_dict().items())


def test_tied_weights_are_averaged_once():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).double()
    module[1].weight = module[0].weight
    ema = EMA(module, 0.5, power=100.0)  # 0, then 0.5
    assert ema.module[0].weight is ema.module[1].weight
    with torch.no_grad():
        for value in (2.0, 4.0):
            module[0].weight.fill_(value)
            ema.update()
    assert ema.module[1].weight.eq(3.0).all()


def test_a_restored_average_goes_on_exactly():
    module = network()
    ema = EMA(module, 0.9)
    for update in range(3):
        shake(module, update)
        ema.update()
    tensors = {}
    tree = json.loads(json.dumps(pack(ema.state_dict(), tensors)))
    resumed = EMA(module, 0.9)
    resumed.load_state_dict(unpack(tree, tensors))
    assert resumed.updates == 3
    for update in range(3, 8):
        shake(module, update)
        ema.update()
        resumed.update()
    assert all(value.equal(resumed.module.state_dict()[name]) for name, value in ema.module.state_dict().items())
