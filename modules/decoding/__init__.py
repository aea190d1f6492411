"""The speculative loop: propose, verify, accept, commit."""
