"""`python -m prefloop` is the command line."""

from prefloop.cli import main

if __name__ == "__main__":
    main()
