"""The Schedule: which updates, refreshes, logs and evaluations are due at which iteration.

An iteration of the training loop is one agent step of each of the E environments of a seed.
Everything depends on the number of the iteration only, never on data such as ends of episodes. So
all seeds stay in step, and a resumed run has the same schedule.
"""

from typing import NamedTuple

from cerl.config import Config


class Schedule(NamedTuple):
    """When things are due. Agent steps are those of one seed."""

    steps: int  # length of the run, agent steps
    envs: int  # E, environments of a seed, and so the agent steps of one iteration
    start: int  # agent steps before the first update
    update_every: int  # agent steps from one round of updates to the next
    updates: int  # updates in a round
    policy_every: int  # every such update has all stages, the others only the first
    refresh: int  # updates from one refresh of the carry to the next; 0: never
    keep: tuple[int, ...] = ()  # agent steps whose checkpoints are kept for good
    keep_every: int = 0  # agent steps from one such checkpoint to the next; 0: only those of `keep`
    forked: int = 0  # the iteration that a fork goes on from; 0: the run is no fork

    @classmethod
    def of(cls, config: Config, *, envs: int) -> "Schedule":
        """The schedule of a config. Args: envs, E."""
        own = config.schedule
        return cls(
            steps=own.steps,
            envs=envs,
            start=config.replay.start,
            update_every=own.update_every,
            updates=own.updates,
            policy_every=config.agent.policy_every,
            refresh=config.encoder.updates_between_refreshes,
            keep=config.log.keep,
            keep_every=config.log.keep_every,
            forked=-(-config.origin.forked_at // envs),
        )

    @property
    def last(self) -> int:
        """The number of the last iteration."""
        return -(-self.steps // self.envs)

    def steps_at(self, iteration: int) -> int:
        """Agent steps of one seed after `iteration` iterations, at most those of the run."""
        return min(iteration * self.envs, self.steps)

    def updates_by(self, steps: int) -> int:
        """How many updates are due by the time that `steps` agent steps of one seed are done."""
        return max(0, steps - self.start) // self.update_every * self.updates

    def updates_in(self, iteration: int, *, since: int) -> range:
        """Numbers of the updates that an iteration makes; the first update has number 1.

        Args: iteration, 1 for the first; since, agent steps of one seed before which no updates are
              made: a resumed run whose replay was not saved refills it first and skips the updates
              that are due meanwhile.
        """
        before = (iteration - 1) * self.envs
        if before < since:
            return range(0)
        return range(self.updates_by(before) + 1, self.updates_by(before + self.envs) + 1)

    def all_stages(self, update: int) -> bool:
        """Whether an update has all its stages, or only the first (with SAC: the critics)."""
        return update % self.policy_every == 0

    def refreshes(self, iteration: int) -> bool:
        """Whether the carry is refreshed (recomputed from replay) after an iteration."""
        if not self.refresh:
            return False
        steps = iteration * self.envs
        before, after = self.updates_by(steps - self.envs), self.updates_by(steps)
        return after // self.refresh > before // self.refresh

    def passes(self, iteration: int, every: int) -> bool:
        """Whether an iteration reaches or passes a multiple of `every` agent steps of one seed."""
        steps = iteration * self.envs
        return steps // every > (steps - self.envs) // every

    def keeps(self, iteration: int) -> bool:
        """Whether the checkpoint of an iteration is kept for good: it is the first to reach an
        agent step of `keep` or a multiple of `keep_every`."""
        after = iteration * self.envs
        named = any(after - self.envs < step <= after for step in self.keep)
        return named or (self.keep_every > 0 and self.passes(iteration, self.keep_every))

    @property
    def kept(self) -> int:
        """The number of checkpoints of the whole run that are kept for good."""
        named = {-(-step // self.envs) for step in self.keep}
        apart = [at for at in named if not (self.keep_every and self.passes(at, self.keep_every))]
        if not self.keep_every:
            return len(apart)
        # With a large E one iteration may pass several multiples.
        return min(self.last * self.envs // self.keep_every, self.last) + len(apart)

    def evaluates(self, iteration: int, every: int) -> bool:
        """Whether an evaluation is due: every `every` agent steps, at the end, and where a fork
        begins, so that its curve begins there."""
        return self.due(iteration, every) or 0 < iteration == self.forked

    def due(self, iteration: int, every: int) -> bool:
        """Whether something that happens every `every` agent steps, and at the end, is due."""
        return iteration == self.last or self.passes(iteration, every)
