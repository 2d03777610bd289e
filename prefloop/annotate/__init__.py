"""`prefloop annotate`: people compare two policies' answers, blind: items, votes on disk, a local server, results."""
