"""`python -m runrecovery_service` is the `runrecovery` command."""

from __future__ import annotations

from runrecovery_service.cli import main

if __name__ == "__main__":
    main()
