"""Process start and exit, watchdog, workdir lock, disk checks, checksums, atomic files and paths of buckets."""
