"""``python -m fusion_core``: the command ``fusion-core``."""

from fusion_core.cli import main

if __name__ == "__main__":
    main()
