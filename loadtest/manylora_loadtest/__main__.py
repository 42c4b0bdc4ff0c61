"""`python -m manylora_loadtest`."""

from manylora_loadtest.cli import main

if __name__ == "__main__":
    main()
