"""People compare two policies' answers, blind: items, votes on disk, a local server with its page, results."""
