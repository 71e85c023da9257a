"""Which nodes work may go to: decisions over what the nodes have, made without asking them.

A node is a mapping of Ray's resource names (`CPU`, `GPU`, `memory`, and names of the user's own) to amounts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Literal, TypeVar

from cluster.errors import ResourceError

T = TypeVar("T")
Placement = Literal["pack", "spread", "strict_pack", "strict_spread"]


def room(node: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """How many tasks that want so much fit a node at once.

    Example:
        >>> room({"CPU": 4, "disk": 0.3}, {"CPU": 1, "disk": 0.1})
        3
    """
    shares = [node.get(name, 0.0) / amount for name, amount in wanted.items() if amount > 0]
    return int(min(shares, default=0.0) + 1e-9)


def fits(nodes: Sequence[Mapping[str, float]], wanted: Mapping[str, float], count: int, placement: Placement) -> bool:
    """Whether so many workers fit the nodes under a placement: the strict ones on one node, or on one each."""
    rooms = [room(node, wanted) for node in nodes]
    if placement == "strict_pack":
        return max(rooms, default=0) >= count
    if placement == "strict_spread":
        return sum(one > 0 for one in rooms) >= count
    return sum(rooms) >= count


def refuse_unfit(
    nodes: Sequence[Mapping[str, float]], wanted: Mapping[str, float], count: int, placement: Placement
) -> None:
    """Refuse training workers that would wait for ever.

    Raises:
        ResourceError: they do not fit; says what they need and what there is.
    """
    if fits(nodes, wanted, count, placement):
        return
    total = {name: sum(node.get(name, 0.0) for node in nodes) for name in wanted}
    short = [name for name, amount in wanted.items() if total[name] < count * amount]
    if short:
        needs = ", ".join(f"{count * wanted[name]:g} {_plural(name)}" for name in short)
        has = ", ".join(f"{total[name]:g}" for name in short)
        raise ResourceError(
            f"start {count} training workers: they need {needs}, the cluster has {has}. Lower finetune.num_workers or "
            "finetune.cpus_per_worker, or add nodes."
        )
    rooms = ", ".join(str(room(node, wanted)) for node in nodes)
    raise ResourceError(
        f"start {count} training workers with finetune.placement {placement!r}: of {_shown(wanted)} each, the "
        f"{len(nodes)} node(s) hold {rooms}. Set finetune.placement to 'spread' or 'pack', or num_workers lower."
    )


def _plural(name: str) -> str:
    return f"{name}s" if name in ("CPU", "GPU") else name


def _shown(wanted: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in wanted.items())


class Waiting(Generic[T]):
    """Units that wait for a node: the emptiest node is served next, and takes the first unit whose input it has.

    So no node idles while there is work, and a unit goes away from its input only where the node that has it is full.

    Args:
        items: the units, in order.
        near: the node that a unit's input lies on; any other text where nobody knows. Asked once per unit, and only
            where there is a choice. None leaves them in order.

    Example:
        >>> waiting = Waiting(["a1", "a2", "b1"], near=lambda unit: unit[0])
        >>> waiting.take({"a": 2, "b": 2}), waiting.take({"a": 1, "b": 2}), waiting.take({"a": 1, "b": 1})
        (('a1', 'a'), ('b1', 'b'), ('a2', 'a'))
    """

    def __init__(self, items: Sequence[T], near: Callable[[T], str] | None) -> None:
        self._items, self._near = list(items), near
        self._homes: list[str] | None = None

    def __len__(self) -> int:
        return len(self._items)

    def take(self, rooms: Mapping[str, int]) -> tuple[T, str]:
        """The next unit and its node, '' for any node.

        Args:
            rooms: how many more units each node takes.
        """
        if len(rooms) < 2 or max(rooms.values()) <= 0:
            return self._pop(0), ""
        node = max(rooms, key=rooms.__getitem__)
        return self._pop(self._for(node, rooms)), node

    def _for(self, node: str, rooms: Mapping[str, int]) -> int:
        """The first unit whose input the node has, else the first that no other node with room has, else the first."""
        if self._near is None:
            return 0
        if self._homes is None:
            self._homes = [self._near(item) for item in self._items]
        own = next((index for index, home in enumerate(self._homes) if home == node), None)
        if own is None:
            own = next((index for index, home in enumerate(self._homes) if rooms.get(home, 0) <= 0), 0)
        return own

    def put_back(self, item: T) -> None:
        """A unit that was lost is the next in order."""
        self._items.insert(0, item)
        if self._homes is not None:
            self._homes.insert(0, "")

    def _pop(self, index: int) -> T:
        if self._homes is not None:
            self._homes.pop(index)
        return self._items.pop(index)
