"""Waiting for Ray with a time limit, and turning Ray's errors back into ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any


class StageLost(RuntimeError):
    """A stage process died, hung or lost its peer: a fresh pipeline can go on from here."""


class ActorLost(RuntimeError):
    """An actor that the run cannot go on without died or does not answer."""


class UpdateLost(ActorLost):
    """The actor that was to make an update was lost before it had; whoever was to publish it is well."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something; its type's name if there is none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def cause_of(error: BaseException) -> BaseException:
    """The exception that the remote method raised, out of Ray's wrapping; anything else as it is."""
    from ray.exceptions import RayTaskError

    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) and error.cause is not error:
        error = error.cause
    return error


def as_stage_error(stage: int, error: BaseException) -> BaseException:
    """What an error of a stage's call means: `StageLost` if a fresh pipeline may help, else the error itself.

    A ValueError (a missing model, a prompt that is too long, ...) would come again, so it is never a loss.
    """
    from ray.exceptions import GetTimeoutError, RayActorError, RayError

    cause = cause_of(error)
    if isinstance(cause, RayActorError):
        return StageLost(f"stage {stage} died")
    if isinstance(cause, GetTimeoutError):
        return StageLost(f"stage {stage} did not answer in time")
    if isinstance(cause, RayError | RuntimeError | OSError) and not isinstance(cause, StageLost | ValueError):
        return StageLost(f"stage {stage} failed: {first_line(cause)}")
    return cause


def wait(
    ref: Any,
    what: str,
    limit_s: float,
    on_tick: Callable[[], None] | None = None,
    every_s: float = 0.25,
) -> Any:
    """The value of an object ref, or a clear error.

    Args:
        what: the call in words, for the error ("the coordinator's rollout").
        limit_s: seconds to wait at most.
        on_tick: called about every ``every_s`` seconds while waiting; what it raises ends the wait.

    Raises:
        ActorLost: the actor died, or the limit is over.
        BaseException: what the remote method raised, as itself.
    """
    import ray
    from ray.exceptions import RayActorError

    end = time.monotonic() + limit_s
    while True:
        left = end - time.monotonic()
        ready, _ = ray.wait([ref], timeout=max(0.0, min(left, every_s if on_tick else left)))
        if ready:
            break
        if left <= 0:
            raise ActorLost(f"{what} did not end within {limit_s:g} s")
        if on_tick:
            on_tick()
    try:
        return ray.get(ref, timeout=60)
    except RayActorError as error:
        raise ActorLost(f"{what} was cut off, its process died: {first_line(cause_of(error))}") from error
    except Exception as error:
        cause = cause_of(error)
        if cause is error:
            raise
        raise cause from error


def kill_all(handles: Sequence[Any], limit_s: float = 10.0) -> None:
    """Kills actors and waits until Ray knows that they are dead (so that their names are free again)."""
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError

    for handle in handles:
        ray.kill(handle, no_restart=True)
    end = time.monotonic() + limit_s
    for handle in handles:
        try:
            ray.get(handle.__ray_terminate__.remote(), timeout=max(0.1, end - time.monotonic()))
        except (RayActorError, GetTimeoutError):
            continue
