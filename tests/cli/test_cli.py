"""The command line as a user meets it: through the real entry point, in a process of its own."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rankshift as rs
from rankshift import cli
from rankshift.cli import boundary
from rankshift.methods import methods

RANKSHIFT = Path(sys.executable).with_name("rankshift")


def call(*arguments, cwd=None, expect=0):
    """The finished process of a command."""
    done = subprocess.run(
        [RANKSHIFT, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=280,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == expect, done.stdout + done.stderr
    return done


@pytest.fixture
def here_in(monkeypatch, capfd):
    """Runs a command in this process, which is quicker: (exit code, stdout, stderr)."""

    def run(*arguments, cwd=None):
        if cwd is not None:
            monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["rankshift", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run


@pytest.fixture
def refused(here_in):
    """The two lines of an error with exit code 2."""

    def run(*arguments, cwd=None):
        code, _, errors = here_in(*arguments, cwd=cwd)
        lines = errors.splitlines()
        assert code == 2, errors
        assert lines[0].startswith("error: ")
        assert len(lines) == 2, errors
        return errors

    return run


# ---- quick things ----------------------------------------------------------------------------------------------------


def test_help_is_instant():
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        text = call("--help").stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)  # not the neighbours' time
    assert min(times) < 0.5
    for command in ("train", "merge", "export", "inspect", "methods"):
        assert command in text


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["merge", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys, contextlib\n"
        f"sys.argv = ['rankshift', *{arguments!r}]\n"
        "from rankshift.cli import main\n"
        "with contextlib.suppress(SystemExit): main()\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_version():
    assert call("--version").stdout == f"rankshift {rs.__version__}\n"


def test_methods_are_those_of_the_registry(here_in, refused, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, table, _ = here_in("methods")
    for name, kind in methods().items():
        row = next(line for line in table.splitlines() if line.split()[:1] == [name])
        assert kind.summary in row
    _, text, _ = here_in("methods", "lora")
    for field in ("rank", "alpha", "targets", "dora", "modules_to_save"):
        assert re.search(rf"^{field} ", text, re.M)
    assert "Did you mean 'lora'?" in refused("methods", "lroa")


def test_keys_lists_every_setting(here_in):
    _, text, _ = here_in("train", "--keys")
    for key in ("model", "data.train", "data.validation", "data.columns", "train.lr", "train.steps", "output", "seed"):
        assert re.search(rf"^{re.escape(key)} ", text, re.M)


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--fast"], "No such option"),
        (["merge", "runs/x"], "Missing argument 'OUT'"),
        (["train", "missing.yaml"], "missing.yaml is not there"),
        (["train", "a.yaml", "b.yaml"], "second config file"),
        (["train", "method.rnk=3"], "Did you mean 'rank'?"),
        (["train", "method.rank=1000"], "rank 1000 at model.layers.0.self_attn.q_proj exceeds min(out, in) = 128"),
        (["train", "data=missing.jsonl", "model=babyllama"], "missing.jsonl is not there"),
        (["train", "--resume", "runs/nothing"], "There is no directory runs/nothing"),
        (["train", "--resume", "runs/x", "seed=1"], "Leave 'seed=1' out"),
        (["train", "method=vera", "method.rank=0"], "See rankshift methods vera."),
        (["train", "method=paca", "method.alpha=0"], "See rankshift methods paca."),
        (["inspect", "nothing"], "There is no directory nothing"),
        (["merge", "nothing", "out"], "There is no directory nothing"),
        (["export", "nothing", "out", "--format", "gguf"], "'gguf' is none of peft, merged"),
    ],
)
def test_errors_are_two_lines(tmp_path, refused, arguments, match):
    assert match in refused(*arguments, cwd=tmp_path)
    assert not list(tmp_path.glob("runs/*"))


def test_only_a_close_name_is_suggested(tmp_path, refused):
    (tmp_path / "thesis.tex").write_text("")
    (tmp_path / "runs").mkdir()
    for arguments in (
        ["train", "model=babyllama", "data=missing.jsonl"], ["train", "model=./nothing", "data=tinyshakespeare"],
        ["train", "missing.yaml"], ["train", "--resume", "absent"], ["inspect", "absent"], ["merge", "absent", "out"],
    ):  # fmt: skip
        text = refused(*arguments, cwd=tmp_path)
        assert "thesis" not in text
        assert "Known:" not in text
        assert len(text.splitlines()) == 2, text
    assert "Did you mean 'runs'?" in refused("inspect", "rnus", cwd=tmp_path)
    assert refused("export", "runs", "out", "--profile", "foo", cwd=tmp_path).count("portable") == 1


def test_several_problems_are_told_at_once(tmp_path, here_in):
    code, _, errors = here_in("train", "model=./no", "data=no.jsonl", cwd=tmp_path)
    assert code == 2
    assert errors.splitlines()[0] == "error: 2 problems:"
    assert [line.split()[0] for line in errors.splitlines()[1:]] == ["-", "-"]


def test_an_error_through_the_entry_point(tmp_path):
    done = call("train", "train.stpes=3", cwd=tmp_path, expect=2)
    assert done.stderr == "error: train has no field 'stpes'.\n       Did you mean 'steps'?\n"
    assert done.stdout == ""


def test_what_was_not_foreseen_is_one_line_and_a_hint(monkeypatch, capsys):
    def fail():
        raise TypeError("something\nlong")

    monkeypatch.setattr("rankshift.cli.methods.show_all", fail)
    monkeypatch.setattr(sys, "argv", ["rankshift", "methods"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: TypeError: something"
    assert "--debug" in lines[1]
    monkeypatch.setattr(sys, "argv", ["rankshift", "methods", "--debug"])
    with pytest.raises(TypeError):
        cli.main()


def test_ctrl_c_before_anything_is_saved(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("rankshift.cli.methods.show_all", stop)
    monkeypatch.setattr(sys, "argv", ["rankshift", "methods"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 130
    assert capsys.readouterr().err == "Stopped.\n"


def test_the_second_line_says_what_to_do():
    text = 'rank 5 at a.b exceeds min(out, in) = 4. Lower rank or exclude "b".'
    assert boundary.two_lines(text) == 'rank 5 at a.b exceeds min(out, in) = 4.\nLower rank or exclude "b".'
    assert boundary.two_lines("one\ntwo. Three.") == "one\ntwo. Three."


@pytest.mark.parametrize(
    ("arguments", "see"),
    [(["methods"], "See rankshift methods --help"), (["train", "--keys"], "rankshift methods NAME")],
)
def test_an_error_of_a_single_sentence_gets_a_second_line(monkeypatch, capsys, arguments, see):
    def fail():
        raise rs.errors.ConfigError("x = 0 is below 1.")

    monkeypatch.setattr("rankshift.cli.methods.show_all", fail)
    monkeypatch.setattr("rankshift.cli.train.list_keys", fail)
    monkeypatch.setattr(sys, "argv", ["rankshift", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    first, second = capsys.readouterr().err.splitlines()
    assert (stop.value.code, first) == (2, "error: x = 0 is below 1.")
    assert see in second


def test_errors_speak_of_the_command_line():
    """Whatever the library's export errors advise in Python has its words here."""
    import ast

    from rankshift.cli.files import on_command_line

    root, texts = Path(rs.__file__).parent, []
    for file in (root / "io" / "export.py", root / "io" / "compressed.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Raise)
                and isinstance(node.exc, ast.Call)
                and ast.unparse(node.exc).startswith("ExportError(")
            ):
                parts = [
                    p.value for p in ast.walk(node.exc) if isinstance(p, ast.Constant) and isinstance(p.value, str)
                ]
                texts += [on_command_line(part) for part in parts]
    assert len(texts) > 20
    for text in texts:
        assert "format=" not in text, text
        assert "profile=" not in text, text
        assert "run.merge()" not in text, text
        assert "run.save()" not in text, text
    assert on_command_line('Use format="compressed" for it.') == "Use --format compressed for it."


