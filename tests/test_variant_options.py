"""The arguments of each variant: what its help lists, and what it rejects."""

import re

import pytest
from gymnasium import spaces

from lightning_dqn import C51, IQN, PQN, QRDQN
from lightning_dqn.cli import main

# what every model takes
COMMON = "observation_space action_space network optimizer lr_scheduler clip_grad_norm compile \
normalize_observations reward_scale"
OF_DQN = f"{COMMON} clip_grad_value double boltzmann_temperature"
SOFT = "munchausen munchausen_temperature"
OPTIONS = {
    "DQN": f"{OF_DQN} {SOFT} loss",
    "C51": f"{OF_DQN} num_atoms v_min v_max",
    "QRDQN": f"{OF_DQN} {SOFT} num_quantiles kappa",
    "IQN": f"{OF_DQN} {SOFT} num_quantiles num_target_quantiles num_policy_quantiles num_cosines kappa",
    "PQN": f"{COMMON} td_lambda",
}


@pytest.mark.parametrize("model", OPTIONS)
def test_help_of_a_model_lists_each_of_its_options_with_an_explanation(model, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--model.help", f"lightning_dqn.{model}"])
    assert ended.value.code == 0
    entries = re.split(r"\n  --model\.", capsys.readouterr().out)[1:]
    listed = {entry.split()[0]: " ".join(entry.split()) for entry in entries}
    assert {name for name in listed if not name.endswith(".help")} == set(OPTIONS[model].split())
    for name in OPTIONS[model].split():
        explanation = listed[name].partition("(")[0].split()
        assert len(explanation) >= 4, listed[name]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (C51, f"{SOFT} loss"),
        (QRDQN, "loss"),
        (IQN, "loss"),
        (PQN, f"{SOFT} loss clip_grad_value double boltzmann_temperature"),
    ],
)
def test_a_variant_rejects_options_that_have_no_meaning_for_it(make, names):
    for name in [*names.split(), "nonsense"]:
        with pytest.raises(TypeError, match=f"'{name}'"):
            make(spaces.Box(0, 1, (2,)), spaces.Discrete(2), **{name: 1})
