"""``python -m rankshift``, and with it ``torchrun --nproc-per-node 8 -m rankshift train …``."""

from rankshift.cli import main

if __name__ == "__main__":
    main()
