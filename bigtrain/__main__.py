"""``python -m bigtrain train``, ``torchrun -m bigtrain train``: the command ``bigtrain``."""

from bigtrain.cli import main

if __name__ == "__main__":
    main()
