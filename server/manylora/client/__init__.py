"""One HTTP client of our own server, for the command line and the lifecycle."""
