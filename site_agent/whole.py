"""The whole run, put together from what its coordinators say: here their fragments become those of the run.

With one coordinator all of it is as that one said it. With several, a site belongs to the first: its orders hold,
but that training starts, and the run is finished, once all say so, and that each speaks for its own rounds.
"""

from __future__ import annotations

from collections.abc import Sequence

from shared.fragments import Fragment, Layout
from shared.protocol import AwaitedRound, Joined, Orders
from shared.sharding import Slice, home, interleave
from site_agent.branch import Branch, Home
from site_agent.contribution import Address


def whole_orders(told: Sequence[Orders]) -> Orders:
    """The orders of all coordinators, in their order, as one."""
    return told[0].model_copy(
        update={
            "started": all(orders.started for orders in told),
            "finished": all(orders.finished for orders in told),
            "awaited": _whole_rounds([orders.awaited for orders in told]),
            "closing": _whole_rounds([orders.closing for orders in told]),
        }
    )


def _whole_rounds(told: Sequence[Sequence[AwaitedRound]]) -> list[AwaitedRound]:
    return [
        each.model_copy(update={"fragment": Slice(index, len(told)).whole(each.fragment)})
        for index, rounds in enumerate(told)
        for each in rounds
    ]


def whole_joined(told: Sequence[Joined]) -> Joined:
    """The answers of all coordinators to this site's join, in their order, as one. The run goes by all of their ids:
    where one of them is restored from a mirror, a part of the run is at an earlier time, and the run is another."""
    return told[0].model_copy(
        update={
            "run": "+".join(joined.run for joined in told),
            "lineage": "+".join(joined.lineage for joined in told),
            "layout": interleave([joined.layout for joined in told]),
            "fragments": interleave([joined.fragments for joined in told]),
            "orders": whole_orders([joined.orders for joined in told]),
        }
    )


def homes_of(branches: Sequence[Branch], joined: Joined) -> list[Home]:
    """Where each fragment of the whole run is at home."""
    homes = []
    for p, fragment in enumerate(Layout.from_wire(joined.layout).fragments):
        coordinator, number = home(p, len(branches))
        branch = branches[coordinator]
        homes.append(Home(branch, Address(branch.joined.run, Fragment(number, fragment.tensors))))
    return homes
