"""A saved run goes on under other settings of its method where its state allows that, says which, refuses the rest."""

import logging
from dataclasses import replace

import pytest
import torch
import transformers
from test_trainer import arguments, base, data, losses, trainer

import rankshift as rs
from rankshift.core.errors import WrongBase

GALORE = rs.GaLore(rank=4, every=4, stagger=False)
ADA = rs.AdaRankGrad(rank=8, every=4, earliest=2, energy=0.6, stagger=False)
PROJECTED = replace(GALORE, gradient="projected")


def step(run, optimizer, number):
    ids = torch.randint(0, 32, (2, 10), generator=torch.Generator().manual_seed(number))
    run.model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def begun(method, steps=0):
    run = rs.attach(base(dropout=0.0), method)
    optimizer = run.optimizer(lr=1e-2)
    for number in range(steps):
        step(run, optimizer, number)
    return run, optimizer


def resumed(saved, method):
    """A fresh run of this method with another's state; the optimizer is made before or after, as a loop pleases."""
    run, optimizer = begun(method)
    run.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    return run, optimizer


def weights(run):
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


@pytest.fixture(scope="module")
def states():
    found = {}
    for method in (GALORE, ADA, PROJECTED):
        run, optimizer = begun(method, 3)
        found[method] = run.state_dict(), optimizer.state_dict()
    return found


CHANGES = [
    *((GALORE, name, value) for name, value in {
        "rank": 6, "every": 2, "scale": 0.5, "finder": "svd", "transport": "square", "residual": "fira",
        "moments": "8bit", "rounding": "stochastic", "stagger": True,
    }.items()),
    *((ADA, name, value) for name, value in {
        "rank": 5, "min_rank": 2, "energy": 0.9, "multiple": 4, "earliest": 3, "kappa": 0.7, "transport": "centred",
    }.items()),
    *((PROJECTED, name, value) for name, value in {"every": 2, "moments": "8bit", "begin": 2}.items()),
]  # fmt: skip


@pytest.mark.parametrize(("method", "name", "value"), CHANGES)
def test_what_a_state_does_not_depend_on_may_change(states, method, name, value, caplog):
    other = replace(method, **{name: value})
    with caplog.at_level(logging.WARNING, "rankshift"):
        run, optimizer = resumed(states[method], other)
    kind, then = type(method).__name__, getattr(method, name)
    written = [f'{name}="{v}"' if isinstance(v, str) else f"{name}={v}" for v in (then, value)]
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == f"The run was saved as {kind}({written[0]}) and goes on as {kind}({written[1]})."
    assert len(told) <= 2  # the second of what becomes of moments
    assert not any("clock." in text or "→" in text for text in told)
    assert run.step == 3
    assert run.method == other
    for number in range(3, 12):
        step(run, optimizer, number)
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())
    state = run.state_dict()
    assert rs.from_dict(state["adapters"]["default"]["method"]) == other
    assert [rs.from_dict(phase["method"]) for phase in state["phases"]] == [other]


def test_another_rank_holds_from_the_next_renewal_on(states):
    same, ours = resumed(states[GALORE], GALORE), resumed(states[GALORE], replace(GALORE, rank=6))
    for number in (3, 4):
        step(*same, number)
        step(*ours, number)
        assert set(ours[0].subspaces.values()) == ({4} if number == 3 else {6})
        mine = weights(same[0])
        assert all(torch.equal(p, mine[name]) for name, p in weights(ours[0]).items()) == (number == 3)


def test_what_is_saved_after_the_change_is_of_the_new_rule(states, caplog):
    other = replace(GALORE, rank=6, every=2)
    run, optimizer = resumed(states[GALORE], other)
    saved = run.state_dict(), optimizer.state_dict()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rankshift"):
        run, optimizer = resumed(saved, other)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("Of the saved optimizer state: rank 4 until the next renewal, then 6"), "it still waits"
    assert set(run.subspaces.values()) == {4}
    for number in range(3, 6):
        step(run, optimizer, number)
    assert set(run.subspaces.values()) == {6}


