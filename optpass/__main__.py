"""``python -m optpass``: the command line."""

from optpass.cli.main import main

if __name__ == "__main__":
    main()
