"""Floor 0: torch only, knows no paper."""
