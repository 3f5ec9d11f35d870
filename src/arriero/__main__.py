"""`python -m arriero` and `torchrun ... -m arriero`."""

from arriero.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
