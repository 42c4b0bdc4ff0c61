"""`python -m manylora`."""

from manylora.cli import main

if __name__ == "__main__":
    main()
