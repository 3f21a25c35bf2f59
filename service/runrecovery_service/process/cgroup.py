"""A cgroup for each launch, below one that was delegated to the service. Optional.

The cgroup is one more marker: a process in it belongs to the launch, whatever its limits and its
environment are. No process is signalled through its cgroup.
"""

from __future__ import annotations

from pathlib import Path

from runrecovery_service.lazy_dataclass import dataclass

PROCS = "cgroup.procs"


class CgroupUnusable(Exception):
    """The configured cgroup cannot be used. The text is the reason."""


@dataclass(frozen=True, slots=True)
class CgroupParent:
    """The delegated cgroup.

    Attributes:
        mount: the folder where cgroup v2 is mounted.
        below: the path of the delegated cgroup as in /proc/<pid>/cgroup: `/…`.
    """

    mount: Path
    below: str

    @classmethod
    def open(cls, path: Path) -> CgroupParent:
        """Return the delegated cgroup. Create it if only its parent exists.

        Raises:
            CgroupUnusable: the folder is no cgroup of version 2, or this user cannot use it.
        """
        try:
            if (path.parent / PROCS).is_file():
                path.mkdir(exist_ok=True)
            if not (path / PROCS).is_file():
                raise CgroupUnusable("is not a cgroup, and its parent is not one either")
            if not (path / "cgroup.kill").is_file():
                raise CgroupUnusable("is the root cgroup or not of version 2")
            mount = next(above for above in path.parents if not (above.parent / PROCS).is_file())
            probe = path / "probe"
            probe.mkdir(exist_ok=True)
            probe.rmdir()
        except OSError as error:
            raise CgroupUnusable(error.strerror or "cannot be used") from error
        return cls(mount, f"/{path.relative_to(mount)}")

    def make(self, cgroup: str) -> Path:
        """Create the cgroup of one launch and return the file that moves processes into it.

        Args:
            cgroup: the path of the cgroup below the mount, as in the launch record.

        Raises:
            OSError: the cgroup cannot be created.
        """
        folder = self._folder(cgroup)
        folder.mkdir(exist_ok=True)
        return folder / PROCS

    def remove(self, cgroup: str) -> bool:
        """Remove the cgroup of an ended launch and all cgroups below it.

        Return False if that failed because a process is in one of them.
        """
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
