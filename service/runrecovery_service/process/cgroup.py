"""A cgroup of its own for each launch, below one that was delegated to the service. Optional.

It is evidence beside the others: who is in it belongs to the launch, whatever his limits and
environment say. Nothing is signalled through it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROCS = "cgroup.procs"


class CgroupUnusable(Exception):
    """The configured cgroup cannot be used; the text says why."""


@dataclass(frozen=True, slots=True)
class CgroupParent:
    """The delegated cgroup.

    Attributes:
        mount: where cgroup v2 is mounted.
        below: the delegated one as /proc/<pid>/cgroup would show it: `/…`.
    """

    mount: Path
    below: str

    @classmethod
    def open(cls, path: Path) -> CgroupParent:
        """Look at the delegated cgroup, and make it if it is not there but its parent is one.

        Raises:
            CgroupUnusable: it is none, not version 2, or not ours to use.
        """
        try:
            if (path.parent / PROCS).is_file():
                path.mkdir(exist_ok=True)
            if not (path / PROCS).is_file():
                raise CgroupUnusable("is not a cgroup, nor could be made one")
            if not (path / "cgroup.kill").is_file():
                raise CgroupUnusable("is the root of the cgroups, or not of version 2")
            mount = next(above for above in path.parents if not (above.parent / PROCS).is_file())
            probe = path / "probe"
            probe.mkdir(exist_ok=True)
            probe.rmdir()
        except OSError as error:
            raise CgroupUnusable(error.strerror or "cannot be used") from error
        return cls(mount, f"/{path.relative_to(mount)}")

    def make(self, cgroup: str) -> Path:
        """Make the cgroup of one launch, and return the file that takes processes into it.

        Args:
            cgroup: its path below the mount, as the lease names it.

        Raises:
            OSError: it cannot be made.
        """
        folder = self._folder(cgroup)
        folder.mkdir(exist_ok=True)
        return folder / PROCS

    def remove(self, cgroup: str) -> bool:
        """Remove the cgroup of a launch of which nothing is left, and those that the agent made in
        it; False when it could not be: somebody is in it."""
        folder = self._folder(cgroup)
        try:
            below = [path for path in folder.rglob("*") if path.is_dir()]
            for path in sorted(below, key=lambda path: len(path.parts), reverse=True):
                path.rmdir()
            folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        return True

    def _folder(self, cgroup: str) -> Path:
        return self.mount / cgroup.lstrip("/")
