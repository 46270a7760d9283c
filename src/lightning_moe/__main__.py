"""``python -m lightning_moe`` is ``lightning-moe``."""

from lightning_moe.cli import main

if __name__ == "__main__":
    main()
