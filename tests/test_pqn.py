"""Q-learning from rollouts: its targets, its updates on every path, what it learns, and its resume."""

import chain
import lightning.pytorch as pl
import pytest
import torch
import yaml
from conftest import quiet_trainer
from gymnasium import spaces
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from runs import Dropout, assert_same_run, fit, load
from test_cli import error_line
from test_update import StepCounter

from lightning_dqn import DQN, PQN, DQNDataModule, EpsilonDecay, SoftTargetUpdate
from lightning_dqn.cli import main
from lightning_dqn.variants.rollouts import Rollout

pytestmark = pytest.mark.filterwarnings("ignore")
# 4 environments, 15 iterations of 4 updates an epoch
SMALL = {
    **{"model": PQN, "num_envs": 4, "steps_per_iteration": 5, "updates_per_iteration": 4, "batch_size": 10},
    **{"epoch_env_steps": 300, "every_n_updates": 28},
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-3)


def trained(num_updates, callbacks=(), **options):
    """A module and its trainer after so many updates on CartPole, from seed 0."""
    pl.seed_everything(0)
    data = DQNDataModule(num_envs=4, steps_per_iteration=8, updates_per_iteration=4, batch_size=16)
    model = PQN(data.observation_space, data.action_space, **options)
    trainer = quiet_trainer(
        max_epochs=None, max_steps=num_updates, limit_val_batches=0, callbacks=[EpsilonDecay(), *callbacks]
    )
    trainer.fit(model, data)
    assert trainer.global_step == num_updates
    return model, trainer


def values_of(*rows):
    """A learner whose action values of the observation 0, 1, ... are these rows."""
    table = torch.tensor(rows)
    model = PQN(spaces.Box(0, 9, (1,)), spaces.Discrete(2), td_lambda=0.5)
    model.policy_net.forward = lambda observation: table[observation[:, 0].long()]
    return model


def rollout(discount, ended, index):
    """Two steps of one environment, which pay 1 and 2, through the observations 0, 1 and 2."""
    columns = torch.tensor([[1.0], [2.0]]), torch.tensor(discount), torch.tensor(ended)
    observation = torch.arange(3.0).reshape(3, 1, 1)
    no_mask = torch.ones(3, 1, 0, dtype=torch.bool)
    return Rollout(observation, torch.tensor([[0], [1]]), *columns, no_mask, torch.tensor(index))


def test_minibatches_hold_the_returns_of_their_steps_and_no_value_behind_them():
    model = values_of([0.0, 0.0], [10.0, 4.0], [20.0, 30.0])
    batch = model.prepare_batch(rollout([[0.5], [0.5]], [[False], [False]], [[1, 0], [0, 0], [1, 1]]))
    # R_1 = 2 + .5 * 30 = 17;  R_0 = 1 + .5 * (.5 * 10 + .5 * 17) = 7.75
    assert batch.reward.tolist() == [[17.0, 7.75], [7.75, 7.75], [17.0, 17.0]]
    assert batch.observation[..., 0].tolist() == [[1, 0], [0, 0], [1, 1]]
    assert batch.action.tolist() == [[1, 0], [0, 0], [1, 1]]
    assert not batch.discount.any()
    assert {tuple(part.shape[:2]) for part in batch} == {(3, 2)}


def test_truncation_still_bootstraps_and_termination_does_not():
    model = values_of([0.0, 0.0], [10.0, 4.0], [20.0, 30.0])
    cut = model.prepare_batch(rollout([[0.5], [0.5]], [[True], [False]], [[0]]))
    over = model.prepare_batch(rollout([[0.0], [0.5]], [[True], [False]], [[0]]))
    # 1 + .5 * 10, whatever comes after the cut;  1 + 0
    assert cut.reward.tolist() == [[6.0]]
    assert over.reward.tolist() == [[1.0]]


def test_one_update_takes_half_the_squared_error_of_the_return():
    data = DQNDataModule()
    model = PQN(data.observation_space, data.action_space)
    batch = model.prepare_batch(
        Rollout(
            *(torch.randn(3, 2, 4), torch.tensor([[0, 1], [1, 1]]), torch.randn(2, 2), torch.full((2, 2), 0.9)),
            *(torch.zeros(2, 2, dtype=torch.bool), torch.ones(3, 2, 0, dtype=torch.bool), torch.tensor([[0, 1, 2, 3]])),
        )
    )
    first = type(batch)(*(part[0] for part in batch))
    loss, q_value, td_error, _ = model.td_loss(first, model.policy_net, model.policy_net)
    expected = model(first.observation)[torch.arange(4), first.action]
    torch.testing.assert_close(q_value, expected)
    torch.testing.assert_close(td_error, expected - first.reward)
    torch.testing.assert_close(loss, ((expected - first.reward) ** 2 / 2).mean())


