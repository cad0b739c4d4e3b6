"""`rankshift inspect`: what a directory holds, read from its files; no model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rankshift.core.config import plain
from rankshift.core.errors import CorruptFile, MissingFile, beside
from rankshift.io import checkpoint
from rankshift.io.atomic import COMPRESSED, MODEL, SIGN
from rankshift.io.checkpoint import MANIFEST

PEFT_CONFIG = "adapter_config.json"


def show(directory: Path) -> None:
    """Print what is there, after checking sizes and checksums."""
    console = Console()
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows(directory):
        table.add_row(name, text)
    console.print(table, highlight=False, markup=False)


def rows(directory: Path) -> list[tuple[str, str]]:
    """(what, value) lines about a run, a native directory, a PEFT adapter, a compressed or a plain model.

    Raises:
        MissingFile, CorruptFile: it is none of these, or a file is not what it should be.
    """
    if not directory.is_dir():
        hint = beside(directory, directories=True) or "Name a directory that is there."
        raise MissingFile(f"There is no directory {directory}. {hint}")
    if (directory / MANIFEST).is_file():
        return _native(directory)
    if (directory / PEFT_CONFIG).is_file():
        return _peft(directory)
    if COMPRESSED.at(directory):
        return _compressed(directory)
    if MODEL.at(directory):
        return _model(directory)
    if (directory / "config.yaml").is_file():
        return _run(directory)
    raise MissingFile(f"{directory} holds no run, checkpoint, adapter or model. Name one that rankshift or PEFT wrote.")


def _run(directory: Path) -> list[tuple[str, str]]:
    from rankshift.train.report import read_metrics

    metrics = read_metrics(directory)
    status = metrics.get("status", "unknown")
    lines = [("run", f"{directory}, {status}")]
    if status != "finished":
        if any((directory / "checkpoints").glob("checkpoint-*/trainer_state.json")):
            lines.append(("go on with", f"rankshift train --resume {directory}"))
        else:
            lines.append(("checkpoints", "none, so there is nothing to resume from"))
    base, final = metrics.get("base") or {}, metrics.get("final") or {}
    for name in final:
        if name != "tokens":
            old = f"{base[name]:.4f} → " if isinstance(base.get(name), float) else ""
            lines.append((f"validation {name.replace('_', ' ')}", f"{old}{final[name]:.4f}"))
    if (directory / "adapter").is_dir():
        lines += _native(directory / "adapter")
    if metrics.get("method"):
        told = {key: value for key, value in metrics["method"].items() if value is not None and key != "name"}
        if told:
            said = [f"{key.replace('_', ' ')} {_short(value)}" for key, value in told.items()]
            lines.append(("at the end", ", ".join(said)))
    for name, words in (("peft", "PEFT adapter"), ("model", "plain model"), ("compressed", "compressed model")):
        if (directory / name).is_dir():
            lines.append((words, f"{directory / name}, {_size(_total(directory / name))}"))
    return lines


def _native(directory: Path) -> list[tuple[str, str]]:
    manifest = checkpoint.inspect(directory)
    run, base = manifest["run"], manifest["base"]
    lines = [("directory", f"{directory}, written by rankshift {manifest.get('rankshift')}")]
    held = run.get("storage")
    kinds = [held["kind"]] if held else sorted({p["storage"] for p in base["prints"].values() if "storage" in p})
    words = f", held in {' and '.join(kinds)}" if kinds else ""
    lines.append(("base", f"{base.get('name') or 'without a name'} ({base['class']}){words}"))
    for name, adapter in run["adapters"].items():
        lines.append(("adapter", name + ("" if name in run["active"] else " (not active)")))
        lines.append(("method", method_words(adapter["method"])))
        lines.append(("layers", _ranks(adapter["ranks"])))
    if run.get("subspaces"):
        lines.append(("projected", _ranks(run["subspaces"])))
    lines.append(("updates", f"{run['step']:,}" + (f" of {run['total_steps']:,}" if run["total_steps"] else "")))
    if len(run["phases"]) > 1:
        lines.append(("phases", ", ".join(_phases(run["phases"]))))
    if run["changed"]:
        lines.append(("base changed", f"{len(run['changed'])} weights"))
    sizes = ", ".join(f"{name} {_size(entry['size'])}" for name, entry in manifest["files"].items())
    lines.append(("files", f"{sizes}: complete, checksums right"))
    return lines


def _compressed(directory: Path) -> list[tuple[str, str]]:
    from rankshift.io import compressed

    manifest = compressed.inspect(directory)
    sizes = ", ".join(f"{name} {_size(entry['size'])}" for name, entry in manifest["files"].items())
    ranks = {name: entry["rank"] for name, entry in manifest["layers"].items()}
    return [
        ("directory", f"{directory}, a compressed model written by rankshift {manifest.get('rankshift')}"),
        ("model", f"{manifest['class']}, stands without its base"),
        ("layers", f"{_ranks(ranks)}, two thin ones each"),
        ("load it", f'rs.load_compressed("{directory}")'),
        ("files", f"{sizes}: complete, checksums right"),
    ]


def _model(directory: Path) -> list[tuple[str, str]]:
    config, signed = _json(directory / "config.json"), (directory / SIGN).is_file()
    kind = (config.get("architectures") or [config.get("model_type") or "without a config.json"])[0]
    sign = _json(directory / SIGN)
    author = f"merged by rankshift {sign.get('rankshift', '')}".rstrip() if signed else "not written by rankshift"
    lines = [("directory", f"{directory}, a plain model, {author}"), ("model", str(kind))]
    index = _json(directory / "model.safetensors.index.json")
    wanted = sorted(set(index.get("weight_map", {}).values()))
    for name in wanted:
        if not (directory / name).is_file():
            raise MissingFile(f"{directory / name} is not there, but the index names it. Copy the whole directory.")
    weights = sorted(f for f in directory.iterdir() if any(f.match(pattern) for pattern in MODEL.markers))
    count = 0
    for file in weights:
        count += len(_shapes(file)) if file.suffix == ".safetensors" else 0
    tensors = f", {count} tensors" if count else ""
    return [*lines, ("files", f"{', '.join(f'{f.name} {_size(f.stat().st_size)}' for f in weights)}{tensors}")]


def _json(file: Path) -> dict[str, Any]:
    """A JSON mapping; empty if there is no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CorruptFile(f"{file} is not JSON: {error}. Copy it again.") from error
    if not isinstance(found, dict):
        raise CorruptFile(f"{file} holds {type(found).__name__} instead of a mapping. Copy it again.")
    return found


