"""The engine of luxai-s2 3.0.1 with its slowest parts replaced; results are bit-identical.

    from luxai_s2_fast import LuxAI_S2  # instead of: from luxai_s2 import LuxAI_S2

The subclass keeps the engine's rules and replaces four parts:

    part of the engine          replacement    why the results are the same
    positions                   Cell           two Python ints add, compare and print like the
                                               elements of an array
    search for a factory's      LichenFactory  a search depends only on the cells that it reads,
    lichen at every step                       so it is repeated once one of them has changed
    np.isin on a team's         Strains        a table answers what np.isin would
    strains at every step
    observation at every step   None           `engine.state.get_obs()` makes one on request
"""

import luxai_s2
import numpy as np
from luxai_s2.factory import Factory
from luxai_s2.map.position import Position

__all__ = ["LuxAI_S2"]

NO_OWNER = 0


class Cell(Position):
    """A position as two Python ints, faster to add, compare and print than a NumPy array."""

    __slots__ = ("x", "y")  # attributes in place of the properties of Position

    def __init__(self, x, y):
        self.x = x
        self.y = y

    @property
    def pos(self):
        """A new array [x, y]; assign to it to move the cell."""
        return np.array([self.x, self.y])

    @pos.setter
    def pos(self, pos):
        self.x, self.y = pos.tolist()

    def __add__(self, step):
        """The cell that is `step`, an int array [2], away."""
        dx, dy = step.tolist()
        return Cell(self.x + dx, self.y + dy)


def read_ground(board, lichen_to_spread):
    """What the search for lichen reads of each cell.

    Args:
        board: a board of the engine with sides of S cells.
        lichen_to_spread: how much lichen a cell needs to spread to its neighbours.

    Returns:
        uint8 array [3, S + 2, S + 2], three maps with a border of zeros one cell wide: is the
        cell free for lichen, does its lichen spread, and whose lichen or factory is there
        (`num_id` + 1, or NO_OWNER).
    """
    ground = np.zeros((3, board.width + 2, board.height + 2), np.uint8)
    free, spreading, owner = ground[:, 1:-1, 1:-1]
    factories = board.factory_occupancy_map
    free[:] = (board.rubble == 0) & (board.ice == 0) & (board.ore == 0) & (factories == -1)
    spreading[:] = board.lichen >= lichen_to_spread
    owner[:] = np.maximum(board.lichen_strains, factories) + 1
    return ground


class LichenFactory(Factory):
    """A factory that searches for its lichen only where the ground has changed."""

    cells_read = None  # set of the cells that the last search read

    def cache_water_info(self, board, env_cfg):
        """Find the cells where lichen would grow, and the lichen connected to the factory.

        Cells are indices into the flat maps of `board.ground`. The engine calls this for every
        factory right after `_handle_recharge_actions`.
        """
        if self.cells_read is not None and self.cells_read.isdisjoint(board.changed_cells):
            return
        free, spreading, owner = (layer.tobytes() for layer in board.ground)
        row = board.height + 2
        own = self.num_id + 1
        centre = (self.pos.x + 1) * row + self.pos.y + 1
        edge = [centre + far + side for far in (-2 * row, 2 * row) for side in (-1, 0, 1)]
        edge += [centre + far + side for far in (-2, 2) for side in (-row, 0, row)]

        growing, connected = set(), set()
        cells_read = set(edge)
        found = [cell for cell in edge if free[cell]]
        known = set(found)
        for cell in found:  # grows during the loop
            has_own_lichen = owner[cell] == own
            beside_others = False
            for neighbour in (cell - row, cell + row, cell - 1, cell + 1):
                cells_read.add(neighbour)
                if owner[neighbour] == NO_OWNER:
                    reached = spreading[cell]
                elif owner[neighbour] == own:
                    reached = has_own_lichen
                else:
                    reached = False
                    beside_others = True
                if reached and free[neighbour] and neighbour not in known:
                    known.add(neighbour)
                    found.append(neighbour)
            position = (cell // row - 1, cell % row - 1)
            if has_own_lichen:
                connected.add(position)
            if has_own_lichen or not beside_others:
                growing.add(position)
        self.grow_lichen_positions = growing
        self.connected_lichen_positions = connected
        self.cells_read = cells_read


class Strains(list):
    """A team's lichen strains; `np.isin(board, strains)` looks each cell up in a table."""

    def __array_function__(self, function, types, args, kwargs):
        if function is not np.isin:
            return function._implementation(*args, **kwargs)  # as with any other list
        board, _ = args
        is_own = np.zeros(max(self, default=0) + 3, bool)  # from strain -1 to one past the last
        is_own[1:-1][self] = True
        return is_own.take(board + 1, mode="clip")


class LuxAI_S2(luxai_s2.LuxAI_S2):
    """The engine made of these parts, with the original's arguments."""

    def step(self, actions):
        """Play a step; once all factories are placed, return None for each observation."""
        state = self.state
        if state.real_env_steps >= 0:
            state.get_obs = lambda: None  # hides the method
        try:
            return super().step(actions)
        finally:
            vars(state).pop("get_obs", None)

    def add_unit(self, *args, **kwargs):
        unit = super().add_unit(*args, **kwargs)
        unit.pos = Cell(*unit.pos.pos.tolist())
        return unit

    def add_factory(self, team, pos):
        team.factory_strains = Strains(team.factory_strains)
        factory = super().add_factory(team, pos)
        if factory is not None:
            factory.pos = Cell(*factory.pos.pos.tolist())
            factory.__class__ = LichenFactory
        return factory

    def _handle_recharge_actions(self, actions_by_type):
        """Also note which cells have changed, because the factories search for lichen next."""
        super()._handle_recharge_actions(actions_by_type)
        board = self.state.board
        ground = read_ground(board, self.env_cfg.MIN_LICHEN_TO_SPREAD)
        before = getattr(board, "ground", ground)
        changed = (ground != before).any(0)
        board.changed_cells = np.flatnonzero(changed).tolist()
        board.ground = ground
