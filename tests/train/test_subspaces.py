"""What is seen of projected gradients: a Trainer's log, the table of a run, and the picture over layers and time."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from test_trainer import arguments, base, data
from transformers import PrinterCallback, TrainerCallback

import rankshift as rs
from rankshift.core.errors import DataError, MissingFile, NotWritable
from rankshift.train.heat_map import course, groups, heat_map

STEPS = 6


class Heard(TrainerCallback):
    """Remembers what it is told, as a logger's callback would."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append((state.global_step, dict(logs)))


class Screen(PrinterCallback):
    """Prints every log, to here."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))


def trained(out, method, heard=None, **more):
    trainer = rs.Trainer(
        model=base(), method=method, args=arguments(out, max_steps=STEPS, **more), train_dataset=data(),
        callbacks=[heard or Heard()],
    )  # fmt: skip
    trainer.tables = []

    class Collect(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            trainer.tables.append((state.global_step, trainer.run.subspace_table()))

    trainer.add_callback(Collect())
    return trainer


@pytest.fixture(scope="module")
def adaptive(tmp_path_factory):
    """A training whose ranks change."""
    heard = Heard()
    method = rs.AdaRankGrad(rank=8, energy=0.8, every=3, earliest=1)
    trainer = trained(tmp_path_factory.mktemp("run"), method, heard)
    trainer.train()
    return trainer, heard


def test_every_log_has_the_means_and_each_renewal_its_layer(adaptive):
    trainer, heard = adaptive
    tables = dict(trainer.tables)
    plain = [(step, logs) for step, logs in heard.logs if "loss" in logs]
    assert [step for step, _ in plain] == list(range(1, STEPS + 1))
    for step, logs in plain:
        rows = tables[step].rows
        assert logs["subspace_rank"] == pytest.approx(np.mean([row.rank for row in rows]))
        assert logs["subspace_energy"] == pytest.approx(np.mean([row.energy for row in rows]))
        assert logs["subspace_saturated"] == pytest.approx(np.mean([row.saturated for row in rows]))
        assert logs["subspace_renewals"] == sum(row.renewals for row in rows)
        assert not any("/" in key for key in logs), "what a console shows has no layers"
    found = [(step, logs) for step, logs in heard.logs if any("/" in key for key in logs)]
    before = {}
    for step, table in trainer.tables:
        due = {row.name for row in table.rows if row.renewals != before.get(row.name, 0)}
        before = {row.name: row.renewals for row in table.rows}
        logs = {key: value for at, logs in found if at == step for key, value in logs.items() if "/" in key}
        assert {key.partition("/")[2] for key in logs} == due
        for row in table.rows:
            if row.name in due:
                assert logs[f"subspace_rank/{row.name}"] == row.rank
                assert logs[f"subspace_energy/{row.name}"] == row.energy
                assert logs[f"subspace_saturated/{row.name}"] == float(row.saturated)
                assert logs[f"subspace_renewals/{row.name}"] == row.renewals
    assert len({row.rank for _, table in trainer.tables for row in table.rows}) > 1, "a rank that changes"
    assert 1 < len(found) <= STEPS


def test_consoles_are_not_flooded(tmp_path):
    screen = Screen()
    trainer = trained(tmp_path, rs.GaLore(rank=4, every=2), screen)
    trainer.train()
    assert any("subspace_rank" in logs for logs in screen.logs)
    assert not any("/" in key for logs in screen.logs for key in logs)
    assert screen in trainer.callback_handler.callbacks, "it is back"
    assert "subspace_saturated" not in trainer.run.metrics(), "a fixed rank has no wish"


def test_other_methods_log_nothing_of_it(tmp_path):
    heard = Heard()
    trained(tmp_path, rs.LoRA(rank=2), heard).train()
    assert not any("subspace" in key for _, logs in heard.logs for key in logs)


def test_a_resumed_training_has_the_whole_course(tmp_path, adaptive):
    trainer, _ = adaptive
    method = trainer.run.method
    trained(tmp_path, method, save_steps=4).train()
    again = trained(tmp_path, method)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for what in ("rank", "energy"):
        ours, theirs = course(again.state.log_history, what), course(trainer.state.log_history, what)
        assert ours.steps == theirs.steps
        assert ours.layers == theirs.layers
        np.testing.assert_array_equal(ours.values, theirs.values)


def test_the_course_is_what_the_tables_say(adaptive):
    trainer, _ = adaptive
    file = max(trainer._out.glob("checkpoint-*"))
    sources = {
        "log": trainer.state.log_history,
        "tables": trainer.tables,
        "file": file / "trainer_state.json",
        "directory": str(file),
    }
    for what in ("rank", "energy"):
        tables = [sorted(table.rows, key=lambda row: row.name) for _, table in trainer.tables]
        want = np.array([[getattr(row, what) for row in rows] for rows in tables]).T
        for name, source in sources.items():
            found = course(source, what)
            assert found.steps == tuple(range(1, STEPS + 1)), name
            assert found.layers == tuple(row.name for row in tables[0]), name
            np.testing.assert_array_equal(found.values, want, err_msg=name)
            assert found.edges() == list(range(STEPS + 1))


def test_a_layer_keeps_its_number_and_is_unknown_before():
    log = [
        {"step": 10, "loss": 1.0, "subspace_rank": 3.0},
        {"step": 10, "subspace_rank/h.10.weight": 4.0, "subspace_energy/h.10.weight": 0.5},
        {"step": 20, "loss": 1.0},
        {"step": 20, "subspace_rank/h.2.weight": 2.0},
        {"step": 20, "eval_loss": 1.0},
        {"step": 35, "loss": 1.0},
        {"step": 35, "subspace_rank/h.10.weight": 3.0},
        {"step": 35, "train_runtime": 1.0},
    ]
    found = course(log)
    assert found.steps == (10, 20, 35)
    assert found.layers == ("h.2.weight", "h.10.weight")
    np.testing.assert_array_equal(found.values, [[math.nan, 2, 2], [4, 4, 3]])
    assert found.edges() == [0, 10, 20, 35]
    assert course(log[:2]).edges() == [9, 10]
    np.testing.assert_array_equal(course(log, "energy").values, [[0.5, 0.5, 0.5]])


def test_groups_are_blocks_of_the_model():
    names = [f"model.layers.{i}.{leaf}.weight" for i in range(12) for leaf in ("attn.q", "attn.k", "mlp.up")]
    assert groups([*names, "lm_head.weight"]) == [
        *((f"layers {i}", 3 * i, 3 * i + 3) for i in range(12)), ("lm_head", 36, 37)
    ]  # fmt: skip
    assert groups(["model.layers.0.experts.1.up", "model.layers.0.experts.2.up"]) == [("layers 0", 0, 2)]
    assert groups([]) == []


def shown(monkeypatch):
    """The figures that are made, as they are drawn."""
    from matplotlib.figure import Figure

    figures = []
    draw = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, file: (figures.append(self), draw(self, file)))
    return figures


@pytest.mark.parametrize("blocks", [1, 18])
def test_the_picture(tmp_path, monkeypatch, blocks):
    import matplotlib.image

    figures = shown(monkeypatch)
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = [f"model.layers.{i}.{leaf}.weight" for i in range(blocks) for leaf in leaves]
    log = []
    for step in (5, 10, 15):
        log += [{"step": step, "loss": 1.0}, {"step": step}]
        for i, name in enumerate(names):
            log[-1] |= {f"subspace_rank/{name}": float(i % 7 + step), f"subspace_energy/{name}": step / 20}
    assert heat_map(tmp_path / "map.png", log, "a title") == tmp_path / "map.png"
    picture = matplotlib.image.imread(tmp_path / "map.png")
    (figure,) = figures
    assert picture.shape[:2] == tuple(round(150 * inches) for inches in reversed(figure.get_size_inches()))
    assert picture.shape[1] == 1800
    left, right, *bars = figure.axes
    assert [axes.get_ylabel() for axes in bars] == ["rank", "captured share of ‖G‖²"]
    assert (left.get_xlabel(), left.get_ylabel(), figure.get_suptitle()) == ("update", "layer", "a title")
    for axes, what in ((left, "rank"), (right, "energy")):
        (mesh,) = axes.collections
        np.testing.assert_array_equal(mesh.get_array().reshape(len(names), 3), course(log, what).values)
        assert axes.yaxis_inverted(), "the first layer on top"
    labels = [label.get_text() for label in left.get_yticklabels()]
    if blocks == 1:
        assert labels == [f"layers.0.{leaf}" for leaf in sorted(leaves)]
    else:
        assert labels == [f"layers {i}" for i in range(blocks)]
        assert list(left.get_yticks()) == [7 * i + 3.5 for i in range(blocks)]
    renderer = figure.canvas.get_renderer()
    boxes = [label.get_window_extent(renderer) for label in left.get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(boxes)), "names do not touch"


def test_many_blocks_are_named_by_some(tmp_path, monkeypatch):
    figures = shown(monkeypatch)
    log = [{"step": 1, **{f"subspace_rank/h.{i}.{leaf}.weight": 1.0 for i in range(100) for leaf in "abc"}}]
    heat_map(tmp_path / "map.png", log)
    labels = figures[0].axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == [f"h {i}" for i in range(0, 100, 3)]
    boxes = [label.get_window_extent(figures[0].canvas.get_renderer()) for label in labels]
    assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(boxes)), "names do not touch"


def test_what_no_picture_can_be_made_of(tmp_path):
    with pytest.raises(DataError, match="Nothing was logged of subspaces"):
        heat_map(tmp_path / "map.png", [{"step": 1, "loss": 2.0}])
    with pytest.raises(MissingFile, match=r"nothing\.json is not there"):
        heat_map(tmp_path / "map.png", tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text(json.dumps([1, 2]))
    with pytest.raises(DataError, match=r"other.json is no trainer_state.json"):
        heat_map(tmp_path / "map.png", tmp_path / "other.json")
    with pytest.raises(NotWritable):
        heat_map(tmp_path / "none" / "map.png", [{"step": 1, "subspace_rank/a": 2.0}])
    assert not (tmp_path / "map.png").exists()


def test_a_plain_loop_collects_tables(tmp_path):
    run = rs.attach(base(0.0), rs.GaLore(rank=4, every=2))
    optimizer, tables = run.optimizer(lr=1e-3), []
    for step in range(4):
        ids = torch.stack([data()[step]["input_ids"]])
        run.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tables.append((run.step, run.subspace_table()))
    heat_map(tmp_path / "map.png", tables)
    assert (tmp_path / "map.png").stat().st_size > 5000


def test_one_table_is_a_picture_of_its_update(tmp_path, adaptive):
    table = adaptive[0].run.subspace_table()
    found = course(table)
    assert found.steps == (STEPS,)
    assert dict(zip(found.layers, found.values[:, 0], strict=True)) == {row.name: row.rank for row in table.rows}
    heat_map(tmp_path / "map.png", table)
    assert (tmp_path / "map.png").stat().st_size > 5000
