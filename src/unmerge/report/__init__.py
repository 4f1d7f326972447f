"""One result object to terminal and JSON. Nothing is computed here."""
