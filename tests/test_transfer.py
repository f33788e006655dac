"""Every regulariser against a hand computation, and after channels have gone from the target."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from afds.compression.widths import Kept, KeptChannels, cut_tensor
from afds.distillation import AttentiveDistillation, FrozenNetwork, tap, tap_points
from afds.graph import convbn_units, residual_blocks, stage_ends, unit_roles
from afds.selection import select
from afds.transfer import AttentiveTransfer, BlockHints, Delta, LogitDistillation, NearStart, Step, channel_weights
from afds.transfer.delta import _Tail, fit_classifier, map_variances, weights_of


def step(network: nn.Module | None = None, **parts: object) -> Step:
    return Step(network or nn.Identity(), parts.pop("logits", torch.zeros(2, 3)), parts.pop("features", {}), **parts)  # type: ignore[arg-type]


def kept(out: list[int], in_: list[int]) -> KeptChannels:
    return KeptChannels(torch.tensor(out), torch.tensor(in_, dtype=torch.long))


def test_l2_sp_follows_the_network_by_name() -> None:
    network = nn.ModuleDict({"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 2, 1)})
    start = {name: p.detach().clone() for name, p in reversed(list(network.named_parameters()))}
    term = NearStart(0.01, start)
    with torch.no_grad():
        network["b"].weight += 1.0
    assert float(term(step(network)).detach()) == pytest.approx(8 / 2)

    where = {"a": kept([0, 3], [0, 1, 2]), "b": kept([1], [0, 3])}
    smaller = nn.ModuleDict({"a": nn.Conv2d(3, 2, 1), "b": nn.Conv2d(2, 1, 1)})
    smaller.load_state_dict({name: cut_tensor(name, t, where) for name, t in network.state_dict().items()})
    term.cut(where)
    assert float(term(step(smaller)).detach()) == pytest.approx(2 / 2)  # the two weights of b that remain
    term.cut(where)  # what remains is told from the original, so twice is once
    assert float(term(step(smaller)).detach()) == pytest.approx(2 / 2)


def test_kd_is_hintons_term() -> None:
    ours, theirs = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    p, q = torch.softmax(theirs / 4, 1)[0], torch.softmax(ours / 4, 1)[0]
    by_hand = 16 * sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    term = LogitDistillation(1.0, 4.0)
    assert float(term(step(logits=ours, teacher_logits=theirs))) == pytest.approx(by_hand, rel=1e-5)


def test_delta_is_the_equation_and_follows_the_network() -> None:
    ours, theirs = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2)
    w = torch.tensor([0.5, 0.3, 0.2])
    term = Delta(0.01, {"u": w}, {"u": 0.25})

    def by_hand(channels: list[int], target: Tensor) -> float:
        total = 0.0
        for b in range(2):
            for place, c in enumerate(channels):
                total += 3 * float(w[c]) * float((target[b, place] - theirs[b, c]).square().sum()) / 4
        return 0.5 * total / 2 / 0.25

    assert float(term(step(features={"u": ours}, teacher={"u": theirs}))) == pytest.approx(by_hand([0, 1, 2], ours))
    term.cut({"u": kept([0, 2], [0])})
    less = ours[:, [0, 2]]
    assert float(term(step(features={"u": less}, teacher={"u": theirs}))) == pytest.approx(by_hand([0, 2], less))


def test_delta_weights_are_the_softmax_of_standardised_increases() -> None:
    rise = torch.tensor([1.0, 2.0, 6.0])
    z = (rise - 3) / torch.tensor([4.0, 1.0, 9.0]).mean().sqrt()
    torch.testing.assert_close(weights_of(rise), torch.softmax(z / 5, 0))
    torch.testing.assert_close(weights_of(torch.ones(4)), torch.full((4,), 0.25))


def test_increase_of_the_loss_is_that_of_a_network_without_the_channel(tiny_resnet: nn.Module) -> None:
    x_BCHW, y_B = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    unit = stage_ends(tiny_resnet, [u.name for u in convbn_units(tiny_resnet)])[1]
    found = _Tail(FrozenNetwork(tiny_resnet, [unit], before_norm=True).network, unit).increase(x_BCHW, y_B)
    conv = tiny_resnet.get_submodule(unit)
    with torch.no_grad():
        whole = F.cross_entropy(tiny_resnet(x_BCHW), y_B)
        for channel in range(len(found)):
            weight = conv.weight[channel].clone()  # type: ignore[index]
            conv.weight[channel] = 0  # type: ignore[index, operator]
            without = F.cross_entropy(tiny_resnet(x_BCHW), y_B)
            conv.weight[channel] = weight  # type: ignore[index, operator]
            assert float(found[channel]) == pytest.approx(float(without - whole), abs=1e-6)


def test_channel_weights_of_all_units_and_the_classifier_they_are_measured_with(tiny_resnet: nn.Module) -> None:
    ends = stage_ends(tiny_resnet, [u.name for u in convbn_units(tiny_resnet)])
    batches = [(torch.randn(8, 3, 32, 32), torch.arange(8) % 4) for _ in range(2)]
    before = {name: p.clone() for name, p in tiny_resnet.state_dict().items()}
    source = FrozenNetwork(tiny_resnet, ends, before_norm=True)
    variances = map_variances(source, batches)
    maps = torch.cat([source(x)[1][ends[0]] for x, _ in batches]).transpose(0, 1).flatten(1)
    assert variances[ends[0]] == pytest.approx(float(maps.var(1, unbiased=False).mean()), rel=1e-4)
    weights = channel_weights(source, ends, batches, 4)
    assert set(weights) == set(ends)
    for unit, w_C in weights.items():
        assert w_C.shape == (tiny_resnet.get_submodule(unit).out_channels,)
        assert float(w_C.sum()) == pytest.approx(1, abs=1e-5)
        assert float(w_C.max()) > float(w_C.min())
    assert all(torch.equal(p, before[name]) for name, p in tiny_resnet.state_dict().items())
    frozen = FrozenNetwork(tiny_resnet, ends).network
    fit_classifier(frozen, batches, 4)
    loss = sum(float(F.cross_entropy(frozen(x), y)) for x, y in batches) / 2
    assert loss < 1.2  # chance is log 4 = 1.386


def test_delta_looks_before_the_norm_with_and_without_selection(tiny_resnet: nn.Module) -> None:
    ends, x_BCHW = stage_ends(tiny_resnet, [u.name for u in convbn_units(tiny_resnet)]), torch.randn(2, 3, 32, 32)
    selective = select(tiny_resnet).eval()
    seen = []
    for network in (tiny_resnet, selective):
        with tap(network, tap_points(network, ends, before_norm=True)) as features:
            network(x_BCHW)
        seen.append(features)
    _, theirs = FrozenNetwork(tiny_resnet, ends, before_norm=True)(x_BCHW)
    for unit in ends:
        torch.testing.assert_close(seen[0][unit], theirs[unit])
        torch.testing.assert_close(seen[1][unit], theirs[unit], rtol=1e-4, atol=1e-5)


def test_afd_and_hints_compare_the_channels_that_remain() -> None:
    theirs, ours = {"u": torch.randn(2, 4, 2, 2)}, {"u": torch.randn(2, 3, 2, 2)}
    where: Kept = {"u": kept([0, 1, 3], [0])}
    afd = AttentiveDistillation({"u": 4})
    term = AttentiveTransfer(0.01, afd)
    term.cut(where)
    expected, _ = afd(ours, {"u": theirs["u"][:, [0, 1, 3]]})
    torch.testing.assert_close(term(step(features=ours, teacher=theirs)), expected)
    assert set(term.facts) == {"u"}

    hints = BlockHints(1.0, {"block": "u"})
    hints.cut(where)
    same = {"block": theirs["u"][:, [0, 1, 3]]}
    assert float(hints(step(features=same, teacher={"block": theirs["u"]}))) == 0.0


def test_every_residual_block_has_a_unit_that_writes_it(tiny_bottleneck: nn.Module) -> None:
    roles = unit_roles(tiny_bottleneck)
    for block in residual_blocks(tiny_bottleneck):
        writers = [u.name for u in convbn_units(tiny_bottleneck)
                   if u.name.startswith(f"{block}.") and roles[u.name] == "stream"]  # fmt: skip
        assert writers == [f"{block}.conv3"]
