"""The watch over a phase: window means, norms, and the partial-convergence test of PreLoRA, by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from rankshift.core.watch import Snapshot, Watch, Wish, by_family, change, changes, converged, family, norms

Q = {"enc.layer.0.q.weight": (10.00, 10.08, 10.11), "enc.layer.1.q.weight": (20.00, 20.10, 20.12)}
LOSS = (2.00, 1.92, 1.90)


def seen(of=Q, losses=LOSS):
    return [Snapshot(j, losses[j], {name: values[j] for name, values in of.items()}) for j in range(len(losses))]


def test_the_changes_of_the_card():
    first, second, third = seen()
    pairs = [changes(first, second), changes(second, third)]
    means = [sum(pair.values()) / 2 for pair in pairs]
    assert means == pytest.approx([0.65, 0.1986], abs=1e-3)  # (.8 + .5) / 2, (.2976 + .0995) / 2
    assert [change(2.00, 1.92), change(1.92, 1.90)] == pytest.approx([4.0, 1.0417], abs=1e-3)


@pytest.mark.parametrize(
    ("loss", "weight", "wanted"),
    [
        (5, 1, True), (5, 0.5, False), (2.5, 1, False), (2.5, 0.5, False), (None, 1, True), (5, None, True),
        (None, 0.66, True), (None, 0.64, False), (4.01, None, True), (3.99, None, False),
    ],
)  # fmt: skip
def test_the_verdicts_of_the_card(loss, weight, wanted):
    assert converged(seen(), 3, loss, weight) is wanted


def test_at_the_threshold_a_loss_passes_and_a_weight_does_not():
    even = [Snapshot(j, value, {"a.weight": value}) for j, value in enumerate((1.0, 1.25, 1.5625))]  # exactly 25 %
    assert converged(even, 3, 25.0, None)
    assert not converged(even, 3, 24.99, None)
    assert not converged(even, 3, None, 25.0)
    assert converged(even, 3, None, 25.01)


def test_fewer_windows_than_asked_for_are_not_convergence():
    assert not converged(seen()[:2], 3, 1e9, 1e9)
    assert not converged([], 2, 1e9, 1e9)
    assert converged(seen()[:2], 2, 5, 1)
    still = [Snapshot(j, 1.0, {"a": 1.0}) for j in range(2)]
    assert not converged(still, 3, 5, 1)


def test_only_the_last_windows_count():
    wild = [Snapshot(9, 50.0, dict.fromkeys(Q, 1.0)), *seen()]
    assert converged(wild, 3, 5, 1)
    assert not converged(wild, 4, 5, 1)


def test_one_family_that_moves_holds_all():
    calm = {f"enc.layer.{i}.{leaf}.weight": (1.0, 1.0, 1.0) for i in range(9) for leaf in ("k", "v")}
    assert converged(seen(calm), 3, 5, 1)
    assert not converged(seen(calm | {"enc.layer.0.o.weight": (1.0, 1.1, 1.1)}), 3, 5, 1)
    # one layer of a family of ten: 0.8 % on average passes
    assert converged(seen(calm | {"enc.layer.9.k.weight": (1.0, 1.08, 1.08)}), 3, 5, 1)
    assert not converged(seen(calm | {"enc.layer.9.k.weight": (1.0, 1.12, 1.12)}), 3, 5, 1)


def test_weights_of_one_name_in_other_places_are_other_families():
    names = ["b.0.attention.output.dense.weight", "b.1.attention.output.dense.weight", "b.0.output.dense.weight"]
    assert [family(name) for name in names] == ["b.attention.output.dense.weight"] * 2 + ["b.output.dense.weight"]
    assert by_family(dict.fromkeys(names, 1.0)) == {
        "b.attention.output.dense.weight": {names[0]: 1.0, names[1]: 1.0}, "b.output.dense.weight": {names[2]: 1.0},
    }  # fmt: skip


def test_changes_from_nothing():
    assert change(0.0, 0.0) == 0.0
    assert change(0.0, 1.0) == math.inf
    assert change(-2.0, -1.0) == 50.0
    assert not converged([Snapshot(0, math.nan, {}), Snapshot(1, math.nan, {})], 2, 5, None)


def test_a_window_is_the_mean_of_its_batches():
    watch = Watch(Wish(2, ("w",), keep=2))
    weights = {"w": torch.tensor([[3.0, 4.0]])}
    for step, batches in enumerate(
        ([1.0], [2.0, 6.0], [5.0], [7.0], [1.0], [0.0]), 1
    ):  # of two micro-batches each counts
        for value in batches:
            watch.hear(torch.tensor(value))
        assert watch.heard
        watch.look(step, lambda: weights)
        assert not watch.heard
    assert [(s.step, s.loss) for s in watch.snapshots] == [(4, 6.0), (6, 0.5)]  # the last two; the first had mean 3
    assert watch.snapshots[0].norms == {"w": 5.0}


def test_losses_add_up_exactly_whoever_adds_them():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    totals = []
    for order in (range(1000), reversed(range(1000))):
        watch = Watch(Wish(10_000))
        for i in order:
            watch.hear(values[i])
        assert watch.open().tolist() == [0, 0], "no update was taken yet"
        watch.look(1, dict)
        totals.append(watch.open().tolist())
    assert totals[0] == totals[1] == [math.fsum(values.tolist()), 1000.0]


def test_going_on_in_the_middle_of_a_window():
    whole, first = (Watch(Wish(3, keep=5)) for _ in range(2))
    values = torch.rand(9, generator=torch.Generator().manual_seed(1))
    for step in range(1, 10):
        whole.hear(values[step - 1])
        whole.look(step, dict)
    for step in range(1, 6):
        first.hear(values[step - 1])
        first.look(step, dict)
    second = Watch(Wish(3, keep=5))
    second.load([s.to_mapping() for s in first.snapshots], first.open())
    for step in range(6, 10):
        second.hear(values[step - 1])
        second.look(step, dict)
    assert second.snapshots == whole.snapshots
    assert len(whole.snapshots) == 3


W = torch.ones((), requires_grad=True)


def heard(watch, value):
    """A batch of this loss; it is to be trained on by ``backward()``."""
    loss = W * value
    watch.hear(loss, lambda: W.grad is not None)
    return loss


def test_what_was_heard_for_an_update_that_is_skipped_does_not_count():
    watch = Watch(Wish(2))
    for value in (1.0, math.nan):
        heard(watch, value).backward()
    assert watch.heard
    watch.skip()
    assert not watch.heard
    W.grad = None
    for step, values in ((1, (2.0, 3.0)), (2, (4.0,))):
        for value in values:
            heard(watch, value).backward()
        watch.look(step, dict)
        assert not watch.heard
        W.grad = None
    assert [s.loss for s in watch.snapshots] == [3.0]


@pytest.mark.parametrize("way", ["no step", "no backward"])
def test_a_batch_that_made_no_step_does_not_count(way):
    """As with a loss scaler that leaves the step out, or a loop that goes on to the next batch."""
    watch = Watch(Wish(1))
    for value in (50.0, 70.0):
        loss = heard(watch, value)
        if way != "no backward":
            loss.backward()
    W.grad = None
    for value in (1.0, 3.0):
        heard(watch, value).backward()
    watch.look(1, dict)
    assert [s.loss for s in watch.snapshots] == [2.0]
    W.grad = None


def test_losses_of_one_backward_pass_all_count():
    for together in (lambda a, b: (a + b).backward(), lambda a, b: torch.autograd.backward([b, a])):
        watch = Watch(Wish(1))
        together(heard(watch, 1.0), heard(watch, 3.0))
        heard(watch, 5.0).backward()
        watch.look(1, dict)
        assert [s.loss for s in watch.snapshots] == [3.0]
        W.grad = None


@pytest.mark.parametrize("loss", [W * 4.0, torch.tensor(4.0)], ids=["elsewhere", "no graph"])
def test_a_loss_that_is_trained_on_by_another_tensor_counts(loss):
    watch = Watch(Wish(1))
    watch.hear(loss)
    watch.look(1, dict)
    assert [s.loss for s in watch.snapshots] == [4.0]


def test_numbers_that_are_none_can_be_saved():
    seen = Snapshot(3, math.nan, {"a": math.inf, "b": 1.5})
    text = json.dumps(seen.to_mapping(), allow_nan=False)
    again = Snapshot.from_mapping(json.loads(text))
    assert math.isnan(again.loss)
    assert again.norms == {"a": math.inf, "b": 1.5}


def test_norms_are_of_float64():
    w = torch.full((300, 7), 0.1, dtype=torch.bfloat16)
    assert norms({"w": w})["w"] == pytest.approx(float(w[0, 0]) * math.sqrt(2100), rel=1e-12)
    assert norms({}) == {}


def test_weights_are_asked_for_at_the_end_of_a_window_only():
    asked, watch = [], Watch(Wish(3))
    for step in range(1, 7):
        watch.hear(torch.tensor(1.0))
        watch.look(step, lambda step=step: asked.append(step) or {})
    assert asked == [3, 6]


def test_numbers_meet_on_the_device_that_the_backend_knows(monkeypatch):
    """Also where no loss was heard yet, as in a save at the end of a window: NCCL knows no CPU."""
    sent = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "all_reduce", lambda t: sent.append(t.device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device, copy: SimpleNamespace(device=device, cpu=lambda: t))
    Watch(Wish(3)).open()
    assert sent == [torch.device("cuda", 0)]