def test_there_is_no_target_net_anywhere(tmp_path):
    model, trainer = trained(8, callbacks=[SoftTargetUpdate()])
    assert model.target_net is None
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert {name.partition(".")[0] for name in content["state_dict"]} == {"policy_net", "epsilon"}
    assert "memory" not in content["DQNDataModule"]["train"]
    size = sum(parameter.numel() for parameter in model.policy_net.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == size


def test_a_trainer_without_callbacks_gets_an_epsilon_schedule_but_no_target_update():
    data = DQNDataModule(num_envs=4, steps_per_iteration=8, batch_size=16)
    trainer = quiet_trainer(callbacks=[], max_steps=2, limit_val_batches=0, max_epochs=None)
    trainer.fit(PQN(data.observation_space, data.action_space, compile=False), data)
    assert [type(each) for each in trainer.callbacks] == [EpsilonDecay]


def test_plain_and_compiled_paths_give_the_same_weights_from_the_same_draws():
    # a limit that all gradients are beyond
    plain, _ = trained(100, compile=False, clip_grad_norm=0.01)
    compiled, _ = trained(100, compile=True, clip_grad_norm=0.01)
    assert plain.update_mode != "compiled"
    assert compiled.update_mode == "compiled"
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(plain.policy_net.output.bias, trained(4, compile=False)[0].policy_net.output.bias)


@pytest.mark.parametrize("limit", [0.1, None])
def test_lightnings_own_calls_and_the_fused_update_give_the_same_weights_bitwise(limit):
    lean, _ = trained(40, compile=False, clip_grad_norm=limit)
    counter = StepCounter()
    watched, _ = trained(40, callbacks=[counter], compile=False, clip_grad_norm=limit)
    assert len(counter.norms) == 40
    for name, value in lean.state_dict().items():
        assert torch.equal(watched.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("compile", "callbacks"), [(False, []), (True, []), (False, [StepCounter()])], ids=["lean", "compiled", "lightning"]
)
def test_a_gradient_is_clipped_by_its_norm(compile, callbacks):
    pl.seed_everything(0)
    start = PQN(DQNDataModule().observation_space, spaces.Discrete(2)).policy_net
    begun = torch.cat([parameter.detach().flatten() for parameter in start.parameters()])
    model, _ = trained(4, callbacks, compile=compile, clip_grad_norm=0.01, optimizer=sgd)
    ended = torch.cat([parameter.detach().flatten() for parameter in model.policy_net.parameters()])
    # 4 steps of lr times the limit, in much the same direction
    assert 3 * 1e-5 < float((ended - begun).norm()) <= 4.1 * 1e-5


def test_one_step_returns_of_random_behaviour_lead_to_the_optimal_values_of_a_chain():
    pl.seed_everything(0)
    data = DQNDataModule(
        **{"env_id": "NumberedChain-v0", "num_envs": 8, "steps_per_iteration": 8, "batch_size": 32},
        **{"updates_per_iteration": 16, "epoch_env_steps": 64 * 150, "gamma": chain.GAMMA},
    )
    model = PQN(
        *(data.observation_space, data.action_space),
        td_lambda=0.0,
        optimizer=lambda parameters: torch.optim.RAdam(parameters, lr=1e-3),
        compile=False,
    )
    quiet_trainer(callbacks=[EpsilonDecay(start=1.0, end=1.0)], limit_val_batches=0).fit(model, data)
    with torch.no_grad():
        assert model(torch.arange(chain.STATES)).numpy() == pytest.approx(chain.best_values(), abs=1e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"vectorization": "sync"}, {"network": Dropout}, {"env_id": "FrozenLake-v1", "num_envs": 2}],
    ids=["vector-form", "one-after-the-other", "dropout", "frozen-lake"],
)
def test_a_run_resumes_from_an_epochs_end_and_from_within_one_bitwise(tmp_path, messages, options):
    options = {**SMALL, **options}
    fit(tmp_path / "whole", **options)
    fit(tmp_path / "resumed", **options, ckpt_path=tmp_path / "whole" / "epoch0.ckpt", seed=77)
    assert_same_run(tmp_path / "whole" / "epoch1.ckpt", tmp_path / "resumed" / "epoch1.ckpt")
    fit(tmp_path / "mid", **options, ckpt_path=tmp_path / "whole" / "mid28.ckpt", seed=78)
    assert_same_run(tmp_path / "whole" / "epoch1.ckpt", tmp_path / "mid" / "epoch1.ckpt")
    reported = [line for line in messages if line.startswith(("Resumed", "Checkpoints hold"))]
    assert len(reported) == 2
    assert all(line.endswith(" env steps.") for line in reported), "nothing that is not exact"


