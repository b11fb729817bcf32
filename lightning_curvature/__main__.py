"""`python -m lightning_curvature`: the same as the console script."""

from lightning_curvature.cli import main

if __name__ == "__main__":
    main()
