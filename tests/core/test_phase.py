"""Then: what it says, what it refuses, when it is time, and whether that can come."""

import math

import pytest

import rankshift as rs
from rankshift.core.errors import ConfigError
from rankshift.core.phase import Phase, Then, check_phases, labels, listed
from rankshift.core.watch import Snapshot

LORA = rs.LoRA(rank=2)


def snapshots(*losses, norm=1.0):
    return [Snapshot(i, loss, {"a.weight": norm}) for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, "When is LoRA to begin"),
        ({"lr": 1e-3, "window": 3}, "When is LoRA to begin"),
        ({"steps": 0}, r"Then\(LoRA, steps=0\): it must be above 0"),
        ({"minutes": -1.0}, "minutes=-1.0"),
        ({"minutes": math.inf}, "minutes=inf"),
        ({"loss_change": 0.0}, "loss_change=0.0"),
        ({"weight_change": math.nan}, "weight_change=nan"),
        ({"loss": math.nan}, "loss=nan"),
        ({"loss": 1.0, "window": 0}, "window=0"),
        ({"loss_change": 1.0, "windows": 1}, "a change is between two windows at least"),
        ({"steps": 3, "lr": 0.0}, "a learning rate, above 0"),
        ({"steps": 3, "lr": math.inf}, "a learning rate, above 0"),
        ({"steps": 1.5}, "is not an integer"),
        ({"steps": True}, "is not an integer"),
        ({"loss": "low"}, "is not a number"),
        (
            {"loss": 1.0, "window": 20, "steps": 5},
            r"loss=1.0, window=20\) is looked at after 20 .*steps=5 it begins any",
        ),
        ({"loss_change": 1.0, "window": 5, "steps": 14}, r"window=5, windows=3\) is looked at after 15 updates"),
        ({"weight_change": 1.0, "window": 5, "loss": 1.0, "steps": 9}, "leave weight_change out"),
    ],
)
def test_what_it_refuses(values, text):
    with pytest.raises(ConfigError, match=text):
        Then(LORA, **values)


def test_a_method_that_is_none():
    with pytest.raises(ConfigError, match=r"Then needs a method such as rs\.LoRA\(rank=16\); got str"):
        Then("lora", steps=3)


def test_a_loss_may_be_negative():
    assert Then(LORA, loss=-2.0).reached(1, 0.0, snapshots(-2.0))


def test_there_and_back():
    then = Then(
        rs.ReLoRA(rank=2, every=7), steps=300, minutes=1.5, loss=0.1, loss_change=2.0, weight_change=1.0, lr=1e-3
    )
    assert Then.from_mapping(then.to_mapping()) == then
    assert Then.from_mapping(Then(LORA, minutes=2).to_mapping()) == Then(LORA, minutes=2.0)


@pytest.mark.parametrize(
    ("then", "steps", "minutes", "seen", "reached"),
    [
        (Then(LORA, steps=3), 2, 9.0, (), False),
        (Then(LORA, steps=3), 3, 0.0, (), True),
        (Then(LORA, steps=3), 4, 0.0, (), True),
        (Then(LORA, minutes=2), 99, 1.99, (), False),
        (Then(LORA, minutes=2), 1, 2.0, (), True),
        (Then(LORA, loss=1.5), 99, 9.0, (), False),  # no window yet
        (Then(LORA, loss=1.5), 99, 9.0, (1.4, 1.6), False),  # the last one counts
        (Then(LORA, loss=1.5), 99, 9.0, (1.6, 1.5), True),
        (Then(LORA, loss_change=5), 99, 9.0, (2.0, 1.92), False),  # 3 windows
        (Then(LORA, loss_change=5), 99, 9.0, (2.0, 1.92, 1.90), True),
        (Then(LORA, loss_change=2.5), 99, 9.0, (2.0, 1.92, 1.90), False),
        (Then(LORA, loss_change=2.5, windows=2), 99, 9.0, (2.0, 1.92, 1.90), True),
        (Then(LORA, loss_change=2.5, steps=300), 300, 9.0, (2.0, 1.92, 1.90), True),  # the first of them
        (Then(LORA, loss_change=5, weight_change=1), 99, 9.0, (2.0, 1.92, 1.90), True),
    ],
)
def test_when_it_is_time(then, steps, minutes, seen, reached):
    assert then.reached(steps, minutes, snapshots(*seen)) is reached


