"""The laws of the design, held against every registered method and every engine."""
