"""Lux AI with a fault in the rewards, to see what the curves of a sick training look like."""

from lux_wrapper import ROBOT, LuxVecEnv


class TenTimes(LuxVecEnv):
    """All rewards are ten times too large."""

    def step(self, actions):
        obs, reward, *rest = super().step(actions)
        return obs, 10 * reward, *rest


class UnpaidRobots(LuxVecEnv):
    """Robots are paid nothing."""

    def step(self, actions):
        is_robot = self.kind == ROBOT  # before the step, as the rewards
        obs, reward, *rest = super().step(actions)
        reward[is_robot] = 0
        return obs, reward, *rest