# ---- the main job ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The bundled recipe from an empty directory, cut short: (working directory, what was printed)."""
    here = tmp_path_factory.mktemp("empty")
    return here, call(
        "train", "train.steps=12", "train.eval_every=6", "train.batch=4", "data.validation=0.01", cwd=here
    )


def test_the_bundled_recipe(short):
    here, done = short
    run = here / "runs" / "babyllama-lora-1"
    assert done.stderr == ""
    assert sorted(p.name for p in run.iterdir()) == ["adapter", "config.yaml", "loss.png", "metrics.json", "peft"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["base"]["loss"] > 3.0
    assert metrics["final"]["loss"] < metrics["base"]["loss"] - 0.5
    assert metrics["sample_before"] != metrics["sample_after"]
    for part in (
        f"{metrics['base']['loss']:.4f}",
        f"{metrics['final']['loss']:.4f}",
        "tok/s",
        "GiB",
        "s left",
        "ROMEO:",
    ):
        assert part in done.stdout
    assert (run / "loss.png").stat().st_size > 10_000


def test_what_it_says_to_type_next_works(short, here_in, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    here, done = short
    commands = re.findall(r"^  rankshift ((?:inspect|merge|export) .*?)  ", done.stdout, re.M)
    assert [command.split()[0] for command in commands] == ["inspect", "merge", "export"]
    _, shown, _ = here_in(*commands[0].split(), cwd=here)
    assert "lora, rank 16, alpha 32" in shown
    assert "checksums right" in shown
    for command in commands[1:]:
        assert here_in(*command.split(), cwd=here)[0] == 0
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rankshift.train import bundled

    merged = AutoModelForCausalLM.from_pretrained(here / "merged").eval()
    base = AutoModelForCausalLM.from_pretrained(bundled.model_path("babyllama"))
    plain = base(torch.tensor([[1, 5, 6]])).logits
    served = PeftModel.from_pretrained(base, here / "served").eval()
    ids = AutoTokenizer.from_pretrained(here / "merged")("KING:\nWhat", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, served(ids).logits, rtol=0, atol=1e-4)
        assert not torch.allclose(merged(torch.tensor([[1, 5, 6]])).logits, plain, atol=0.1)
    assert "lora, rank 16" in here_in("inspect", here / "served")[1]


def test_merge_replaces_no_model_of_the_user(short, tmp_path, refused, here_in):
    import shutil

    from rankshift.train import bundled

    here, _ = short
    run = here / "runs" / "babyllama-lora-1"
    shutil.copytree(bundled.model_path("babyllama"), tmp_path / "base")
    before = {f.name: f.read_bytes() for f in (tmp_path / "base").iterdir()}
    assert "rankshift did not write" in refused("merge", run, "base", "--model", "base", cwd=tmp_path)
    assert "rankshift did not write" in refused("merge", run, "base", cwd=tmp_path)
    assert {f.name: f.read_bytes() for f in (tmp_path / "base").iterdir()} == before
    for _ in range(2):
        assert here_in("merge", run, "out", "--model", "base", cwd=tmp_path)[0] == 0
    shutil.copytree(tmp_path / "base", tmp_path / "signed")
    shutil.copy(tmp_path / "out" / "rankshift-merged.json", tmp_path / "signed")
    assert "is the base model itself" in refused("merge", run, "signed", "--model", "signed", cwd=tmp_path)


def test_a_damaged_file_is_seen(short, tmp_path, refused):
    import shutil

    here, _ = short
    shutil.copytree(here / "runs", tmp_path / "runs")
    file = tmp_path / "runs/babyllama-lora-1/adapter/adapter.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "is damaged" in refused("inspect", tmp_path / "runs/babyllama-lora-1")


@pytest.fixture(scope="module")
def thin(tmp_path_factory):
    """A run that left a compressed model: its directory, relative to the working directory that comes first."""
    here = tmp_path_factory.mktemp("thin")
    words = ["method=pc-lora", "method.rank=4", "method.bias=match", "name=thin", "train.steps=2", "train.batch=1"]
    call("train", *words, "data.max_length=32", "data.validation=0.001", cwd=here)
    return here, Path("runs/thin")


def test_inspect_knows_every_kind_of_directory(short, thin, tmp_path, here_in, refused, monkeypatch):
    import shutil

    monkeypatch.setenv("COLUMNS", "300")
    here, run = thin
    _, text, _ = here_in("inspect", run, cwd=here)
    assert re.search(r"^compressed model +runs/thin/compressed, \d", text, re.M)
    assert re.search(r"^at the end +lambda 0", text, re.M)
    _, text, _ = here_in("inspect", run / "compressed")
    for part in ("a compressed model written by rankshift", "LlamaForCausalLM", "rank 4", "rs.load_compressed(",
                 "compressed.safetensors", "checksums right"):  # fmt: skip
        assert part in text
    shutil.copytree(here / run / "compressed", tmp_path / "damaged")
    file = tmp_path / "damaged" / "compressed.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "is damaged" in refused("inspect", tmp_path / "damaged")

    from rankshift.train import bundled

    assert here_in("merge", short[0] / "runs/babyllama-lora-1", tmp_path / "plain")[0] == 0
    _, text, _ = here_in("inspect", tmp_path / "plain")
    assert f"merged by rankshift {rs.__version__}" in text
    assert "LlamaForCausalLM" in text
    assert re.search(r"^files +model.safetensors [\d.]+ MiB, \d+ tensors", text, re.M)
    assert "not written by rankshift" in here_in("inspect", bundled.model_path("babyllama"))[1]
    file = tmp_path / "plain" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "cannot be read" in refused("inspect", tmp_path / "plain")
    assert "holds no run" in refused("inspect", tmp_path)


def test_a_model_that_is_whole_has_no_adapter_to_export(thin, tmp_path, refused):
    import shutil

    here, run = thin
    assert "is a compressed model" in refused("merge", run / "compressed", tmp_path / "out", cwd=here)
    assert "--format compressed" in refused("export", run, tmp_path / "out", cwd=here)
    from rankshift.train import bundled

    shutil.copytree(bundled.model_path("babyllama"), tmp_path / "plain")
    assert "is a plain model" in refused("export", tmp_path / "plain", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_loading_a_model_as_a_run_says_how_to_load_it(thin):
    from transformers import AutoModelForCausalLM

    from rankshift.train import bundled

    here, run = thin
    base = AutoModelForCausalLM.from_pretrained(bundled.model_path("babyllama"))
    with pytest.raises(rs.errors.MissingFile, match=r"rs.load_compressed\(.*runs/thin/compressed"):
        rs.load(base, here / run / "compressed")
    with pytest.raises(rs.errors.MissingFile, match="a plain model"):
        rs.load(base, bundled.model_path("babyllama"))


def test_ctrl_c_before_the_first_checkpoint_offers_no_resume(tmp_path, here_in, refused, monkeypatch):
    from rankshift.train import recipe

    def stop(wanted, console):
        (tmp_path / "runs/x/checkpoints").mkdir(parents=True)
        (tmp_path / "runs/x/config.yaml").write_text("model: m\ndata: d\nname: x\n")
        raise recipe.Interrupted(Path("runs/x"), 0)

    monkeypatch.setattr(recipe, "train", stop)
    code, text, _ = here_in("train", cwd=tmp_path)
    assert code == 130
    assert "--resume" not in text
    assert "rankshift train runs/x/config.yaml name=x-again" in text
    assert "nothing to resume from" in refused("train", "--resume", "runs/x")
    assert "nothing to resume from" in here_in("inspect", "runs/x")[1]


def test_ctrl_c_saves_and_resume_goes_on_to_the_same_losses(tmp_path, tiny_llama, here_in, refused):
    (tmp_path / "a.txt").write_text("hello how are you ? fine thanks . two and one is three . " * 200)
    settings = [f"model={tiny_llama}", "data=a.txt", "data.max_length=32", "train.steps=300", "train.eval_every=100"]
    code, text, errors = here_in("train", *settings, "name=whole", cwd=tmp_path)
    assert code == 0, errors
    assert "300 updates" in text
    process = subprocess.Popen(
        [RANKSHIFT, "train", *settings, "name=part"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("60/300"):
            process.send_signal(signal.SIGINT)
            break
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "rankshift train --resume runs/part" in rest
    assert "trainer.train(" not in rest + errors
    assert json.loads((tmp_path / "runs/part/metrics.json").read_text())["status"] == "interrupted"
    assert "runs/part, interrupted" in here_in("inspect", "runs/part")[1]
    assert "is not finished" in refused("merge", "runs/part", "out", cwd=tmp_path)
    code, _, errors = here_in("train", "--resume", "runs/part")
    assert code == 0, errors
    found = [json.loads((tmp_path / "runs" / name / "metrics.json").read_text()) for name in ("whole", "part")]
    losses = [dict(values["train_loss"]) for values in found]
    assert len(losses[0]) - len(losses[1]) in (0, 1)  # the update that the interrupt ended is not logged
    assert losses[1].items() <= losses[0].items()
    for key in ("validation", "base", "sample_after", "status"):
        assert found[0][key] == found[1][key], key
    weights = [(tmp_path / "runs" / name / "adapter/adapter.safetensors").read_bytes() for name in ("whole", "part")]
    assert weights[0] == weights[1]
    assert "it is finished" in refused("train", "--resume", "runs/part", cwd=tmp_path)


@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("2,3", "2"), ("", "")])
def test_one_process_takes_one_gpu(monkeypatch, before, after):
    from rankshift.cli import train

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before) if before is not None else monkeypatch.delenv(
        "CUDA_VISIBLE_DEVICES"
    )
    with pytest.raises(rs.RankshiftError):
        train.run(["nothing=1"], None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # so that undoing takes away what the command set


def test_two_processes_train_one_run(tmp_path):
    """torchrun on a machine without GPU: gradients are averaged, one process writes and speaks."""
    words = ["train", "train.steps=2", "train.batch=1", "data.validation=0.001", "data.max_length=32", "name=two"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "rankshift", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("2 updates in") == 1
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["two"]
    assert (tmp_path / "runs" / "two" / "peft").is_dir()


# ---- a base in fewer bits --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A short run of QLoRA: its working directory."""
    here = tmp_path_factory.mktemp("few")
    (here / "a.txt").write_text("What say you to this, my lord? I say nothing, sir, and mean the same.\n" * 99)
    words = ["model=babyllama", "data=a.txt", "base=nf4", "name=q", "train.steps=4", "train.batch=1"]
    done = call("train", *words, "data.max_length=64", cwd=here)
    assert re.search(r"^base +\d+\.\d [KM]iB, \d+ layers in nf4 \(4\.\d+ bits a weight\)$", done.stdout, re.M)
    assert "gemm_4bit" not in done.stdout + done.stderr
    return here


def test_merge_compares_first(few, tmp_path, here_in, refused, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert "held in nf4" in here_in("inspect", "runs/q", cwd=few)[1]
    code, text, errors = here_in("merge", "runs/q", tmp_path / "onto", cwd=few)
    assert code == 0, errors
    assert "on 2 of the run's own examples" in text
    assert re.search(r"merged onto +dequantised", text)
    assert re.search(r"same most likely class +(99|100)", text)
    said = refused("merge", "runs/q", tmp_path / "few", "--onto", "requantised", cwd=few)
    assert "most of it is lost" in said
    assert "--onto dequantised" in said
    assert not (tmp_path / "few").exists()
    code, text, _ = here_in("merge", "runs/q", tmp_path / "few", "--onto", "requantised", "--lossy", cwd=few)
    assert code == 0
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "few").is_loaded_in_4bit
    assert (tmp_path / "few" / "model.safetensors").stat().st_size < (
        tmp_path / "onto" / "model.safetensors"
    ).stat().st_size

    code, text, _ = here_in("merge", "runs/q", tmp_path / "first", "--onto", "original", cwd=few)
    assert code == 0
    assert re.search(r"merged onto +original", text)


def test_where_the_data_is_gone_a_paragraph_will_do(few, tmp_path, here_in):
    import shutil

    shutil.copytree(few / "runs" / "q" / "adapter", tmp_path / "adapter")
    code, text, errors = here_in("merge", tmp_path / "adapter", tmp_path / "out", "--model", "babyllama")
    assert code == 0, errors
    assert "on a paragraph of text" in text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--onto", "requantized"], "Did you mean 'requantised'"),
        (["--original", "babyllama"], "Leave one out"),
        (["--onto", "original", "--original", "nowhere"], "nowhere"),
    ],
)
def test_merges_that_cannot_be(few, tmp_path, refused, options, match):
    assert match in refused("merge", "runs/q", tmp_path / "out", *options, cwd=few)
    assert not (tmp_path / "out").exists()
