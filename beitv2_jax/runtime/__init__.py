"""Process start and exit, watchdog, workdir lock, disk checks, checksums and atomic files."""
