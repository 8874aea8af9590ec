"""What a client has spent on privacy: one file in its folder, written before an answer leaves.

A process that is killed between the two has spent without having answered: the count is never too
low. Federations that follow one another in one folder share it. Imports `privacy`.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any

from keras_kd.federated import privacy
from keras_kd.utils import archives, files

FILE = "ledger.json"
_VERSION = 1


class Ledger:
    """The releases of a client.

    Args:
        folder: The client's folder.

    Raises:
        ValueError: If there is a ledger that cannot be read. It is never taken for an empty one.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(folder) / FILE
        self.releases: list[dict[str, Any]] = []
        if not os.path.lexists(self.path):
            return
        try:
            said = json.loads(archives.read_bytes(self.path))
            if said["version"] != _VERSION:
                raise ValueError("it is of another version")
            if not isinstance(said["releases"], list):
                raise ValueError("its releases are no list")
            self.releases = said["releases"]
            for multiplier in self._multipliers():
                # Of what is no number, no epsilon would ever be beyond a limit.
                if not (0 < multiplier < math.inf):
                    raise ValueError(f"a release has the noise multiplier {multiplier}")
            self._noted()
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The ledger `{self.path}` cannot be read ({error}), so that nobody knows what "
                "this client has spent. Put back a copy of it, or give the client another folder "
                "if its rows were never asked about."
            ) from error

    def _multipliers(self) -> list[float]:
        return [float(release["noise_multiplier"]) for release in self.releases]

    def epsilon(self, delta: float) -> float:
        """What all releases have cost together.

        Args:
            delta: In (0, 1).
        """
        return privacy.epsilon(self._multipliers(), delta)

    def _noted(self) -> list[tuple[float, float]]:
        """What all releases had cost when the last one was noted: its epsilon and delta."""
        noted = [(float(r["epsilon"]), float(r["delta"])) for r in self.releases if "epsilon" in r]
        return noted[-1:]

    def require(self, spent: float, delta: float) -> None:
        """Raise where the ledger holds less than was spent: it was edited, or is an old copy.

        Args:
            spent: An epsilon that is known to have been spent.
            delta: The delta that goes with it.

        Raises:
            ValueError: If the releases cost less than that, or than the last one was noted with.
        """
        for cost, at in [(spent, delta), *self._noted()]:
            # Another version of the accountant may prove a little less.
            if cost and not self.epsilon(at) >= 0.99 * cost:
                raise ValueError(
                    f"The ledger `{self.path}` holds {len(self.releases)} releases, which cost "
                    f"epsilon = {self.epsilon(at):.4g} at delta = {at:g}, and {cost:.4g} was "
                    "spent: it was edited, or is an old copy. Put back the one that was there."
                )

    def spend(self, noise: privacy.Gaussian, queries: int, run: int, round_number: int) -> bool:
        """Note a release before it is made, if it is within the limit.

        Args:
            noise: The noise and the limit.
            queries: Rows that are answered.
            run: Number of the federation.
            round_number: Number of the round.

        Returns:
            Whether the release may be made.
        """
        multipliers = [*self._multipliers(), noise.noise_multiplier]
        total = privacy.epsilon(multipliers, noise.delta)
        # So that what is no number is beyond the limit, too.
        if not total <= noise.max_epsilon:
            return False
        self.releases.append(
            {
                "run": run,
                "round": round_number,
                "queries": queries,
                "sensitivity": privacy.sensitivity(queries),
                "noise_multiplier": noise.noise_multiplier,
                "delta": noise.delta,
                "epsilon": total,
            }
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": _VERSION, "releases": self.releases}, indent=1)
        with files.replacing(self.path) as file:
            file.write(text.encode())
        return True
