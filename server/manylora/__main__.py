"""`python -m manylora`."""

from manylora.cli.main import main

if __name__ == "__main__":
    main()
