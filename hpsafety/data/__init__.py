"""From files to micro-batches: record schemas, readers, chat templates, prompt groups and batching."""
