"""Which layers read one input, by the names that models give them."""

from __future__ import annotations

from collections.abc import Iterable

_ROWS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
_ACROSS = ("cross", "encoder_attn", "EncDecAttention")
"""What the name of attention to another sequence has in it: its queries read another input than keys and values."""


def kin(names: Iterable[str]) -> list[list[str]]:
    """Those of some layers that probably read one input, in the order in which models call them; two or more each."""
    known, found = set(names), []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in known):
        prefix, across = f"{parent}." if parent else "", any(word in parent for word in _ACROSS)
        for row in _ROWS:
            here = [prefix + leaf for leaf in (row[1:] if across and len(row) == 3 else row) if prefix + leaf in known]
            if len(here) > 1:
                found.append(here)
    return found
