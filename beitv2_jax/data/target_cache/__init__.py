"""The store of teacher features and code ids: encodings, card, shards, claims, reader and writer."""
