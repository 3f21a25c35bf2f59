"""The program of the permission hook (see `permission_hook.py`).

Claude Code calls it before each call of a tool: `python -I -S permission_hook_main.py FOLDER TURN`.
It is a file of its own so that `permission_hook.py` is loaded in its compiled form.
"""

import os
import sys

# Started in isolated mode, Python finds nothing but the standard library.
sys.path.append(os.path.abspath(__file__).rsplit(os.sep, 3)[0])  # noqa: PTH100 - pathlib is heavy

from runrecovery_service.engines.permission_hook import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
