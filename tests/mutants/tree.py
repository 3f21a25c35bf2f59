"""A copy of the working tree in which a mutant can be tried."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
SERVICE: Final = Path("service/runrecovery_service")
TIMEOUT_S: Final = 300.0
"""A mutant whose test takes longer counts as caught: it hangs."""
FAILED: Final = 1
"""The exit code of pytest when a test has failed. Others mean that no test was run."""


class CopiedTree:
    """A copy of every file of the working tree, with an interpreter that imports from it."""

    def __init__(self, folder: Path) -> None:
        """Copy the tree into a folder, which must exist."""
        self._folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self._python = self._make_interpreter()

    def _make_interpreter(self) -> Path:
        """Make a virtual environment with this one's packages, but with the code of the copy."""
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", str(self._folder / ".venv")], check=True
        )
        python = self._folder / ".venv/bin/python"
        packages = next((self._folder / ".venv/lib").glob("python*/site-packages"))
        sources = [self._folder / "service", self._folder / "client"]
        # The line with the import comes last: it adds the packages and their own .pth files, of
        # which those of the editable installations name folders that are found after the copy's.
        lines = [*map(str, sources), f"import site; site.addsitedir({_packages()!r})"]
        (packages / "copied_tree.pth").write_text("\n".join(lines) + "\n", "utf-8")
        for script in Path(sys.executable).parent.iterdir():
            target = self._folder / ".venv/bin" / script.name
            if not target.exists() and script.is_file() and script.read_bytes()[:2] == b"#!":
                _, _, rest = script.read_bytes().partition(b"\n")
                target.write_bytes(b"#!" + bytes(python) + b"\n" + rest)
                target.chmod(0o755)
        return python

    @contextmanager
    def changed(self, file: str, old: str, new: str) -> Iterator[None]:
        """Replace a text that stands in a file of the service once, inside the context."""
        path = self._folder / SERVICE / file
        text = path.read_text("utf-8")
        if text.count(old) != 1:
            raise LookupError(f"{file} has {text.count(old)} times: {old}")
        path.write_text(text.replace(old, new), "utf-8")
        try:
            yield
        finally:
            path.write_text(text, "utf-8")

    def run_tests(self, *tests: str) -> tuple[int, str]:
        """Run tests until the first fails; return pytest's exit code and its output."""
        command = [str(self._python), "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        try:
            done = subprocess.run(
                command,
                check=False,
                cwd=self._folder,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired:
            return FAILED, f"no end within {TIMEOUT_S:g} s"
        return done.returncode, done.stdout + done.stderr


def _packages() -> str:
    return sysconfig.get_paths()["purelib"]
