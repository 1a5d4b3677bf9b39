"""A rank's seat: its team, the device groups of it, and the process groups through which they talk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from shared.fragments import Fragment
from site_agent.core.mixture import Group
from site_agent.training.exchange import Exchange
from site_agent.training.replica import Part, parts_of, whole
from site_agent.training.team import ALONE, Team


@dataclass(frozen=True)
class Seat:
    """`groups` are the team's, by its ranks, and `mine` is this rank's; the first one has the head, and with it the
    fragments' snapshots and error feedback. `collective` is of this rank's group, None where it is one; `exchange`
    None where there is one group."""

    team: Team = ALONE
    groups: tuple[Group, ...] = (Group("alone", (0,)),)
    mine: int = 0
    collective: dist.ProcessGroup | None = None
    exchange: Exchange | None = None

    @property
    def first(self) -> bool:
        """Whether this rank's group has the fragments' state."""
        return self.mine == 0

    def parts(self, fragment: Fragment) -> list[Part]:
        """Which part of a fragment each rank of the team has."""
        if self.team.alone:
            return [whole(fragment)]
        holders = self.groups[0].ranks
        dealt = dict(zip(holders, parts_of(fragment, len(holders)), strict=True))
        return [dealt.get(rank, Part(0, 0, ())) for rank in range(self.team.size)]


SINGLE = Seat()


def take_seat(team: Team, groups: Sequence[Group], backend: str) -> Seat:
    """This rank's seat in its team, whose device groups these are. `backend` is the collective library of its own
    device. Collective over the team."""
    if team.group is None:
        return SINGLE
    mine = next(index for index, group in enumerate(groups) if team.rank in group.ranks)
    global_rank = {rank: dist.get_global_rank(team.group, rank) for rank in range(team.size)}

    def among(ranks: Sequence[int], library: str) -> dist.ProcessGroup:
        # Only its members take part: another make's library is not there to be asked.
        made = dist.new_group([global_rank[rank] for rank in ranks], backend=library, use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        return made

    # Torch tells groups apart by how many each process has made: everyone makes two, if only with itself.
    members, own = groups[mine].ranks, [team.rank]
    leads = len(groups) > 1 and team.rank == members[0]
    leaders = among([group.ranks[0] for group in groups] if leads else own, "gloo")
    collective = among(members, backend) if len(members) > 1 else among(own, "gloo")
    together = collective if len(members) > 1 else None
    exchange = Exchange(leaders if leads else None, together, first=mine == 0) if len(groups) > 1 else None
    return Seat(team, tuple(groups), mine, together, exchange)
