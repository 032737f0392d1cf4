"""What README.md shows, run as it stands."""
