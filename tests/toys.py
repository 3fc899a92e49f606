"""The way of a state through a checkpoint."""

import io

import torch


def through_a_checkpoint(state):
    """What a state is after `torch.save` and a safe load."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def stateless(choose):
    """A policy without a state, of a function of observations, generator and, where there is one, action mask."""

    def policy(observation, state, first, rng=None, action_mask=None):
        masks = () if action_mask is None else (action_mask,)
        return choose(observation, rng, *masks), None

    return policy
