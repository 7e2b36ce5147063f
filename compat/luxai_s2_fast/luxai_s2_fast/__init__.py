"""The engine of luxai-s2 3.0.1 with some slow parts done faster, and the same results to the last bit.

    from luxai_s2_fast import LuxAI_S2  # instead of: from luxai_s2 import LuxAI_S2

The rules stay the engine's own. What this subclass replaces is beside them:

    part of the engine                now            why nothing comes out differently
    a position, an array of two       Cell           two Python ints add, compare and print as those of the array do
    a factory's search for the cells  LichenFactory  which cells are found does not depend on the order of the search;
    of its lichen, one by one                        and it is left out only where all that it reads is as before:
                                                     free ground, lichen that spreads, factories, strains
    np.isin on a team's strains       Strains        a table has an entry for each question that np.isin would answer
    an observation after every step   none is made   `step` returns None in its place once all factories are placed;
                                                     `engine.state.get_obs()` makes one at any time
"""

import luxai_s2
import numpy as np
from luxai_s2.factory import Factory
from luxai_s2.map.position import Position

__all__ = ["LuxAI_S2"]


# ------------------------------------------------------------------------------------------------------
# Bitboards: maps of truth values as integers, a bit for each cell. One operation on such a number costs less
# than a tenth of one on an array. A column of zeros follows each row, where shifts past the edge end up.
# ------------------------------------------------------------------------------------------------------


def bitboards(maps):
    """A list of integers from a sequence of bool arrays [size, size]."""
    size = len(maps[0])
    cells = np.zeros((len(maps), size, size + 1), bool)
    for row, cells_of_map in zip(cells, maps):
        row[:, :-1] = cells_of_map
    packed = np.packbits(cells.reshape(len(maps), -1), 1, "little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def neighbours(bits, size):
    """The cells beside those of `bits`; beyond the board's edge too, so let a map of the cells allowed follow."""
    return bits << 1 | bits >> 1 | bits << size + 1 | bits >> size + 1


def cells_of(bits, size):
    """Set of the (x, y) in `bits`."""
    cells = np.frombuffer(bits.to_bytes(size * (size + 1) // 8 + 1, "little"), np.uint8)
    x, y = np.divmod(np.flatnonzero(np.unpackbits(cells, bitorder="little")), size + 1)
    return frozenset(zip(x.tolist(), y.tolist()))


# ------------------------------------------------------------------------------------------------------
# The parts
# ------------------------------------------------------------------------------------------------------


class Cell(Position):
    """A position as two Python ints, which are added, compared and printed faster than an array."""

    __slots__ = ("x", "y")

    @property
    def pos(self):
        """A new array [x, y]; setting it sets both."""
        return np.array([self.x, self.y])

    @pos.setter
    def pos(self, pos):
        self.x, self.y = map(int, pos)

    def __add__(self, other):
        dx, dy = np.asarray(other.pos if isinstance(other, Position) else other).tolist()
        cell = Cell.__new__(Cell)
        cell.x, cell.y = self.x + dx, self.y + dy
        return cell


class Strains(list):
    """A team's strains. At every step the engine asks np.isin which lichen is theirs, which a table answers faster."""

    def __array_function__(self, function, types, args, kwargs):
        if function is np.isin and len(args) == 2 and args[1] is self and not kwargs:
            strains = args[0]
            if type(strains) is np.ndarray and strains.dtype == np.int64 and strains.ndim:
                table = np.zeros(max(self, default=0) + 3, bool)  # from strain -1, no lichen, to one beyond these
                table[[strain + 1 for strain in self]] = True
                return table.take(strains + 1, mode="clip")
        return function._implementation(*args, **kwargs)  # what NumPy does with any other list


class LichenFactory(Factory):
    """A factory that finds the cells of its lichen with a few operations on whole boards.

    `board.ground` says what the search reads: None outside of the engine's searches, () where nothing has changed
    since the last ones, or bitboards (free ground, lichen, lichen that spreads, factories, {strain: its lichen}).
    """

    found = None  # bitboards of the last search: cells to grow on, connected cells

    def cache_water_info(self, board, env_cfg):
        """As the original: a search from the 12 cells at the factory's edge, but a whole ring at a time."""
        ground = getattr(board, "ground", None)
        if ground is None:
            board.searched = self.found = None
            return super().cache_water_info(board, env_cfg)
        if ground == ():
            return
        free, lichen, spreading, occupied, strains = ground
        size, own = board.width, strains[self.num_id]
        area = (7 | 7 << size + 1 | 7 << 2 * size + 2) << (self.pos.x - 1) * (size + 1) + self.pos.y - 1
        ring = found = neighbours(area, size) & ~area & free
        while ring:  # on to free ground from where enough grows, and from cell to cell of the own strain
            ring = neighbours(ring & spreading, size) & ~lichen | neighbours(ring & own, size) & own
            ring &= free & ~found
            found |= ring
        # Nothing new grows beside lichen of another strain or beside another factory.
        beside_others = neighbours(lichen & ~own | occupied & ~area, size)
        found = found & (~beside_others | own), found & own
        if found != self.found:  # mostly they are the same for many steps
            self.grow_lichen_positions, self.connected_lichen_positions = (cells_of(bits, size) for bits in found)
            self.found = found


class LuxAI_S2(luxai_s2.LuxAI_S2):
    """The engine made of these parts; all arguments are the original's."""

    def step(self, actions):
        """As the original, but with None for each observation, unless factories are still being placed."""
        state = self.state
        if state.real_env_steps >= 0:
            state.get_obs = lambda: None  # hides the method
        try:
            return super().step(actions)
        finally:
            vars(state).pop("get_obs", None)

    def add_unit(self, *args, **kwargs):
        unit = super().add_unit(*args, **kwargs)
        unit.pos = Cell(unit.pos.pos)
        return unit

    def add_factory(self, team, pos):
        team.factory_strains = Strains(team.factory_strains)
        factory = super().add_factory(team, pos)
        if factory is not None:
            factory.__class__, factory.pos = LichenFactory, Cell(factory.pos.pos)
        return factory

    def _handle_recharge_actions(self, actions_by_type):
        """Right after this the engine lets every factory look for its lichen, and then come the waterings."""
        super()._handle_recharge_actions(actions_by_type)
        board, strains = self.state.board, self.state.board.lichen_strains.astype(np.int16)
        occupied = board.factory_occupancy_map != -1
        free = (board.rubble == 0) & ~occupied & (board.ice == 0) & (board.ore == 0)
        spreading = board.lichen >= self.env_cfg.MIN_LICHEN_TO_SPREAD
        searched, board.ground = [cells.tobytes() for cells in (free, spreading, occupied, strains)], ()
        if searched != getattr(board, "searched", None):
            ids = [factory.num_id for factories in self.state.factories.values() for factory in factories.values()]
            bits = bitboards([free, strains != -1, spreading, occupied, *(strains == num_id for num_id in ids)])
            board.searched, board.ground = searched, (*bits[:4], dict(zip(ids, bits[4:])))

    def _handle_factory_water_actions(self, actions_by_type):
        self.state.board.ground = None
        super()._handle_factory_water_actions(actions_by_type)
