"""The database: its engine, its tables and their migrations, for everybody who keeps something there."""
