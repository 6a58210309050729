"""What a resumed run takes from the rounds before it, so that its curve is the one of a run that was never cut off.

Where rollouts run ahead of learning (`grpo.async_steps`), those of the next rounds had begun before the last rounds
were learnt: under older versions of the policy, and when less was known of what a prompt costs. They are made again
under those versions, whose adapters are kept for it, and with as many prompts.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ember_ray.config.errors import UserError

if TYPE_CHECKING:
    from ember_ray.model.lora import AdapterUpdate

ADAPTER = "policy_v"
"""Folders of kept adapters beside the learner's state begin with this, and end with the version."""


class Earlier:
    """The rounds that earlier sessions of a run made.

    Args:
        rows: their lines of metrics, the first round's first.
        ahead: rounds that the rollout runs ahead of learning.
        first_version: the policy that the run started from.
        folder: where adapters are kept.
    """

    def __init__(self, rows: Sequence[dict[str, Any]], ahead: int, first_version: int, folder: Path) -> None:
        self._rows, self._ahead, self._first, self._folder = list(rows), ahead, first_version, folder
        self._uncounted = [row for row in self._rows if "generated_tokens" in row]

    @property
    def newest(self) -> int:
        """The policy version after the last of these rounds."""
        return self._version_after(len(self._rows))

    @property
    def last_prompts(self) -> int | None:
        """Prompts of the last round that rolled out, None if none did."""
        return int(self._rows[-1]["prompts"]) if self._rows and "prompts" in self._rows[-1] else None

    def version_for(self, number: int) -> int:
        """The policy version that was to make the candidates of a round, as far as these rounds decide it."""
        return self._version_after(min(number - 1 - self._ahead, len(self._rows)))

    def ended_before(self, number: int) -> list[dict[str, Any]]:
        """The rounds whose rollouts had ended when a round's began; each is given once."""
        ended = [row for row in self._uncounted if row["round"] <= number - 1 - self._ahead]
        self._uncounted = self._uncounted[len(ended) :]
        return ended

    def adapter(self, version: int) -> AdapterUpdate:
        """A kept adapter.

        Raises:
            UserError: it is not there any more.
        """
        from ember_ray.model.lora import load_peft_adapter

        folder = kept(self._folder, version)
        if not folder.is_dir():
            raise UserError(
                f"resume: '{folder}', the policy of rollouts that were under way, is missing; start a new run"
            )
        return load_peft_adapter(folder, version)

    def _version_after(self, number: int) -> int:
        return int(self._rows[number - 1]["policy_version"]) if number >= 1 else self._first


def kept(folder: Path, version: int) -> Path:
    """Where a version's adapter is kept beside the learner's state."""
    return folder / f"{ADAPTER}{version}"


def forget_before(folder: Path, version: int) -> None:
    """Removes adapters of older versions."""
    for path in folder.glob(f"{ADAPTER}*"):
        if int(path.name.removeprefix(ADAPTER)) < version:
            shutil.rmtree(path)
