"""Steps that were taken inside subspaces, put into their weights: op.py runs, reference.py says what it means."""

from rankshift.ops.projected_fold.op import Fold, fits, fold_

__all__ = ["Fold", "fits", "fold_"]