@pytest.mark.faults
def test_a_compiled_run_resumes_compiled(tmp_path):
    options = {**SMALL, "compile": True, "lr": 3e-3}
    fit(tmp_path / "whole", **options)
    fit(tmp_path / "resumed", **options, ckpt_path=tmp_path / "whole" / "epoch0.ckpt", seed=77)
    assert load(tmp_path / "resumed" / "epoch1.ckpt")["compiled"] is True
    assert_same_run(tmp_path / "whole" / "epoch1.ckpt", tmp_path / "resumed" / "epoch1.ckpt")


def test_another_learner_s_checkpoint_is_rejected_by_name(tmp_path):
    once = {**SMALL, "limits": {"max_epochs": 1}}
    fit(tmp_path / "pqn", **once)
    fit(tmp_path / "dqn", **{**once, "model": DQN})
    with pytest.raises(MisconfigurationException, match=r"model=\S+PQN: .*\.DQN;"):
        fit(tmp_path / "other", **SMALL, ckpt_path=tmp_path / "dqn" / "epoch0.ckpt")
    with pytest.raises(MisconfigurationException, match=r"model=\S+\.DQN: .*PQN;"):
        fit(tmp_path / "other", **{**SMALL, "model": DQN}, ckpt_path=tmp_path / "pqn" / "epoch0.ckpt")


WORDS = (
    *("fit", "--model", "PQN", "--model.network.hidden_sizes", "[16]", "--video.episodes", "0"),
    *("--data.num_envs", "4", "--data.steps_per_iteration", "8", "--data.updates_per_iteration", "4"),
    *("--data.batch_size", "16", "--data.epoch_env_steps", "320", "--data.eval_episodes", "2"),
    *("--trainer.logger", "CSVLogger", "--trainer.log_every_n_steps", "5", "--trainer.enable_progress_bar", "false"),
)


@pytest.mark.integration
def test_the_command_line_trains_and_resumes_bitwise(tmp_path, monkeypatch, capfd):
    folders = {}
    for name, epochs in (("whole", "2"), ("part", "1")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        main([*WORDS, "--trainer.max_epochs", epochs])
        [folders[name]] = (tmp_path / name / "runs").glob("*/*")
    assert "80 updates" in capfd.readouterr().out
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    assert_same_run(*(folders[name] / "checkpoints" / "last.ckpt" for name in ("whole", "part")))
    [header, *rows] = (folders["whole"] / "metrics.csv").read_text().splitlines()
    assert {"train/loss", "train/q_value", "train/epsilon", "val/episode_return"} <= set(header.split(","))
    assert len(rows) >= 4
    main(["test", "--ckpt_path", "last", "--data.eval_episodes", "2"])
    assert "test/episode_return" in capfd.readouterr().out


def test_its_own_defaults_are_those_of_the_command_line(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model", "PQN", "--model.optimizer.eps", "1e-5", "--print_config"])
    options = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert options["network"]["init_args"] == {**options["network"]["init_args"], "layer_norm": True}
    assert options["optimizer"]["class_path"] == "torch.optim.RAdam"
    assert options["optimizer"]["init_args"] == {**options["optimizer"]["init_args"], "lr": 2.5e-4, "eps": 1e-5}
    assert (options["clip_grad_norm"], options["td_lambda"]) == (10.0, 0.65)


@pytest.mark.parametrize(
    ("words", "reported"),
    [
        (["--data.n_step", "3"], "data.n_step=3: returns of on-policy models depend on model.td_lambda; use 1"),
        (
            ["--data.batch_size", "33"],
            "data.batch_size=33: a rollout has data.num_envs=4 x data.steps_per_iteration=8 = 32 steps",
        ),
        (
            ["--data.sampler", "lightning_dqn.PrioritizedSampler"],
            "data.sampler=PrioritizedSampler: on-policy models have no replay memory",
        ),
        (["--model.td_lambda", "1.1"], "model.td_lambda=1.1: must be in [0, 1]"),
        (["--model.clip_grad_norm", "0"], "model.clip_grad_norm=0.0: must be positive"),
        (["--model.td_lamda", "1"], "did you mean --model.td_lambda?"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_work_is_rejected_in_a_line_and_leaves_no_folder(tmp_path, monkeypatch, capfd, words, reported):
    monkeypatch.chdir(tmp_path)
    assert reported in error_line(capfd, *WORDS, *words)
    assert not list(tmp_path.glob("runs/*/*"))
