"""Runs the demo: ``python -m optax_globalclip``."""

from ._demo import main

if __name__ == "__main__":
    main()
