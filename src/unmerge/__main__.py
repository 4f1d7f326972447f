"""``python -m unmerge``."""

from unmerge.cli import main

if __name__ == "__main__":
    main()
