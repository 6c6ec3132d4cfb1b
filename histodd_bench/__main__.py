"""``python -m histodd_bench``, and the ``histodd-bench`` command."""

import os
import sys


def main() -> None:
    """Run the command line and exit; after Ctrl-C without waiting for worker threads, whose work is safe to lose."""
    try:
        from histodd_bench import cli

        code = cli.main()
    except KeyboardInterrupt:  # while modules were still being imported
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 130:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
