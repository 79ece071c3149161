"""From vectors to rankings: storage, export, search engines, runs, measures and negatives."""
