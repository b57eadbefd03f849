"""``python -m llc_fast.cli``: the same as ``llc-fast``."""

from llc_fast.cli.app import main

if __name__ == "__main__":
    main()
