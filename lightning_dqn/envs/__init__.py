"""Makes environments from their ids (`factory`), with the Atari protocol in `atari`."""

from lightning_dqn.envs.factory import EnvSettings as EnvSettings
from lightning_dqn.envs.factory import EnvWrapper as EnvWrapper
from lightning_dqn.envs.factory import Vectorization as Vectorization
from lightning_dqn.envs.factory import async_step_pair as async_step_pair
from lightning_dqn.envs.factory import find_spec as find_spec
from lightning_dqn.envs.factory import make_env as make_env
from lightning_dqn.envs.factory import make_vector_env as make_vector_env
from lightning_dqn.envs.single import SingleVectorEnv as SingleVectorEnv
