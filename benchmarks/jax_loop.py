"""The reference for speed: the textbook workload as one XLA computation, with all of an iteration in `lax.scan`.

Legend: N environments, U = N updates per iteration, B batch.
"""

import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks.marks import RateMarks
from benchmarks.settings import ADAM_BETAS, ADAM_EPS, ADAMW_DECAY, TEXTBOOK, TEXTBOOK_LAYERS, Job, Result

Params = tuple[tuple[Array, Array], ...]
# columns of a row of the memory: observation, action, reward, terminated, next observation
ROW_WIDTH = 11
# CartPole in SI units, with Euler steps
GRAVITY, CART, POLE, HALF_LENGTH, FORCE, STEP = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
MAX_POSITION, MAX_ANGLE, MAX_STEPS = 2.4, 0.20943951, 500


class Learner(NamedTuple):
    """Both networks and the moments of the optimizer; `updates` is () float32."""

    policy: Params
    target: Params
    mean: Params
    square: Params
    largest: Params
    updates: Array


class Loop(NamedTuple):
    """The state of the loop.

    Attributes:
        learner: networks and optimizer.
        memory: (capacity, ROW_WIDTH) float32.
        steps: () int32 iterations so far.
        observation: (N, 4) float32.
        lengths: (N,) int32 steps of the current episodes.
        episodes: () int32 episodes that ended.
        key: random key of the loop.
    """

    learner: Learner
    memory: Array
    steps: Array
    observation: Array
    lengths: Array
    episodes: Array
    key: Array