def test_weights_that_move_hold_a_phase_that_their_loss_would_end():
    moving = [Snapshot(i, 1.0, {"a.weight": norm}) for i, norm in enumerate((1.0, 1.02, 1.04))]
    assert not Then(LORA, loss_change=5, weight_change=1).reached(9, 0.0, moving)
    assert Then(LORA, loss_change=5).reached(9, 0.0, moving)
    assert Then(LORA, weight_change=2.1).reached(9, 0.0, moving)


@pytest.mark.parametrize(
    ("then", "least"),
    [
        (Then(LORA, steps=3), 3),
        (Then(LORA, minutes=5), 0),
        (Then(LORA, loss=1.0, window=7), 7),
        (Then(LORA, loss_change=1.0, window=7), 21),
        (Then(LORA, weight_change=1.0, window=7, windows=2), 14),
        (Then(LORA, weight_change=1.0, loss=0.5, window=7), 7),
        (Then(LORA, weight_change=1.0, steps=22, window=7), 21),
        (Then(LORA, weight_change=1.0, steps=2, minutes=1, window=1, windows=2), 0),
    ],
)
def test_the_soonest_that_it_can_be_time(then, least):
    assert then.least() == least


def test_a_list_that_cannot_be_reached():
    coming = [Then(LORA, steps=3), Then(rs.Full(), weight_change=1.0, window=2)]  # at 3, and 6 later at the soonest
    assert check_phases(LORA, coming, 0, 0, None) == check_phases(LORA, coming, 0, 0, 10) == []
    with pytest.raises(ConfigError, match="Full would begin at update 9 at the earliest, and the run ends at 9"):
        check_phases(LORA, coming, 0, 0, 9)
    with pytest.raises(ConfigError, match="Full would begin at update 10 "):
        check_phases(LORA, coming, 1, 1, 10)
    with pytest.raises(ConfigError, match="LoRA would begin at update 3 "):
        check_phases(LORA, coming, 0, 0, 3)


def test_what_is_no_list_of_phases():
    assert listed([]) == ()
    for wrong in (Then(LORA, steps=3), [LORA], [Then(LORA, steps=3), None]):
        with pytest.raises(ConfigError, match=r"then= is a list of rs\.Then"):
            listed(wrong)


def test_what_is_to_be_watched():
    assert Then(LORA, steps=3).wish(["a"]) is None
    assert Then(LORA, minutes=3).wish([]) is None
    wish = Then(LORA, loss=1.0, window=7).wish(["a"])
    assert (wish.window, wish.weights) == (7, ())
    wish = Then(LORA, weight_change=1.0, window=7, windows=4).wish(["a", "b"])
    assert (wish.window, wish.weights, wish.keep) == (7, ("a", "b"), 4)
    with pytest.raises(ConfigError, match="the phase before trains none of them"):
        Then(LORA, weight_change=1.0).wish([])


def test_files_of_before_know_no_rate_and_no_count():
    old = {"method": rs.to_dict(LORA), "start": 2, "stop": 5}
    assert Phase.from_mapping(old) == Phase(rs.to_dict(LORA), 2, 5)
    assert Phase.from_mapping(old).trainable is None


def test_phases_of_one_method_are_called_by_what_is_otherwise():
    stages = [rs.PreLoRA(stage="full"), rs.PreLoRA(stage="joint", ranks={"a": 4}), rs.PreLoRA(stage="frozen")]
    methods = [rs.Full(), *stages, rs.LoRA(rank=4, alpha=8), rs.Full(), rs.LoRA(rank=6, alpha=8)]
    assert labels([Phase(rs.to_dict(m), 0) for m in methods]) == [
        "Full", "PreLoRA full", "PreLoRA joint", "PreLoRA frozen", "LoRA rank 4", "Full", "LoRA rank 6",
    ]  # fmt: skip