def _shapes(file: Path) -> dict[str, list[int]]:
    """The shape of every tensor of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CorruptFile(f"{file} cannot be read: {error}. Copy it again.") from error


def method_words(method: dict[str, Any]) -> str:
    """A method with what differs from its defaults: "lora, rank 8, init pissa"."""
    from rankshift.methods import from_dict, methods

    name = method["method"]
    if name not in methods():
        return ", ".join(f"{key} {value}" for key, value in method.items())
    default = plain(type(from_dict(method))())
    parts = [name]
    for key, value in method.items():
        if key != "method" and (key in ("rank", "alpha") or default[key] != value):
            parts.append(f"{key} {_short(value)}")
    return ", ".join(parts)


def _short(value: Any) -> str:
    """A setting: of a method its name and settings, of a mapping how much is in it."""
    if isinstance(value, dict) and "method" in value:
        return f"({method_words(value)})"
    if isinstance(value, dict):
        return f"of {len(value)} layers"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _phases(saved: list[dict[str, Any]]) -> list[str]:
    """ "PreLoRA joint from 10" of each."""
    from rankshift.core.phase import Phase, labels
    from rankshift.methods import methods

    names = [phase["method"]["method"] for phase in saved]
    if methods().keys() >= set(names):
        names = labels([Phase.from_mapping(phase) for phase in saved])
    return [f"{name} from {phase['start']}" for name, phase in zip(names, saved, strict=True)]


def _ranks(ranks: dict[str, int]) -> str:
    values = sorted(set(ranks.values()) - {0})
    if not values:
        return f"{len(ranks)}" if ranks else "none: trained in place"
    return f"{len(ranks)}, rank {values[0]}" + (f" to {values[-1]}" if len(values) > 1 else "")


def _peft(directory: Path) -> list[tuple[str, str]]:
    config = _json(directory / PEFT_CONFIG)
    alpha = f", alpha {config['lora_alpha']}" if "lora_alpha" in config else ""  # VeRA has none
    lines = [
        ("directory", f"{directory}, in PEFT's format"),
        ("base", str(config.get("base_model_name_or_path") or "without a name")),
        ("method", f"{str(config.get('peft_type')).lower()}, rank {config.get('r')}{alpha}"),
    ]
    weights = directory / "adapter_model.safetensors"
    if not weights.is_file():
        if (directory / "adapter_model.bin").is_file():
            return [*lines, ("files", f"adapter_model.bin {_size((directory / 'adapter_model.bin').stat().st_size)}")]
        raise MissingFile(f"{weights} is not there. Copy the whole directory.")
    shapes = _shapes(weights)
    ends = ("lora_A.weight", "lora_embedding_A", "vera_lambda_d")
    ranks = {name: shape[0] for name, shape in shapes.items() if name.endswith(ends)}
    if ranks:
        lines.append(("layers", _ranks(ranks)))
    lines.append(("files", f"{weights.name} {_size(weights.stat().st_size)}, {len(shapes)} tensors: complete"))
    return lines


def _total(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