@pytest.mark.parametrize(
    ("method", "other", "says"),
    [
        (
            GALORE, replace(GALORE, side="larger", every=9),
            'GaLore(every=4, side="smaller"), and here it is GaLore(every=9, side="larger"): side cannot',
        ),
        (
            GALORE, replace(GALORE, targets=("q_proj",)),
            "GaLore(targets=\"all-linear\"), and here it is GaLore(targets=['q_proj']): targets cannot",
        ),
        (GALORE, replace(GALORE, rest="freeze", side="in"), "side and rest cannot change"),
        (GALORE, PROJECTED, 'GaLore(gradient="full"), and here it is GaLore(gradient="projected"): gradient cannot'),
        (PROJECTED, GALORE, "gradient cannot change"),
        (PROJECTED, replace(PROJECTED, rank=6), "rank cannot change"),
        (GALORE, ADA, "The run was saved as GaLore, and here it is AdaRankGrad: the state of one"),
        (ADA, rs.LoRA(rank=2), "The run was saved as AdaRankGrad, and here it is LoRA"),
    ],
    ids=lambda value: "",
)  # fmt: skip
def test_what_it_depends_on_may_not(states, method, other, says):
    run, _ = begun(other)
    before = weights(run)
    with pytest.raises(WrongBase) as error:
        run.load_state_dict(states[method][0])
    text = str(error.value)
    assert says in text
    assert "run.shift(method)" in text
    assert len(text) < 420
    assert "finder" not in text
    assert all(torch.equal(p, before[name]) for name, p in weights(run).items())
    assert run.step == 0


def test_other_methods_are_loaded_as_they_were():
    run = rs.attach(base(), rs.LoRA(rank=2, alpha=4))
    other = rs.attach(base(), rs.LoRA(rank=2, alpha=8))
    with pytest.raises(WrongBase, match=r"LoRA\(alpha=4\.0\), and here it is LoRA\(alpha=8\.0\): alpha cannot change"):
        other.load_state_dict(run.state_dict())


# ---- Trainers


def test_a_trainer_resumes_under_another_rule(tmp_path, caplog):
    trainer(tmp_path / "a", GALORE, save_steps=3).train()
    other = trainer(tmp_path / "b", replace(GALORE, rank=6, every=2), save_strategy="no")
    with caplog.at_level(logging.WARNING, "rankshift"):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert "The run was saved as GaLore(rank=4, every=4) and goes on as GaLore(rank=6, every=2)." in caplog.text
    assert "rank 4 until the next renewal, then 6" in caplog.text
    assert set(other.run.subspaces.values()) == {6}
    assert min(losses(other)) == 1
    with pytest.raises(WrongBase, match="side cannot change"):
        trainer(tmp_path / "a", replace(GALORE, side="larger")).train(resume_from_checkpoint=True)


def test_an_unmodified_trainer_too_and_its_optimizer_says_so(tmp_path, caplog):
    def made(out, method, **more):
        run, args = rs.attach(base(), method), arguments(out, **more)
        return run, transformers.Trainer(
            run.model, args, train_dataset=data(), optimizer_cls_and_kwargs=run.optimizer_cls_and_kwargs(args)
        )

    made(tmp_path, GALORE, save_steps=3)[1].train()
    run, other = made(tmp_path / "b", replace(GALORE, rank=6, every=2, stagger=True), save_strategy="no")
    with caplog.at_level(logging.WARNING, "rankshift"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (told,) = [record.getMessage() for record in caplog.records if "saved" in record.getMessage()]
    assert told.startswith("The optimizer state was saved under another rule (rank: 4 → 6, every: 4 → 2). rank 4 until")
    assert told.endswith(": model.layers.0.self_attn.q_proj.weight and 13 more.")
    assert set(run.subspaces.values()) == {6}
