"""Forward models of merge methods: plain functions of arrays, exact in the working type."""
