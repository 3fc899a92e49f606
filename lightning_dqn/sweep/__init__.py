"""Searches for hyperparameters: `python -m lightning_dqn.sweep` reads W&B's sweep file and lets Optuna choose."""
