"""The store of teacher features and code ids: encodings, manifest, shards, leases, reader and writer."""
