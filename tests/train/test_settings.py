"""Settings: strict, typed, all problems at once."""

import dataclasses
from pathlib import Path

import pytest
import yaml

import rankshift as rs
from rankshift.core.errors import ConfigError, MissingFile
from rankshift.train import config

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def test_a_bare_value_of_a_section_means_its_main_key():
    found = config.parse({"model": "m", "data": "a.jsonl", "method": "full"})
    assert found.data.train == "a.jsonl"
    assert isinstance(found.method, rs.Full)
    assert isinstance(config.parse({"model": "m", "data": "a"}).method, rs.LoRA)


def test_overrides_are_yaml_scalars_with_dots(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: {train: a.jsonl, columns: {text: body}}\nmethod: {rank: 4, alpha: 8}\n")
    pairs = [
        "method.rank=32",
        "train.lr=2e-4",
        "data=b.jsonl",
        "method.targets=[q_proj, v_proj]",
        "train.checkpointing=true",
    ]
    found = config.read(file, [*pairs, "data.validation=dev.jsonl", "name=x", "method.rank_pattern={q_proj: 8}"])
    assert found.method == rs.LoRA(rank=32, alpha=8, targets=("q_proj", "v_proj"), rank_pattern={"q_proj": 8})
    assert found.train.lr == 2e-4
    assert found.train.checkpointing is True
    assert (found.data.train, found.data.validation, found.data.columns) == ("b.jsonl", "dev.jsonl", {"text": "body"})


def test_another_method_starts_from_its_own_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: a\nmethod: {method: lora, rank: 4}\n")
    assert config.read(file, ["method=full"]).method == rs.Full()
    assert config.read(file, ["method=lora"]).method == rs.LoRA(rank=4)


@pytest.mark.parametrize(
    ("text", "value"),
    [("32", 32), ("2e-4", 2e-4), ("1.5", 1.5), (".5", 0.5), ("-3", -3), ("true", True), ("null", None),
     ("[a, 1]", ["a", 1]), ("1.2.3", "1.2.3"), ("text", "text"), ("'32'", "32"), ("e5", "e5")],
)  # fmt: skip
def test_scalars(text, value):
    assert config.scalar(text) == value
    assert type(config.scalar(text)) is type(value)


def test_all_problems_are_told_at_once_with_the_nearest_key(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(
        "modle: m\ndata: {trian: a, validation: 2.0}\nmethod: {method: lora, rnk: 3, rank: x, dropout: 0.1}\n"
        "train: {lr: -1, epochs: fast}\n"
    )
    with pytest.raises(ConfigError) as caught:
        config.read(file, ["seed=1.5", "nonsense"])
    text = str(caught.value)
    for part in (
        "'nonsense' is no setting", "no field 'modle'. Did you mean 'model'?",
        "no field 'trian'. Did you mean 'train'?",
        "data.train is not given", "model is not given", "method lora has no field 'rnk'. Did you mean 'rank'?",
        "method.rank = 'x' is not an integer", "train.epochs = 'fast' is not a number", "seed = 1.5 is not an integer",
    ):  # fmt: skip
        assert part in text
    assert text.startswith("9 problems in ")


def test_values_that_no_run_could_have():
    with pytest.raises(ConfigError) as caught:
        config.parse({
            "model": "m", "name": "a/b", "method": {"rank": 0},
            "data": {"train": "a", "validation": 1.0, "max_length": 1, "labels": 1, "columns": {"txt": "a"}},
            "train": {"lr": 0, "steps": 0, "warmup": 1.0, "clip": -1, "calibration": 0},
        })  # fmt: skip
    assert str(caught.value).startswith("10 problems")
    assert "train.calibration = 0 is below 1" in str(caught.value)
    assert "Did you mean 'text'?" in str(caught.value)
    with pytest.raises(ConfigError, match="no plain directory name"):
        config.parse({"model": "m", "data": "a", "name": "a/b"})


@pytest.mark.parametrize(
    ("pairs", "see"),
    [
        (["method=vera", "method.rank=0"], "See rankshift methods vera."),
        (["method=sora", "method.sparsity=[]"], "See rankshift methods sora."),
        (["method=pc-lora", "method.decay_end=1.5"], "See rankshift methods pc-lora."),
        (["method=PCLoRA", "method.decay_end=x"], "See rankshift methods pc-lora."),
        (["method=flat-lora", "method.sigma=nan"], "See rankshift methods flat-lora."),
        (["method=paca", "method.alpha=0"], "See rankshift methods paca."),
        (["train.epochs=fast"], "See rankshift train --keys."),
        (["method.rnk=3"], "Did you mean 'rank'?"),
        (["train.steps=0"], "Set at least 1."),
    ],
)
def test_every_problem_says_where_to_look(pairs, see):
    with pytest.raises(ConfigError) as caught:
        config.read(None, pairs)
    assert str(caught.value).endswith(see)
    assert str(caught.value).count("See ") <= 1


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes(seed):
    with pytest.raises(ConfigError, match=rf"seed = {seed} is not in 0 … 4294967295"):
        config.parse({"model": "m", "data": "a", "seed": seed})
    assert config.parse({"model": "m", "data": "a", "seed": 2**32 - 1}).seed == 2**32 - 1


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), 0.0])
def test_a_rate_that_is_no_rate(lr):
    with pytest.raises(ConfigError, match=r"train\.lr = .* is no positive number"):
        config.parse({"model": "m", "data": "a", "train": {"lr": lr}})


