"""Pins the processes of all launches of one sweep, and proves that they belong to their launch.

A process is pinned by an open pidfd. It is proved once a marker of its launch was read while that
pidfd was open. Only then is it certain that the marker and the pidfd belong to the same process.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Collection, Mapping

from runrecovery_service.process import procfs
from runrecovery_service.process.launch_tree import LaunchTree, PinnedProcess
from runrecovery_service.process.markers import (
    Identity,
    LaunchMarkers,
    MarkerIndex,
    Member,
    Membership,
    Proof,
    ProtectedMember,
    find_members,
)
from runrecovery_service.process.procfs import Proc


class PinnedTrees:
    """The trees of the launches of one sweep."""

    def __init__(self, launches: Collection[LaunchMarkers]) -> None:
        self._trees = {launch.launch_key: LaunchTree(markers=launch) for launch in launches}
        self._index = MarkerIndex(launches)
        # Scans and the rest of the service need descriptors too. Processes beyond a quarter of the
        # limit are pinned after others have ended.
        self._max_pins = max(8, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
        self._free_pins = self._max_pins

    @property
    def trees(self) -> Collection[LaunchTree]:
        """The trees, one for each launch."""
        return self._trees.values()

    @property
    def keys(self) -> set[int]:
        """The keys of all launches."""
        return set(self._trees)

    @property
    def living(self) -> list[PinnedProcess]:
        """All living processes, except the shims."""
        return [each for tree in self.trees if tree.pinned for each in tree.living]

    @property
    def pinned(self) -> list[PinnedProcess]:
        """All living processes except the shims, then the living shims."""
        shims = (tree.shim for tree in self.trees if tree.pinned)
        return [*self.living, *(shim for shim in shims if shim is not None)]

    @property
    def identities(self) -> dict[Identity, int]:
        """The launch key of every process that was pinned, dead ones included."""
        return {identity: key for key, tree in self._trees.items() for identity in tree.pinned}

    def tree_of(self, member: Member) -> LaunchTree:
        """Return the tree of a member's launch."""
        return self._trees[member.launch_key]

    def is_shim(self, member: Member) -> bool:
        """Return True if the member is the recorded shim of its launch."""
        markers = self.tree_of(member).markers
        return member.proc.identity == (markers.pid, markers.start_ticks)

    def find_direct_member(self, proc: Proc, known: Mapping[Identity, int]) -> Member | None:
        """Return the process as a member if it was pinned before (`known`) or carries a marker.

        Otherwise return None. The descendants of members are found separately.
        """
        key = known.get(proc.identity)
        if key is not None:
            return Member(proc=proc, launch_key=key, proof=Proof.PINNED)
        return self._index.find_member(proc)

    # -- pinning -------------------------------------------------------------------------------

    def count_free_pins(self) -> None:
        """Count how many processes the next scan may pin."""
        self._free_pins = self._max_pins - len(self.pinned)

    def pin(self, member: Member) -> PinnedProcess | None:
        """Open a pidfd; None if the process has ended or no descriptor is free.

        If no descriptor was free, the next scan finds the process again.
        """
        tree = self.tree_of(member)
        if member.proc.identity in tree.pinned:
            return tree.pinned[member.proc.identity]
        if self._free_pins <= 0:
            return None
        try:
            pidfd = os.pidfd_open(member.proc.pid)
        except OSError:  # the process has ended, or no descriptor is left
            return None
        pinned = PinnedProcess(
            member=member,
            run_key=tree.markers.run_key,
            pidfd=pidfd,
            is_shim=self.is_shim(member),
        )
        tree.pinned[member.proc.identity] = pinned
        self._free_pins -= 1
        return pinned

    def unpin(self, pinned: PinnedProcess) -> None:
        """Unpin a process that had no marker when it was read again; note why for the report."""
        tree = self.tree_of(pinned.member)
        pinned.release()
        tree.pinned.pop(pinned.identity, None)
        tree.unproved[pinned.identity] = (
            f"carried a marker ({pinned.member.proof}) when it was found, but not when it was"
            " read again"
        )

    # -- proving -------------------------------------------------------------------------------

    def prove(
        self, pinned: Collection[PinnedProcess], found: Membership, *, protected: frozenset[int]
    ) -> None:
        """Read the markers of newly pinned processes again, and unpin those without one.

        All markers are read before the first signal: once a parent has died, the descent of its
        children can no longer be read.
        """
        fresh = [each for each in pinned if not each.proved]
        if not fresh:
            return
        snapshot = procfs.scan(list(found.members))
        known = {who: key for who, key in self.identities.items() if self._is_proved(who, key)}
        roots = {
            pid: root
            for pid, proc in snapshot.items()
            if (root := self.find_direct_member(proc, known))
        }
        again = find_members(snapshot, roots, protected=protected).members
        for each in fresh:
            member = again.get(each.member.proc.pid)
            if member is not None and _is_same(member, each.member):
                each.member, each.proved = member, True
                self.tree_of(member).unproved.pop(each.identity, None)
            else:
                self.unpin(each)

    def _is_proved(self, identity: Identity, launch_key: int) -> bool:
        return self._trees[launch_key].pinned[identity].proved

    def read_proof(self, pinned: PinnedProcess) -> str | None:
        """Return the marker by which a pinned process belongs to its launch; None if there is none.

        Once a marker was read under this pidfd, the process counts as proved while the pid is still
        its own, and the earlier marker is returned: a process can remove its markers.
        """
        proc = procfs.read_proc(pinned.member.proc.pid)
        if proc is None or proc.identity != pinned.identity:
            return None
        member = self._index.find_member(proc)
        if member is not None and member.launch_key == pinned.member.launch_key:
            pinned.proved = True
            return member.proof.value
        return pinned.member.proof.value if pinned.proved else None

    def note_protected(self, protected: Collection[ProtectedMember]) -> None:
        """Set the protected members that the latest scan found, in place of earlier ones."""
        for tree in self.trees:
            if tree.protected:
                tree.protected = []
        for member in protected:
            self._trees[member.launch_key].protected.append(member)


def _is_same(one: Member, other: Member) -> bool:
    return one.proc.identity == other.proc.identity and one.launch_key == other.launch_key