def q_values(params: Params, observation: Array) -> Array:
    """(B, 4) observations to (B, 2) action values."""
    x = observation
    for weight, bias in params[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    return x @ params[-1][0] + params[-1][1]


def game_step(state: Array, action: Array) -> tuple[Array, Array]:
    """One step of N carts: (N, 4) states and (N,) actions to (N, 4) states and (N,) whether the pole has fallen."""
    x, v, angle, turn = state.T
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    push = (jnp.where(action == 1, FORCE, -FORCE) + POLE * HALF_LENGTH * turn**2 * sine) / (CART + POLE)
    inertia = HALF_LENGTH * (4 / 3 - POLE * cosine**2 / (CART + POLE))
    turn_rate = (GRAVITY * sine - cosine * push) / inertia
    speed_rate = push - POLE * HALF_LENGTH * turn_rate * cosine / (CART + POLE)
    new = jnp.stack([x + STEP * v, v + STEP * speed_rate, angle + STEP * turn, turn + STEP * turn_rate], axis=1)
    return new, (jnp.abs(new[:, 0]) > MAX_POSITION) | (jnp.abs(new[:, 2]) > MAX_ANGLE)


def loss(policy: Params, target: Params, rows: Array) -> Array:
    """Huber loss of a (B, ROW_WIDTH) minibatch."""
    action, reward, terminated = rows[:, 4], rows[:, 5], rows[:, 6]
    # y = r + gamma (1 - terminated) max_a' Q-(s', a')
    y = reward + TEXTBOOK.gamma * (1 - terminated) * q_values(target, rows[:, 7:]).max(axis=1)
    both = q_values(policy, rows[:, :4])
    error = jnp.abs(jnp.where(action == 1, both[:, 1], both[:, 0]) - y)
    return jnp.where(error < 1, 0.5 * error**2, error - 0.5).mean()


def update(learner: Learner, rows: Array) -> Learner:
    """One gradient, one step of AdamW with amsgrad, one of the target net."""
    gradient = jax.grad(loss)(learner.policy, learner.target, rows)
    each = jax.tree.map
    (beta_1, beta_2), count, rate = ADAM_BETAS, learner.updates + 1, TEXTBOOK.learning_rate
    mean = each(lambda m, g: beta_1 * m + (1 - beta_1) * g, learner.mean, gradient)
    square = each(lambda v, g: beta_2 * v + (1 - beta_2) * g * g, learner.square, gradient)
    largest = each(jnp.maximum, learner.largest, square)
    step, scale = rate / (1 - beta_1**count), 1 / jnp.sqrt(1 - beta_2**count)
    policy = each(
        lambda p, m, v: (1 - rate * ADAMW_DECAY) * p - step * m / (jnp.sqrt(v) * scale + ADAM_EPS),
        learner.policy,
        mean,
        largest,
    )
    target = each(lambda t, p: t + TEXTBOOK.tau * (p - t), learner.target, policy)
    return Learner(policy, target, mean, square, largest, count)


def play(loop: Loop, num_envs: int) -> Loop:
    """Step every environment once, store N rows, and reset environments whose episode has ended."""
    key, chance_key, action_key, start_key = jax.random.split(loop.key, 4)
    passed = loop.steps * num_envs / TEXTBOOK.epsilon_decay
    epsilon = TEXTBOOK.epsilon_end + (TEXTBOOK.epsilon_start - TEXTBOOK.epsilon_end) * jnp.exp(-passed)
    greedy = q_values(loop.learner.policy, loop.observation).argmax(axis=1)
    random = jax.random.randint(action_key, (num_envs,), 0, 2)
    action = jnp.where(jax.random.uniform(chance_key, (num_envs,)) < epsilon, random, greedy)
    following, fallen = game_step(loop.observation, action)
    columns = (action[:, None], jnp.ones((num_envs, 1)), fallen[:, None], following)
    rows = jnp.concatenate([loop.observation, *columns], axis=1, dtype=jnp.float32)
    place = loop.steps * num_envs % TEXTBOOK.memory_capacity
    lengths = loop.lengths + 1
    ended = fallen | (lengths >= MAX_STEPS)
    return loop._replace(
        memory=lax.dynamic_update_slice(loop.memory, rows, (place, 0)),
        steps=loop.steps + 1,
        observation=jnp.where(ended[:, None], starts(start_key, num_envs), following),
        lengths=jnp.where(ended, 0, lengths),
        episodes=loop.episodes + ended.sum(),
        key=key,
    )


def learn(loop: Loop, num_envs: int) -> Loop:
    """N updates, each on B rows drawn with replacement."""
    key, draw_key = jax.random.split(loop.key)
    filled = jnp.minimum(loop.steps * num_envs, TEXTBOOK.memory_capacity)
    picks = jax.random.randint(draw_key, (num_envs, TEXTBOOK.batch_size), 0, filled)
    learner, _ = lax.scan(lambda learner, pick: (update(learner, loop.memory[pick]), None), loop.learner, picks)
    return loop._replace(learner=learner, key=key)


@partial(jax.jit, static_argnames=("num_envs", "iterations", "learns"), donate_argnums=0)
def run(loop: Loop, num_envs: int, iterations: int, learns: bool) -> Loop:
    """Several iterations in one computation."""

    def iteration(loop: Loop, _: None) -> tuple[Loop, None]:
        played = play(loop, num_envs)
        return (learn(played, num_envs) if learns else played), None

    return lax.scan(iteration, loop, None, iterations)[0]


def starts(key: Array, num_envs: int) -> Array:
    """(N, 4) first observations."""
    return jax.random.uniform(key, (num_envs, 4), minval=-0.05, maxval=0.05)


def begin(seed: int, num_envs: int) -> Loop:
    """The initial state, with weights initialized like torch's linear layers."""
    key, start_key, *keys = jax.random.split(jax.random.key(seed, impl="rbg"), 2 + 2 * len(TEXTBOOK_LAYERS))
    policy = []
    for i, (inputs, outputs) in enumerate(TEXTBOOK_LAYERS):
        bound = inputs**-0.5
        weight = jax.random.uniform(keys[2 * i], (inputs, outputs), minval=-bound, maxval=bound)
        policy.append((weight, jax.random.uniform(keys[2 * i + 1], (outputs,), minval=-bound, maxval=bound)))
    params = tuple(policy)
    # separate buffers for the moments, since all are donated
    mean, square, largest = (jax.tree.map(jnp.zeros_like, params) for _ in range(3))
    return Loop(
        learner=Learner(params, jax.tree.map(jnp.copy, params), mean, square, largest, jnp.zeros(())),
        memory=jnp.zeros((TEXTBOOK.memory_capacity, ROW_WIDTH)),
        steps=jnp.zeros((), jnp.int32),
        observation=starts(start_key, num_envs),
        lengths=jnp.zeros(num_envs, jnp.int32),
        episodes=jnp.zeros((), jnp.int32),
        key=key,
    )


def rates(job: Job) -> Result:
    """Env steps/s and updates/s of the textbook work with N environments and N updates per iteration."""
    loop = run(begin(job.seed, job.num_envs), job.num_envs, -(-TEXTBOOK.learning_starts // job.num_envs), False)
    before, marks = int(loop.steps), RateMarks(job.seconds)
    chunk = max(1, 512 // job.num_envs)
    over = False
    while not over:
        loop = run(loop, job.num_envs, chunk, True)
        # reading a value synchronizes
        steps = int(loop.steps)
        over = marks.over(steps * job.num_envs, (steps - before) * job.num_envs)
    result = marks.result(float(q_values(loop.learner.policy, jnp.zeros((1, 4))).max()))
    result["notes"]["mean_episode_length"] = int(loop.steps) * job.num_envs / max(1, int(loop.episodes))
    return result


def startup(job: Job) -> Result:
    """Seconds from the start of the process to the end of the first update, including compilation."""
    loop = run(begin(job.seed, job.num_envs), job.num_envs, -(-TEXTBOOK.learning_starts // job.num_envs), False)
    # reading a value synchronizes
    float(run(loop, job.num_envs, 1, True).learner.updates)
    return {"figures": {"startup_s": time.time() - job.launched_at}, "notes": {}}
