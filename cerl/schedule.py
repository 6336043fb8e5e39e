"""The Schedule: what is due when, in agent steps of one seed and iterations of the loop.

An iteration is one agent step of each of the E environments of a seed. Everything is counted in
iterations, never in data, so that all seeds stay together and a run that goes on asks the same
questions. Pure numbers: nothing here knows what an update or an evaluation is.
"""

from typing import NamedTuple

from cerl.config import Config


class Schedule(NamedTuple):
    """When things are due."""

    steps: int  # agent steps of one seed, the length of the run
    envs: int  # E, environments of a seed: agent steps of an iteration
    start: int  # agent steps before the first update
    update_every: int  # agent steps from one round of updates to the next
    updates: int  # updates in a round
    policy_every: int  # updates from one with all stages to the next
    refresh: int  # updates from one refresh of the acting carry to the next; 0: never

    @classmethod
    def of(cls, config: Config, *, envs: int) -> "Schedule":
        """The schedule of a config whose environments are so many a seed."""
        own = config.schedule
        return cls(
            steps=own.steps,
            envs=envs,
            start=config.replay.start,
            update_every=own.update_every,
            updates=own.updates,
            policy_every=config.agent.policy_every,
            refresh=config.encoder.updates_between_refreshes,
        )

    @property
    def last(self) -> int:
        """The number of the last iteration."""
        return -(-self.steps // self.envs)

    def steps_at(self, iteration: int) -> int:
        """Agent steps of one seed after so many iterations, at most those of the run."""
        return min(iteration * self.envs, self.steps)

    def updates_by(self, steps: int) -> int:
        """Updates that are due once `steps` agent steps of one seed are done."""
        return max(0, steps - self.start) // self.update_every * self.updates

    def updates_in(self, iteration: int, *, since: int) -> range:
        """Numbers of the updates that an iteration makes; the first update has number 1.

        Args: iteration, 1 for the first; since, agent steps of one seed from which on updates are
              made: a replay that was not saved fills up first, and what is due then is left out.
        """
        before = (iteration - 1) * self.envs
        if before < since:
            return range(0)
        return range(self.updates_by(before) + 1, self.updates_by(before + self.envs) + 1)

    def all_stages(self, update: int) -> bool:
        """Whether every stage of an update is due, or only the first (the critics' of SAC)."""
        return update % self.policy_every == 0

    def refreshes(self, iteration: int) -> bool:
        """Whether what acting remembers is recomputed after an iteration."""
        if not self.refresh:
            return False
        steps = iteration * self.envs
        before, after = self.updates_by(steps - self.envs), self.updates_by(steps)
        return after // self.refresh > before // self.refresh

    def passes(self, iteration: int, every: int) -> bool:
        """Whether an iteration passes a multiple of `every` agent steps of one seed."""
        steps = iteration * self.envs
        return steps // every > (steps - self.envs) // every

    def due(self, iteration: int, every: int) -> bool:
        """`passes`, and always at the last iteration."""
        return iteration == self.last or self.passes(iteration, every)
