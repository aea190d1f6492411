"""Online speculative decoding: the drafter goes on learning from the requests that it serves."""
