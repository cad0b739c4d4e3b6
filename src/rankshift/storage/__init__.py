"""One weight format per file, each a ``core.base.Base``. The dense one, the format models come in, is in core."""
