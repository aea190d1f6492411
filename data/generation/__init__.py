"""Generation of the target's answers: prompts, requests and journals."""
