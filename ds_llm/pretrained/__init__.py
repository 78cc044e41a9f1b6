"""Models from disk and back: where they lie, loading, adapters, saving."""
