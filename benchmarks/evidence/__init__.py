"""The evidence on real merges: who is accused, who is missed, and whether the stated errors are the counted ones.

``python -m benchmarks evidence [PART ...] [--folder DIR] [--limit N] [--page FILE]``: see
`benchmarks.evidence.command`.
"""
