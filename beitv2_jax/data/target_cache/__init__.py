"""The cache of teacher features and code ids: encodings, manifest, shards, leases, reader and writer."""
