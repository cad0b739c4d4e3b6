"""``import rankshift`` is light: nothing heavy is loaded before a name is used."""

from __future__ import annotations

import subprocess
import sys
import time

HEAVY = ("torch", "numpy", "transformers", "accelerate", "datasets", "safetensors", "matplotlib", "rich", "yaml")
LIMIT = 0.3  # seconds for the import alone, best of several on a machine that may be busy
_TIMED = """
import sys, time
start = time.perf_counter()
{statement}
print(time.perf_counter() - start, ",".join(m for m in {heavy!r} if m in sys.modules))
"""


def imported(statement: str) -> tuple[float, list[str]]:
    """Seconds that a statement takes in a fresh interpreter, and which heavy modules are loaded after it."""
    code = _TIMED.format(statement=statement, heavy=HEAVY)
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    seconds, _, loaded = out.strip().partition(" ")
    return float(seconds), [name for name in loaded.split(",") if name]


def best_of(statement: str, tries: int = 7) -> float:
    best = float("inf")
    for _ in range(tries):
        best = min(best, imported(statement)[0])
        if best <= LIMIT:
            break
        time.sleep(0.5)
    return best


def test_the_import_is_fast_and_loads_nothing_heavy() -> None:
    assert imported("import rankshift")[1] == []
    assert best_of("import rankshift") <= LIMIT


def test_errors_and_names_come_without_torch() -> None:
    assert imported("import rankshift as rs; rs.__all__; dir(rs); rs.__version__")[1] == []


def test_a_name_that_is_used_loads_what_it_needs() -> None:
    """The counter-test: the measurement sees torch when it is loaded, and its time."""
    seconds, loaded = imported("import rankshift as rs; rs.LoRA")
    assert "torch" in loaded
    assert seconds > LIMIT
    assert "transformers" not in loaded, "a config must not load transformers"


def test_attach_loads_no_transformers() -> None:
    statement = (
        "import rankshift as rs, torch; m = torch.nn.Sequential(torch.nn.Linear(4, 4)); "
        "rs.attach(m, rs.LoRA(rank=2, targets=('0',))).optimizer()"
    )
    assert not {"transformers", "accelerate", "datasets", "matplotlib"} & set(imported(statement)[1])
