"""Generation and rewards: the engine's protocol, vLLM behind it, and each completion scored once in the job."""
