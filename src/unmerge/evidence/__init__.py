"""Evidence: how sure the coefficients are."""
