"""Fast forms of a method's equation, each beside the reference it is held to. One operation per folder."""
