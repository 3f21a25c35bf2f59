"""The `runrecovery` command, also as `python -m runrecovery_service`."""

from __future__ import annotations

import sys
from typing import NoReturn

from runrecovery_service import early_signals


def main() -> NoReturn:
    """Run the command line (`cli.main`). Handle signals first, because the imports take long."""
    early_signals.exit_at_once(serves=sys.argv[1:2] == ["serve"])
    from runrecovery_service.cli import main as command  # noqa: PLC0415 - see above

    command()


if __name__ == "__main__":
    main()
