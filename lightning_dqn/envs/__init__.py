"""Makes environments from their ids; see `making`, and `atari` for the games."""

from lightning_dqn.envs.making import EnvSettings as EnvSettings
from lightning_dqn.envs.making import EnvWrapper as EnvWrapper
from lightning_dqn.envs.making import Vectorization as Vectorization
from lightning_dqn.envs.making import find_spec as find_spec
from lightning_dqn.envs.making import halves_of_step as halves_of_step
from lightning_dqn.envs.making import make_env as make_env
from lightning_dqn.envs.making import make_vector_env as make_vector_env
from lightning_dqn.envs.single import SingleVectorEnv as SingleVectorEnv
