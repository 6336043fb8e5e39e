"""Device-resident games of the user's own, named by `module:function`: it returns the rules.

    # my_games.py
    def corridor(*, length: int = 10) -> Game:
        return Game(reset=..., step=..., observe=..., draws=0, reset_draws=1, ...)

    cerl train game/ddqn --env.name my_games:corridor --env.kwargs length=20

`own_game("my_games:corridor", {"length": 20})` imports the module, calls the function, and plays a
few steps on the CPU to check that the rules keep the contract of `Game`. So a mistake gives a
sentence at the start of a run, instead of an error of the compiler or the GPU later.
"""

import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cerl.envs.host import nearest
from cerl.envs.resident import Game
from cerl.envs.task_module import keyword_arguments, unknown_argument
from cerl.own_code import cause, import_module

_GAMES, _STEPS = 3, 8  # how many games a check plays side by side, and for how many steps
_TYPES = (torch.bool, torch.uint8, torch.float32)  # types of observations that networks can read


def own_game(name: str, arguments: Mapping[str, Any]) -> Game:
    """The rules that a function of the user's own returns, after `check_game`.

    Args:    name, `module:function`; the module is looked for in the current folder, then among the
             installed packages. arguments are given to the function by name.
    Raises:  ValueError on a name without a module, or a function or an argument that does not
             exist; ImportError where the module or a package that it needs is missing; RuntimeError
             where the module or the function fails, or the rules break the contract of `Game`.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(
            f"env.name: expected module:function, the function returning the rules of a game, got "
            f"{name!r}"
        )
    module = import_module(module_name, key="env.name")
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise ValueError(
            f"env.name: module {module_name} has no function {function_name!r}"
            f"{nearest(function_name, functions)}"
        )
    if wrong := unknown_argument(arguments, keyword_arguments(function), title=name):
        raise ValueError(wrong)
    try:
        game: Any = function(**arguments)
    except Exception as error:
        raise RuntimeError(
            f"env.name: {name} failed ({cause(error)}); env.kwargs gives "
            f"{dict(arguments) or 'none'}"
        ) from error
    check_game(game, name=name)
    return game


def check_game(game: Any, *, name: str) -> None:
    """Plays a few games and compares what the rules return with the contract of `Game`.

    It also plays them once on tensors that have a shape but hold no data (torch's "meta" device):
    rules that look at the data in a tensor, or that make a tensor on another device than that of
    their arguments, fail there as they would in a compiled step on a GPU.

    Args:    name of the game in error messages.
    Raises:  RuntimeError that says what is expected and what was found.
    """
    if not isinstance(game, Game):
        raise _broken(name, "a cerl.envs.resident.Game", game)
    counts = (game.draws, game.reset_draws, game.components, *game.observation)
    whole = all(type(count) is int and count >= 0 for count in counts)
    if not whole or not game.observation or 0 in game.observation:
        raise _broken(name, "draws, reset_draws, components, observation of whole numbers", counts)
    if game.dtype not in _TYPES:
        raise _broken(name, f"observations of {', '.join(map(str, _TYPES))}", game.dtype)
    if bool(game.actions) == bool(game.components):
        raise _broken(name, "either action ids or components", (game.actions, game.components))
    generator = torch.Generator().manual_seed(0)
    resets = torch.rand(_GAMES, game.reset_draws, generator=generator)
    uniforms = torch.rand(_STEPS, _GAMES, game.draws, generator=generator)
    actions = _actions(game, generator)
    played = _play(game, resets, actions, uniforms, name=name)
    _equal(played, _play(game, resets, actions, uniforms, name=name), name, "are played again")
    alone = _play(game, resets[1:2], actions[:, 1:2], uniforms[:, 1:2], name=name)
    _equal([values[1:2] for values in played], alone, name, "are played without the others")
    try:
        _play(game, *(values.to("meta") for values in (resets, actions, uniforms)), name=name)
    except Exception as error:
        raise RuntimeError(
            f"env.name: the rules of {name} fail on tensors without data ({cause(error)}); no "
            "shape and no Python branch may depend on the data in a tensor, and new tensors belong "
            "on the device of the arguments (device=u.device)"
        ) from error


def _actions(game: Game, generator: torch.Generator) -> Tensor:
    """Random actions as the rules are given them, [steps, G] int64 or [steps, G, A] float32."""
    if game.components:
        return 2 * torch.rand(_STEPS, _GAMES, game.components, generator=generator) - 1
    chosen = torch.randint(len(game.actions), (_STEPS, _GAMES), generator=generator)
    return torch.tensor(game.actions)[chosen]


def _play(
    game: Game, resets: Tensor, actions: Tensor, uniforms: Tensor, *, name: str
) -> list[Tensor]:
    """Plays all steps from a reset on; games that are over are stepped on, as `Game` allows.

    Args:    resets [G, reset_draws]; actions [steps, G] or [steps, G, A]; uniforms [steps, G,
             draws].
    Returns: the tensors [G, ...] of all steps: fields of the state, observation, reward, terminal.
    Raises:  RuntimeError where the rules fail or break the contract.
    """
    games = len(resets)
    state = _called(game.reset, resets, name=name, rule="reset")
    fields = state if isinstance(state, tuple) and hasattr(state, "_fields") else ()
    if not fields or not all(
        isinstance(field, Tensor) and field.shape[:1] == (games,) for field in fields
    ):
        raise _broken(name, f"reset to return a NamedTuple of tensors [{games}, ...]", state)
    layout = _layout(state)
    seen: list[Tensor] = []
    for action, u in zip(actions, uniforms, strict=True):
        before = [field.clone() for field in state]
        result = _called(game.step, state, action, u, name=name, rule="step")
        if not isinstance(result, tuple) or len(result) != 3:
            raise _broken(name, "step to return (state, reward, terminal)", result)
        if state[0].device.type != "meta":
            _unchanged(before, state, name)
        state, reward, terminal = result
        if _layout(state) != layout:
            raise _broken(name, f"step to return a state like that of reset, {layout}", state)
        obs = _called(game.observe, state, name=name, rule="observe")
        for what, value, shape, dtype in (
            ("a reward", reward, (games,), torch.float32),
            ("a terminal", terminal, (games,), torch.bool),
            ("an observation", obs, (games, *game.observation), game.dtype),
        ):
            if not isinstance(value, Tensor) or (tuple(value.shape), value.dtype) != (shape, dtype):
                raise _broken(name, f"{what} {list(shape)} of {dtype}", value)
        seen += [*state, obs, reward, terminal]
    return seen


def _unchanged(before: list[Tensor], state: Any, name: str) -> None:
    """Raises: RuntimeError if a step wrote into the state that it was given."""
    for old, field, key in zip(before, state, state._fields, strict=True):
        if not torch.equal(old.nan_to_num(), field.nan_to_num()):
            raise RuntimeError(
                f"env.name: a step of {name} changed the field {key} of the state that it was "
                "given; expected pure functions, which return a new state"
            )


def _called(function: Callable[..., Any], *arguments: Any, name: str, rule: str) -> Any:
    """Calls a rule. Returns: what it returns. Raises: RuntimeError naming the rule if it fails."""
    try:
        return function(*arguments)
    except Exception as error:
        raise RuntimeError(f"env.name: {rule} of {name} failed ({cause(error)})") from error


def _layout(value: Any) -> str:
    """Names, shapes and types of a value that a rule returned, for comparisons and messages."""
    if isinstance(value, Tensor):
        return f"{list(value.shape)} of {value.dtype}"
    if isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        parts = (f"{name}: {_layout(part)}" for name, part in zip(names, value, strict=True))
        return f"{type(value).__name__}({', '.join(parts)})"
    return reprlib.repr(value)


def _equal(ours: list[Tensor], theirs: list[Tensor], name: str, when: str) -> None:
    """Raises: RuntimeError unless all tensors are equal, floats up to rounding.

    For another number of games a CPU may use other instructions, which round otherwise.

    Args: when, the end of the message's sentence "... when the same games".
    """
    for one, other in zip(ours, theirs, strict=True):
        close = one.is_floating_point() and torch.allclose(
            one, other, rtol=1e-4, atol=1e-6, equal_nan=True
        )
        if not close and not torch.equal(one, other):
            raise RuntimeError(
                f"env.name: the rules of {name} give other numbers when the same games {when}; "
                "expected pure functions that draw from u alone and keep games apart"
            )


def _broken(name: str, expected: str, got: Any) -> RuntimeError:
    """The error to raise for rules that break the contract of `Game`."""
    return RuntimeError(f"env.name: expected of {name} {expected}, got {_layout(got)}")
