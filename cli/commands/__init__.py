"""One command per file; each calls the verb of its name."""
