"""`python -m lightning_dqn`."""

from lightning_dqn.cli import main

if __name__ == "__main__":
    main()