def test_the_resolved_form_reads_back_as_itself(tmp_path):
    found = config.parse({"model": "m", "data": {"train": ["a", "b"], "labels": ["no", "yes"]}, "prompt": "ROMEO:\n"})
    found = dataclasses.replace(found, method=rs.LoRA(rank=3, modules_to_save=("score",), rank_pattern={"a": 1}))
    (tmp_path / "c.yaml").write_text(config.write(found))
    assert config.read(tmp_path / "c.yaml") == found


def test_without_a_file_it_is_the_bundled_recipe_unless_model_or_data_are_given():
    assert config.read(None).model == "babyllama"
    assert config.read(None, ["train.steps=3"]).data.train == "tinyshakespeare"
    with pytest.raises(ConfigError, match=r"data is not given\. Write data=FILE"):
        config.read(None, ["model=m"])


def test_files_that_are_no_settings(tmp_path):
    (tmp_path / "good.yaml").write_text("model: m")
    with pytest.raises(MissingFile, match=r"Did you mean 'good.yaml'"):
        config.read(tmp_path / "god.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        config.read(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="holds list, not settings"):
        config.read(tmp_path / "list.yaml")


def test_every_setting_says_what_it_means():
    docs = config.describe()
    for kind, prefix in ((config.TrainConfig, ""), (config.DataConfig, "data."), (config.LoopConfig, "train.")):
        for field in dataclasses.fields(kind):
            assert len(docs[prefix + field.name]) > 10, field.name


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_are_strictly_right(file):
    found = config.read(file)
    assert len(file.read_text().splitlines()) <= 40
    assert set(yaml.safe_load(file.read_text())) <= {f.name for f in dataclasses.fields(config.TrainConfig)}
    assert found.model


def test_there_are_recipes():
    assert len(RECIPES) >= 3


@pytest.mark.parametrize(
    ("overrides", "lr"),
    [
        ([], 6e-3),
        (["method=vera"], 6e-2),
        (["method=sora"], 6e-3),
        (["method=vera", "train.lr=1e-3"], 1e-3),
        (["train.lr=1e-3", "method=vera"], 1e-3),
        (["method.rank=4"], 6e-3),
    ],
)
def test_the_bundled_recipe_has_a_rate_for_each_method(overrides, lr):
    assert config.read(None, overrides).train.lr == lr


def test_a_rate_found_for_one_method_does_not_go_to_another(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("model: m\ndata: d.txt\nmethod: {method: lora, rank: 4}\ntrain: {lr: 0.5, steps: 3}\n")
    assert config.read(file, ["method=lora"]).train.lr == 0.5
    other = config.read(file, ["method=vera"])
    assert other.train.lr is None
    assert other.train.steps == 3
    assert config.read(file, ["method=vera", "train.lr=0.1"]).train.lr == 0.1


# ---- phases


def phased(*phases, **more):
    return config.parse({"model": "m", "data": "a", "phases": list(phases), **more})


FIRST = {"method": "full", "until": {"steps": 1000}}


def test_phases_instead_of_a_method():
    found = phased(FIRST, {"method": "ReLoRA", "every": 500, "lr": 1e-3, "until": {"loss": 2, "window": 50}}, "lora")
    assert found.methods == (rs.Full(), rs.ReLoRA(every=500), rs.LoRA())
    assert found.method == rs.Full(), "of several the first"
    assert [phase.lr for phase in found.phases] == [None, 1e-3, None]
    assert found.then == (rs.Then(rs.ReLoRA(every=500), steps=1000, lr=1e-3), rs.Then(rs.LoRA(), loss=2.0, window=50))
    assert config.parse({"model": "m", "data": "a"}).then == ()


def test_no_field_of_a_method_is_one_of_a_phase():
    for kind in rs.core.method.methods().values():
        assert not {"until", "lr"} & {f.name for f in dataclasses.fields(kind)}, kind


def test_phases_are_written_as_they_are_read(tmp_path):
    found = phased(FIRST, {"method": "lora", "rank": 3, "targets": ["q_proj"], "lr": 1e-3})
    (tmp_path / "c.yaml").write_text(config.write(found))
    assert config.read(tmp_path / "c.yaml") == found
    written = yaml.safe_load(config.write(found))
    assert "method" not in written
    assert written["phases"][0] == {**rs.to_dict(rs.Full()), "until": {"steps": 1000}}
    assert "phases" not in yaml.safe_load(config.write(config.parse({"model": "m", "data": "a"})))


def test_all_problems_of_phases_are_told_at_once():
    with pytest.raises(ConfigError) as caught:
        config.parse({
            "model": "m", "data": "a", "method": "lora",
            "phases": [
                {"method": "full", "until": {"stps": 3, "loss": "low"}},
                {"method": "lora", "rnk": 3, "rank": "x", "lr": -1.0, "until": {"window": 3}},
                {"method": "lora", "unitl": {"steps": 3}, "until": {"steps": 0}},
                {"rank": 3},
                {"method": "lroa", "until": {"steps": 3}},
                {"method": "lora", "until": {"loss_change": 1.0, "windows": 1}},
                {"method": "vera", "rank": 0, "until": {"steps": 1.5}},
                {"method": "lora", "until": {"steps": 5}},
            ],
        })  # fmt: skip
    text = str(caught.value)
    for part in (
        "phases.0.until has no field 'stps'. Did you mean 'steps'?",
        "phases.0.until.loss = 'low' is not a number",
        "phases.1 (lora) has no field 'rnk'. Did you mean 'rank'?",
        "phases.1.rank = 'x' is not an integer",
        "phases.1.lr = -1 is no positive number",
        "phases.1.until does not say when the next phase begins: give one or more of steps, minutes, loss,",
        "phases.2 (lora) has no field 'unitl'. Did you mean 'until'?",
        "phases.2.until: steps=0: it must be above 0",
        "phases.3 = {'rank': 3} names no method",
        "There is no method 'lroa'. Did you mean 'lora'?",
        "phases.5.until: windows=1: a change is between two windows at least",
        "VeRA.rank = 0",
        "phases.6.until.steps = 1.5 is not an integer",
        "phases.7.until: the last phase goes on to the end of the run",
        "method and phases are both given",
    ):
        assert part in text, part
    assert text.startswith("15 problems in ")


@pytest.mark.parametrize(
    ("phases", "text"),
    [
        ([], r"phases = \[\] is no list of methods"),
        ({"method": "full"}, "is no list of methods"),
        ("full", "is no list of methods"),
        (None, "is no list of methods"),
        ([3], "phases.0 = 3 names no method"),
        ([{"method": "full"}, "lora"], "phases.0.until does not say when"),
        ([{"method": "full", "until": 1000}, "lora"], "phases.0.until does not say when"),
        (
            [{"method": "full", "until": {"stpes": 10}}, "lora"],
            "has no field 'stpes'. Did you mean 'steps'",
        ),
    ],
)
def test_lists_that_are_none(phases, text):
    with pytest.raises(ConfigError, match=text):
        config.parse({"model": "m", "data": "a", "phases": phases})


def test_phases_that_cannot_be_reached():
    with pytest.raises(ConfigError, match="phases: LoRA would begin at update 1000 at the earliest"):
        phased(FIRST, "lora", train={"steps": 900})
    phased(FIRST, "lora", train={"steps": 1001})
    phased(FIRST, "lora", train={"epochs": 1})  # their number is not known yet


def test_a_later_phase_that_waits_for_gradients():
    waits = {"method": "lora", "train": "B", "precondition": True}
    settings = {"fused_backward": True, "clip": 0}
    with pytest.raises(ConfigError, match=r"train\.fused_backward: LoRA as configured changes gradients"):
        phased(FIRST, waits, train=settings)
    phased(FIRST, "lora", train=settings)


def test_dotted_keys_reach_into_phases(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "model: m\ndata: a\nphases:\n- {method: full, until: {steps: 10}}\n- {method: lora, rank: 4, lr: 0.5, "
        "until: {loss: 2}}\n- lora\n"
    )
    pairs = ["phases.1.rank=8", "phases.0.until.steps=20", "phases.2.rank=2", "phases.1.until.window=7"]
    found = config.read(file, pairs)
    assert found.methods == (rs.Full(), rs.LoRA(rank=8), rs.LoRA(rank=2))
    assert [phase.until for phase in found.phases] == [{"steps": 20}, {"loss": 2.0, "window": 7, "windows": 3}, {}]
    assert found.phases[1].lr == 0.5
    other = config.read(file, ["phases.1.rank=2", "phases.1.method=melora"])  # its fields and rate are another's
    assert other.phases[1] == config.PhaseConfig(
        method=rs.MELoRA(rank=2), until={"loss": 2.0, "window": 100, "windows": 3}
    )
    for wrong in ("phases.3.rank=8", "phases.x.rank=8", "phases.1=lora", "phases.rank=8"):
        with pytest.raises(ConfigError, match=r"there are phases\.0 to phases\.2"):
            config.read(file, [wrong])
    with pytest.raises(ConfigError, match="both given"):
        config.read(file, ["method.rank=8"])
    alone = config.read(file, ["method=lora"])
    assert (alone.methods, alone.phases) == ((rs.LoRA(),), ())


def test_a_list_on_the_command_line_takes_the_place_of_the_recipes_method():
    found = config.read(None, ["phases=[{method: full, until: {steps: 3}}, {method: lora, rank: 4}, vera]".replace(
        "4}", "4, until: {steps: 2}}")])  # fmt: skip
    assert found.methods == (rs.Full(), rs.LoRA(rank=4), rs.VeRA())
    assert [phase.lr for phase in found.phases] == [6e-4, 6e-3, 6e-2], "of this small model"
    given = config.read(None, ["train.lr=1e-3", "phases=[{method: full, until: {steps: 3}}, lora]"])
    assert given.train.lr == 1e-3
    assert [phase.lr for phase in given.phases] == [None, None]
    assert config.read(None, ["phases.0.rank=4", "phases=[{method: lora, until: {steps: 3}}, full]"]).method.rank == 4
    with pytest.raises(ConfigError, match="both given"):
        config.read(None, ["method=lora", "phases=[{method: full, until: {steps: 3}}, lora]"])
